"""A coordinator, the nodes and the network between them, on one clock and in one thread."""

from __future__ import annotations

from collections import deque
from itertools import count
from pathlib import Path
from typing import Any

from tests.simulation.desk import Desk
from tests.simulation.host import SNAPSHOT_EVERY
from tests.simulation.peer import Disk, End, Peer, Wire, manifest
from thinwire.coordinator.adoption import STALL_S
from thinwire.coordinator.protocol.identity import peer_id_of


class World:
    """`run`: what the host of the coordinator takes."""

    def __init__(self, folder: Path, **run: Any) -> None:
        self._lives = count()
        self.peers: dict[str, Peer] = {}
        self.disks: dict[str, Disk] = {}
        self.wires: list[Wire] = []
        self.desk = Desk(folder, self._sever, **run)
        self.host = self.desk.host
        self.is_restored = False
        """Commits may have been lost and made anew: a fork."""

    def connect(self, peer: Peer) -> None:
        """Dials, if the coordinator is there and the node has no connection."""
        if (
            self.host.service is not None
            and peer.wire is None
            and peer.refused is None
            and not peer.is_frozen
        ):
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

    def deliver_down(self, wire: Wire) -> bool:
        """One message to the node, unless it is frozen; False: there is none."""
        self.desk.pump(wire)
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

    def start(self, name: str, *, with_disk: bool) -> Peer:
        """A node starts; its earlier life is over."""
        self.kill(name)
        if not with_disk:
            self.disks[name] = Disk()
        peer = Peer(
            name=name,
            life=next(self._lives),
            disk=self.disks.setdefault(name, Disk()),
            run_id=self.host.ledger.run_id,
            founder=peer_id_of(self.host.key.public_key()),
            snapshot_every=SNAPSHOT_EVERY,
            n_rounds=self.host.n_rounds,
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
        if self.host.service is not None and digest in self.host.blobs:
            return self.host.blobs.read(digest)
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
                moved |= self.desk.deliver_up(wire) | self.desk.deliver_upload(wire) | self.deliver_down(wire)
            if not moved:
                self.wires = [w for w in self.wires if not w.is_closed or w.down]
                return
        raise AssertionError("the talk does not end")

    def pass_time(self, seconds: float) -> None:
        """Nodes that are awake send a heartbeat; the coordinator looks at the clock."""
        self.host.now_s += seconds
        for peer in self._awake():
            peer.beat()
        if self.desk.adopting is not None and self.host.now_s - self.desk.adopting[2] > STALL_S:
            self.desk.close(self.desk.adopting[0])
        self.host.call(lambda service: None)

    def _sever(self) -> None:
        """The coordinator has ended: what is on its way to it is lost."""
        for wire in self.wires:
            wire.is_closed = True
            wire.up.clear()
            wire.uploads.clear()
            wire.down.append(End())

    def restore(self) -> None:
        """The coordinator goes on with the older copy; what is on its way is lost, too."""
        self.host.restore()
        for wire in self.wires:
            wire.down = deque([End()])

    def bring_back(self, peer: Peer) -> None:
        """Nobody but this node is heard until it has been welcomed, or the coordinator has ended."""
        peer.is_frozen = False
        if self.desk.adopting is not None:
            self.pass_time(STALL_S + 1.0)  # somebody else had begun to give commits back
        while peer.wire is not None and self.deliver_down(peer.wire):
            pass  # the end of its old connection
        self.connect(peer)
        while peer.wire is not None and peer.index is None and peer.refused is None:
            moves = self.desk.deliver_up(peer.wire) | self.deliver_down(peer.wire)
            assert moves, f"{peer.name} is not welcomed"
        is_answered = peer.index is not None or peer.refused is not None
        assert is_answered or self.host.service is None, f"{peer.name} is sent away without a reason"

    def is_lost(self) -> bool:
        """Whether too few nodes can go on: their next payload is rightly gone, and there is no snapshot."""
        return len(self.peers) - sum(map(self._is_lost_for, self.peers.values())) < self.host.min_peers

    def _is_lost_for(self, peer: Peer) -> bool:
        if self.host.service is None or peer.start is None or peer.round == len(peer.disk.copy):
            return False
        kept_from = self.host.service.status(self.host.now_s)["payloads"]["kept_from"]
        may_be_gone = peer.round + 1 < kept_from or peer.round + 1 in self.host.oracle.exempt
        named = [o.digest for o in peer.disk.copy[peer.round].body.offers if o.digest is not None]
        is_gone = any(d not in peer.payloads and self._fetch(d) is None for d in named)
        later = [a for a in self.host.oracle.attested() if a.round > peer.round]
        return may_be_gone and is_gone and not any(self._borrow(a.round, a.manifest) for a in later)

    def check(self) -> None:
        for peer in self.peers.values():
            at = peer.disk.copy[peer.round - 1].digest if peer.round else self.host.ledger.run_id
            assert peer.replica == self.host.oracle.states[at], (
                f"{peer.name} differs after round {peer.round}"
            )
        if self.host.service is None:
            return
        self.host.check()
        for wire in self.desk.current.values():
            self._check_copy(wire.peer.disk)
        if not self.is_restored:
            for disk in self.disks.values():
                self._check_copy(disk)

    def _check_copy(self, disk: Disk) -> None:
        """What a node has seen is in the ledger."""
        if disk.copy:
            n = len(disk.copy)
            assert n <= len(self.host.oracle.ledger), f"round {n} is lost"
            assert self.host.oracle.ledger[n - 1].digest == disk.copy[-1].digest, f"round {n} has changed"
