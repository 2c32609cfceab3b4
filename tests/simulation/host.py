"""The coordinator's process and its disk: the real service, which can be killed at any moment."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.simulation.oracle import Oracle
from thinwire.compression.errors import ConfigError, ThinwireError
from thinwire.coordinator.blobs import BlobStore, BlobWriter
from thinwire.coordinator.control.orders import Order
from thinwire.coordinator.ledger import Ledger
from thinwire.coordinator.protocol.identity import peer_id_of
from thinwire.coordinator.protocol.messages import (
    PROTOCOL_VERSION,
    Change,
    GenesisBody,
    LayoutEntry,
    Limits,
    Message,
    NodeState,
    Offer,
    Offered,
    Report,
    State,
)
from thinwire.coordinator.service import Service

SNAPSHOT_EVERY = 3


class PowerCut(BaseException):
    """The coordinator's process ends here and now."""


class Host:
    """`folder` is filled with state directories: every restart after a crash goes on with a copy.

    `post` gets what the service sends; `ended` is called when the process has ended, whatever the cause.
    """

    def __init__(
        self,
        folder: Path,
        *,
        policy: str,
        min_peers: int,
        n_rounds: int,
        eval_every: int,
        post: Callable[[str, Message], None],
        ended: Callable[[], None],
    ) -> None:
        self.key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
        self.n_rounds, self.min_peers = n_rounds, min_peers
        self.now_s = 1000.0
        self._folder, self._versions = folder, count()
        self._post, self._ended = post, ended
        self._state = self._new_folder()
        genesis = genesis_of(self.key, policy, min_peers, n_rounds, eval_every)
        self.ledger = Ledger.create(self._state / "ledger.db", genesis, self.key)
        self.oracle = Oracle(self.ledger.run_id, peer_id_of(self.key.public_key()), SNAPSHOT_EVERY)
        self.fuse: int | None = None
        """After so many more chances the power is cut."""
        self.half_written: BlobWriter | None = None
        self.backup: Path | None = None
        self.is_adopting, self.n_adopted = False, 0
        self.needed_after: dict[str, int] = {}
        self.service: Service | None = None
        self._start_service()

    def close(self) -> None:
        self.ledger.close()

    def _new_folder(self) -> Path:
        path = self._folder / f"state-{next(self._versions)}"
        path.mkdir()
        return path

    def _start_service(self) -> None:
        self.blobs = BlobStore(self._state / "blobs")
        assert not list((self._state / "blobs").glob("*.part")), "a half-written blob is left"
        self.service = Service(
            ledger=self.ledger,
            blobs=self.blobs,
            key=self.key,
            token="secret",
            send=self._send,
            on_commit=self._told,
            now_s=self.now_s,
            wall_ms=lambda: 1,
        )

    def _send(self, peer_id: str, message: Message) -> None:
        if isinstance(message, Offered):
            assert message.round == self.ledger.head_round + 1, f"told of an offer for round {message.round}"
            assert self.blobs.size(message.digest) == message.n_bytes, "told of a payload that is not here"
        self.spark()
        self._post(peer_id, message)

    def _told(self, round_: int) -> None:
        assert self.ledger.digest_at(round_) is not None, f"round {round_} is told, it is not on the disk"
        self.spark()

    def spark(self) -> None:
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

    def order(self, what: str, warmup: int) -> None:
        """From the run's owner; what is refused (paused already, over, held) changes nothing."""
        changes = (Change(key="schedule.warmup_rounds", value=warmup),) if what == "set" else ()
        order = Order.model_validate({"what": what, "changes": changes})
        with suppress(ConfigError):
            self.call(lambda service: service.order(order, self.now_s))

    def _look(self) -> None:
        """New commits are told to the oracle, from the disk."""
        for commit in self.ledger.commits(len(self.oracle.ledger), 1000):
            if self.is_adopting:
                self.oracle.adopted(commit)
                self.n_adopted += 1
            else:
                self.oracle.committed(commit, self.blobs, list(self._needed_after().values()))

    def stop(self, *, is_clean: bool) -> None:
        """The coordinator ends; connections break. Not clean: goes on with a copy of its disk."""
        self._look()
        self.service, self.fuse, self.is_adopting = None, None, False
        self.needed_after.clear()
        if not is_clean:
            old, self._state = self._state, self._copy_of_state()
            if self.half_written is not None:
                self.half_written.abort()  # of the old folder: closes the file
                self.half_written = None
            self.ledger.close()
            shutil.rmtree(old)
        else:
            self.ledger.close()
        self._ended()

    def restart(self) -> None:
        """From what is on the disk, nothing else."""
        self.ledger = Ledger.open(self._state / "ledger.db", self.key.public_key())
        self.oracle.restarted(list(self.ledger.all_commits()))
        self._start_service()

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
        shutil.rmtree(self._state)
        self._state, self.backup = self.backup, None
        self.ledger = Ledger.open(self._state / "ledger.db", self.key.public_key())
        self.oracle.restored(list(self.ledger.all_commits()))
        self._start_service()

    def foresee(self, name: str, message: Message) -> None:
        """Tells the oracle what the service is about to hear in an open session."""
        index = self.ledger.index_of(name)
        if index is None or self.service is None:
            return
        if isinstance(message, Report):
            self.oracle.said(name, message)
        if isinstance(message, State):
            self._foresee_need(name, message)
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

    def check(self) -> None:
        """What must hold of the ledger, of the payloads and of who is awaited."""
        if self.service is None:
            return
        commits = self.service.commits(0, 10_000)
        assert [c.digest for c in commits] == [c.digest for c in self.oracle.ledger]
        assert self.service.head == len(commits)
        status = self.service.status(self.now_s)
        json.dumps(status, allow_nan=False)
        assert status["payloads"]["bytes"] == sum(f.stat().st_size for f in self._state.glob("blobs/*"))
        self.oracle.check_blobs(self.blobs, list(self._needed_after().values()))
        if self.is_adopting:
            return
        gone = {p["index"] for p in status["peers"] if p["state"] == "gone"}
        expected = self.service._parts.rounds.expected
        assert not gone & expected, f"{gone & expected} are gone and awaited"


def genesis_of(
    key: Ed25519PrivateKey, policy: str, min_peers: int, n_rounds: int, eval_every: int
) -> GenesisBody:
    config = {
        "run": {
            **{"name": "simulated", "rounds": n_rounds, "min_peers": min_peers, "seed": 1},
            **{"eval_every": eval_every, "verify_every": 1, "snapshot_every": SNAPSHOT_EVERY},
        },
        "policy": {"name": policy},
        "schedule": {"name": "constant", "warmup_rounds": 0, "final_factor": 1.0},
        "network": {"heartbeat_s": 1.0},
    }
    return GenesisBody(
        protocol=PROTOCOL_VERSION,
        config=json.dumps(config),
        layout=(LayoutEntry(name="w", shape=(1,), dtype="float32", init="zeros", scale=0.0),),
        base=None,
        held_out=None,
        corpus=None,
        limits=Limits(max_peers=8, max_payload_bytes=6000, max_samples=1000),
        coordinator=peer_id_of(key.public_key()),
        lr_factor_bits=0,
        time_ms=1,
    )
