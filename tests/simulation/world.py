"""A coordinator, its disk, the nodes and the network between them, on one clock and in one thread.

The coordinator's end of a connection does what `coordinator/doors.py` does; all behind it is the real thing.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import deque
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.simulation.oracle import Oracle
from tests.simulation.peer import Disk, End, Peer, Wire, manifest
from thinwire.compression.errors import ConfigError, Incompatible, LedgerCorrupt, ThinwireError
from thinwire.coordinator.adoption import STALL_S
from thinwire.coordinator.blobs import BlobStore, BlobWriter
from thinwire.coordinator.identity import peer_id_of
from thinwire.coordinator.ledger import Ledger
from thinwire.coordinator.messages import (
    PROTOCOL_VERSION,
    BadMessage,
    Commit,
    Follow,
    GenesisBody,
    Head,
    Hello,
    LayoutEntry,
    Limits,
    Members,
    Message,
    NodeState,
    Notice,
    Offer,
    Offered,
    Refused,
    Report,
    State,
)
from thinwire.coordinator.service import Service
from thinwire.coordinator.sessions import MAX_QUEUED, MAX_QUEUED_HINTS

SNAPSHOT_EVERY = 2
QUOTA_BYTES = 30_000
IN_FLIGHT = 4
"""Commits that a connection carries at a time."""


class PowerCut(BaseException):
    """The coordinator's process ends here and now."""


class World:
    """`folder` is filled with state directories: every restart after a crash goes on with a copy."""

    def __init__(self, folder: Path, *, policy: str, min_peers: int, n_rounds: int, eval_every: int) -> None:
        self.key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
        self.n_rounds, self.min_peers = n_rounds, min_peers
        self.now_s = 1000.0
        self._folder, self._versions, self._numbers, self._lives = folder, count(), count(1), count()
        self._state = self._new_folder()
        config = {
            "run": {
                **{"name": "simulated", "rounds": n_rounds, "min_peers": min_peers, "seed": 1},
                **{"eval_every": eval_every, "verify_every": 1, "snapshot_every": SNAPSHOT_EVERY},
            },
            "policy": {"name": policy},
            "schedule": {"name": "constant", "warmup_rounds": 0, "final_factor": 1.0},
            "network": {"heartbeat_s": 1.0},
        }
        genesis = GenesisBody(
            protocol=PROTOCOL_VERSION,
            config=json.dumps(config),
            layout=(LayoutEntry(name="w", shape=(1,), dtype="float32", init="zeros", scale=0.0),),
            base=None,
            held_out=None,
            corpus=None,
            limits=Limits(max_peers=8, max_payload_bytes=6000, max_samples=1000),
            coordinator=peer_id_of(self.key.public_key()),
            lr_factor_bits=0,
            time_ms=1,
        )
        self.ledger = Ledger.create(self._state / "ledger.db", genesis, self.key)
        self.oracle = Oracle(self.ledger.run_id, self.key.public_key(), SNAPSHOT_EVERY)
        self.peers: dict[str, Peer] = {}
        self.disks: dict[str, Disk] = {}
        self.wires: list[Wire] = []
        self.fuse: int | None = None
        """After so many more chances the power is cut."""
        self.backup: Path | None = None
        self.is_restored = False
        """Commits may have been lost and made anew: a fork."""
        self.needed_after: dict[str, int] = {}
        self.adopting: tuple[Wire, Hello, float] | None = None
        self._n_adopted = 0
        self._half_written: BlobWriter | None = None
        self.service: Service | None = None
        self._current: dict[str, Wire] = {}
        self._start_service()

    def close(self) -> None:
        self.ledger.close()

    # ----------------------------------------------------------------------------------- the coordinator

    def _new_folder(self) -> Path:
        path = self._folder / f"state-{next(self._versions)}"
        path.mkdir()
        return path

    def _start_service(self) -> None:
        self.blobs = BlobStore(self._state / "blobs", QUOTA_BYTES)
        assert not list((self._state / "blobs").glob("*.part")), "a half-written blob is left"
        self.service = Service(
            ledger=self.ledger,
            blobs=self.blobs,
            key=self.key,
            token="secret",
            send=self._post,
            on_commit=lambda round_: self._spark(),
            now_s=self.now_s,
            wall_ms=lambda: 1,
        )

    def _post(self, peer_id: str, message: Message) -> None:
        self._spark()
        wire = self._current.get(peer_id)
        if wire is None:
            return
        if isinstance(message, Offered) and len(wire.down) >= MAX_QUEUED_HINTS:
            return
        if isinstance(message, Members | Notice):
            old = next((m for m in wire.down if type(m) is type(message)), None)
            if old is not None:
                wire.down.remove(old)
        wire.down.append(message)
        assert len(wire.down) <= MAX_QUEUED + IN_FLIGHT, "what a slow node has to be told grows and grows"

    def _spark(self) -> None:
        if self.fuse is not None:
            self.fuse -= 1
            if self.fuse < 0:
                raise PowerCut

    def call(self, what: Callable[[Service], Any]) -> None:
        """Into the service, and a look at what came of it. Raises what the service raises, but PowerCut."""
        if self.service is None:
            return
        try:
            what(self.service)
            self.service.tick(self.now_s)
        except PowerCut:
            self.stop(is_clean=False)
        except ThinwireError:
            self._look()
            raise
        else:
            self._look()

    def _look(self) -> None:
        """New commits are told to the oracle, from the disk."""
        for commit in self.ledger.commits(len(self.oracle.ledger), 1000):
            if self.adopting is not None:
                self.oracle.adopted(commit)
                self._n_adopted += 1
            else:
                self.oracle.committed(commit, self.blobs, list(self._needed_after().values()))

    def stop(self, *, is_clean: bool) -> None:
        """The coordinator ends; connections break. Not clean: goes on with a copy of its disk."""
        self._look()
        self.service, self.fuse, self.adopting = None, None, None
        self.needed_after.clear()
        if not is_clean:
            old, self._state = self._state, self._copy_of_state()
            if self._half_written is not None:
                self._half_written.abort()  # of the old folder: closes the file
                self._half_written = None
            self.ledger.close()
            shutil.rmtree(old)
        else:
            self.ledger.close()
        for wire in self.wires:
            wire.is_closed = True
            wire.up.clear()
            wire.uploads.clear()
            wire.down.append(End())
        self._current.clear()

    def restart(self) -> None:
        """From what is on the disk, nothing else."""
        self.ledger = Ledger.open(self._state / "ledger.db", self.key.public_key())
        self.oracle.restarted(list(self.ledger.all_commits()))
        self._start_service()

    def bring_back(self, peer: Peer) -> None:
        """Nobody but this node is heard until it has been welcomed."""
        peer.is_frozen = False
        while peer.wire is not None and self.deliver_down(peer.wire):
            pass  # the end of its old connection
        self.connect(peer)
        wire = peer.wire
        while wire is not None and peer.index is None and peer.refused is None:
            assert self.deliver_up(wire) | self.deliver_down(wire), f"{peer.name} is not welcomed"

    def is_lost(self) -> bool:
        """Whether too few nodes can go on: their next payload is rightly gone, and there is no snapshot."""
        return len(self.peers) - sum(map(self._is_lost_for, self.peers.values())) < self.min_peers

    def _is_lost_for(self, peer: Peer) -> bool:
        if self.service is None or peer.start is None or peer.round == len(peer.disk.copy):
            return False
        kept_from = self.service.status(self.now_s)["payloads"]["kept_from"]
        is_gone = peer.round + 1 < kept_from or peer.round + 1 in self.oracle.exempt
        later = [a for a in self.oracle.attested() if a.round > peer.round]
        return is_gone and not any(self._borrow(a.round, a.manifest) for a in later)

    def _copy_of_state(self) -> Path:
        path = self._new_folder()
        shutil.copytree(self._state, path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*-shm"))
        return path

    def keep_copy(self) -> None:
        """Of the state directory, while it is in use."""
        if self.backup is not None:
            shutil.rmtree(self.backup)
        self.backup = self._copy_of_state()

    def restore(self) -> None:
        """The disk is lost, the coordinator starts on the older copy."""
        assert self.backup is not None
        if self.service is not None:
            self.stop(is_clean=True)
        for wire in self.wires:
            wire.down = deque([End()])  # what is on its way is lost, too
        shutil.rmtree(self._state)
        self._state, self.backup = self.backup, None
        self.ledger = Ledger.open(self._state / "ledger.db", self.key.public_key())
        self.oracle.restored(list(self.ledger.all_commits()))
        self._start_service()

    # -------------------------------------------------------------------------------------- the network

    def connect(self, peer: Peer) -> None:
        """Dials, if the coordinator is there and the node has no connection."""
        if self.service is not None and peer.wire is None and peer.refused is None and not peer.is_frozen:
            wire = Wire(peer)
            self.wires.append(wire)
            peer.connect(wire)

    def cut(self, wire: Wire, up: int, down: int) -> None:
        """The connection breaks; of what is on its way so many messages arrive before the end shows."""
        if any(isinstance(m, End) for m in (*wire.up, *wire.down)):
            return
        for queue, kept in ((wire.up, up), (wire.down, down)):
            while len(queue) > kept:
                queue.pop()
            queue.append(End())
        wire.uploads.clear()

    def deliver_up(self, wire: Wire) -> bool:
        """One message to the coordinator; False: there is none, or another node gives commits back."""
        if self.service is None or wire.is_closed or not wire.up:
            return False
        if isinstance(wire.up[0], Hello) and self.adopting is not None:
            return False
        message = wire.up.popleft()
        if isinstance(message, End):
            self._close(wire)
            return True
        self.call(lambda service: None)  # what is due by now comes first, as in the server
        try:
            self._hand_over(wire, message)
        except ThinwireError as e:
            self._refuse(wire, e)
        return True

    def _refuse(self, wire: Wire, error: ThinwireError) -> None:
        known = isinstance(error, ConfigError | Incompatible | LedgerCorrupt)
        name = type(error).__name__ if known else "BadMessage"
        wire.down.append(Refused(error=name, text=str(error)[:2000]))
        self._close(wire)

    def _hand_over(self, wire: Wire, message: Message) -> None:
        name, number = wire.peer.name, wire.number
        if isinstance(message, Hello):
            self._hello(wire, message)
        elif self.adopting is not None and self.adopting[0] is wire:
            self._take_back(wire, message)
        elif self._current.get(name) is wire and wire.is_ending:
            pass  # nobody answers any more
        elif isinstance(message, Follow):
            wire.follows = message.after
        else:
            self._foresee(wire, message)
            self.call(lambda service: service.receive(name, number, message, self.now_s))
            if isinstance(message, State) and message.state is NodeState.LEAVING and self.service is not None:
                wire.down.append(Head(round=self.service.head))

    def _hello(self, wire: Wire, hello: Hello) -> None:
        assert self.service is not None
        if not self.service.lacks(hello):
            self._open(wire, hello)
            return
        self.service.hold()
        self.adopting, self._n_adopted = (wire, hello, self.now_s), 0
        wire.down.append(Follow(after=self.service.head))

    def _take_back(self, wire: Wire, message: Message) -> None:
        """As `coordinator/adoption.py` does, one commit at a time."""
        assert self.adopting is not None
        hello = self.adopting[1]
        self.adopting = wire, hello, self.now_s
        if not isinstance(message, Commit):
            raise BadMessage(f"a Commit is expected, not {type(message).__name__}")

        def adopt(service: Service) -> None:
            self._spark()
            service.adopt([message])
            self._spark()

        self.call(adopt)
        for other in self._current.values():
            if not other.is_ending:
                other.down.extend([Refused(error="SwarmUnreachable", text="commits came back"), End()])
                other.is_ending = True
        if self.service is not None and not self.service.lacks(hello):
            self._go_on()
            self._open(wire, hello)

    def _go_on(self) -> None:
        self.adopting = None
        if self._n_adopted:
            self.needed_after.clear()
            self.oracle.restarted(list(self.ledger.all_commits()))
        self.call(lambda service: service.go_on(self.now_s))

    def _open(self, wire: Wire, hello: Hello) -> None:
        name = wire.peer.name

        def open_(service: Service) -> None:
            number = next(self._numbers)
            welcome = service.open(name, number, hello, self.now_s)
            old = self._current.get(name)
            if old is not None and not old.is_ending:
                old.down.extend([Refused(error="ConfigError", text="replaced"), End()])
                old.is_ending = True
            wire.number = number
            self._current[name] = wire
            self.needed_after[name] = welcome.kept_from - 1
            wire.down.append(welcome)

        self.call(open_)

    def _foresee(self, wire: Wire, message: Message) -> None:
        """Tells the oracle what the service is about to hear in an open session."""
        index = self.ledger.index_of(wire.peer.name)
        if self._current.get(wire.peer.name) is not wire or index is None or self.service is None:
            return
        if isinstance(message, Report):
            self.oracle.said(wire.peer.name, message)
        if isinstance(message, State):
            self._foresee_need(wire.peer.name, message)
        head = self.service.head
        if isinstance(message, Offer) and message.digest is not None and message.digest in self.blobs:
            self.oracle.used(message.digest)
        if isinstance(message, Offer) and message.round == head + 1 <= self.n_rounds:
            self.oracle.tally.offered(index, message, self.blobs)

    def _foresee_need(self, name: str, said: State) -> None:
        assert self.service is not None
        if said.state is not NodeState.JOINING:
            self.needed_after.pop(name, None)
        elif said.needs_after is not None:
            kept_from = self.service.status(self.now_s)["payloads"]["kept_from"]
            self.needed_after[name] = max(said.needs_after, kept_from - 1)

    def _needed_after(self) -> dict[str, int]:
        """What joining peers need; those who are gone need nothing."""
        if self.service is not None:
            status = self.service.status(self.now_s)
            alive = {p["peer_id"] for p in status["peers"] if p["state"] != "gone"}
            self.needed_after = {
                name: after
                for name, after in self.needed_after.items()
                if name in alive or self.service.is_member(name)
            }
        return self.needed_after

    def _close(self, wire: Wire) -> None:
        wire.is_closed = True
        wire.down.append(End())
        if self.adopting is not None and self.adopting[0] is wire:
            self._go_on()
        if self._current.get(wire.peer.name) is wire:
            del self._current[wire.peer.name]
        if wire.number:
            self.call(lambda service: service.closed(wire.peer.name, wire.number, self.now_s))

    def deliver_down(self, wire: Wire) -> bool:
        """One message to the node, unless it is frozen; False: there is none."""
        self._pump(wire)
        if not wire.down or wire.peer.is_frozen:
            return False
        message = wire.down.popleft()
        if wire.peer.wire is wire:
            wire.peer.receive(message)
        if isinstance(message, End):
            wire.down.clear()
            if not wire.is_closed:
                wire.up.append(End())
        return True

    def _pump(self, wire: Wire) -> None:
        """Commits leave the coordinator while there is room on the way."""
        if self.service is None or wire.follows is None or self._current.get(wire.peer.name) is not wire:
            return
        room = IN_FLIGHT - len(wire.down)
        for commit in self.service.commits(wire.follows, max(room, 0)):
            wire.down.append(commit)
            wire.follows += 1

    def deliver_upload(self, wire: Wire) -> bool:
        """A payload arrives on a stream of its own; False: there is none."""
        if self.service is None or not wire.uploads:
            return False
        digest, payload = wire.uploads.popleft()

        def upload(service: Service) -> None:
            if digest not in self.blobs:
                service.may_store(wire.peer.name, len(payload))
                writer = self.blobs.writer(digest)
                self._half_written = writer
                writer.write(payload[:1000])
                self._spark()
                writer.write(payload[1000:])
                writer.finish()
                self._half_written = None
            self._spark()
            self.oracle.used(digest)
            self.oracle.tally.arrived(digest, len(payload))
            service.blob_arrived(wire.peer.name, digest, self.now_s)

        with contextlib.suppress(BadMessage):  # the node is told that its payload is not taken
            self.call(upload)
        return True

    # ---------------------------------------------------------------------------------------- the nodes

    def start(self, name: str, *, with_disk: bool) -> Peer:
        """A node starts; its earlier life is over."""
        self.kill(name)
        if not with_disk:
            self.disks[name] = Disk()
        peer = Peer(
            name=name,
            life=next(self._lives),
            disk=self.disks.setdefault(name, Disk()),
            run_id=self.ledger.run_id,
            public_key=self.key.public_key(),
            snapshot_every=SNAPSHOT_EVERY,
            n_rounds=self.n_rounds,
            fetch=self._fetch,
            borrow=self._borrow,
        )
        self.peers[name] = peer
        self.connect(peer)
        return peer

    def kill(self, name: str) -> None:
        """What the node has sent is still on its way."""
        peer = self.peers.pop(name, None)
        if peer is not None and peer.wire is not None:
            self.cut(peer.wire, len(peer.wire.up), 0)
            peer.wire = None

    def _fetch(self, digest: bytes) -> bytes | None:
        if self.service is not None and digest in self.blobs:
            return self.blobs.read(digest)
        return next((p.payloads[digest] for p in self._awake() if digest in p.payloads), None)

    def _borrow(self, round_: int, named: bytes) -> bytes | None:
        found = (peer.disk.snapshots.get(round_) for peer in self._awake())
        return next((s for s in found if s is not None and manifest(round_, s) == named), None)

    def _awake(self) -> list[Peer]:
        return [peer for peer in self.peers.values() if not peer.is_frozen]

    def flow(self) -> None:
        """Everything that is on its way arrives, and what is said in answer, too."""
        for _ in range(100_000):
            moved = False
            for wire in list(self.wires):
                moved |= self.deliver_up(wire) | self.deliver_upload(wire) | self.deliver_down(wire)
            if not moved:
                self.wires = [w for w in self.wires if not w.is_closed or w.down]
                return
        raise AssertionError("the talk does not end")

    def pass_time(self, seconds: float) -> None:
        """Nodes that are awake send a heartbeat; the coordinator looks at the clock."""
        self.now_s += seconds
        for peer in self._awake():
            peer.beat()
        if self.adopting is not None and self.now_s - self.adopting[2] > STALL_S:
            self._close(self.adopting[0])
        self.call(lambda service: None)

    # ------------------------------------------------------------------------------------- what must hold

    def check(self) -> None:
        for peer in self.peers.values():
            at = peer.disk.copy[peer.round - 1].digest if peer.round else self.ledger.run_id
            assert peer.replica == self.oracle.states[at], f"{peer.name} differs after round {peer.round}"
        if self.service is None:
            return
        commits = self.service.commits(0, 10_000)
        assert [c.digest for c in commits] == [c.digest for c in self.oracle.ledger]
        assert self.service.head == len(commits)
        status = self.service.status(self.now_s)
        json.dumps(status, allow_nan=False)
        assert status["payloads"]["bytes"] == sum(f.stat().st_size for f in self._state.glob("blobs/*"))
        self.oracle.check_blobs(self.blobs, list(self._needed_after().values()))
        for wire in self._current.values():
            self._check_copy(wire.peer.disk)
        if not self.is_restored:
            for disk in self.disks.values():
                self._check_copy(disk)
        if self.adopting is not None:
            return
        gone = {p["index"] for p in status["peers"] if p["state"] == "gone"}
        expected = self.service._rounds.expected
        assert not gone & expected, f"{gone & expected} are gone and awaited"

    def _check_copy(self, disk: Disk) -> None:
        """What a node has seen is in the ledger."""
        if disk.copy:
            n = len(disk.copy)
            assert n <= len(self.oracle.ledger), f"round {n} is lost"
            assert self.oracle.ledger[n - 1].digest == disk.copy[-1].digest, f"round {n} has changed"
