"""A node of several ranks: rank 0 has the link and leads, the others follow.

Every rank has a `Replica` over its shards and a `LocalWork` of its own. What rank 0 is asked to do with its
own it announces first, so that all ranks call the same methods in the same order; there they meet in
collectives. Announcements are plain data (msgpack) on a channel of their own, on which followers may wait for
ever: rank 0 has to wait for a swarm.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Literal

import msgpack
import torch
from torch import nn

from ...compression.base import Payload
from ...compression.errors import ThinwireError
from ...coordinator.protocol.messages import Commit, GenesisBody, decode_record, encode_record
from ...optim.auditing.evidence import Evidence
from ...optim.auditing.gradients import MAX_BATCHES
from ...optim.base import Allotment, Own, Strategy
from ...optim.parts.ranks import GroupRanks, Ranks
from ..auditing.earlier import Earlier
from ..config import parse_config
from ..local_work import LocalWork, Proposal
from ..precision import Precision
from ..replica import PayloadBytes, Replica, Saved, strategy_for
from ..snapshots.format import Manifest, Stored
from ..snapshots.store import SnapshotStore
from ..snapshots.writer import SnapshotWriter
from ..tasks.base import Task
from ..tasks.registry import make_task
from .collective_errors import collective_errors
from .sharding import Sharding, sharded_model

_FOR_EVER: Final = timedelta(days=3650)

Announced = Literal[
    "build",
    "load",
    "apply",
    "sums",
    "begin",
    "take",
    "take_local_state",
    "write",
    "save",
    "restore",
    "save_weights",
    "propose",
    "propose_again",
    "work_ahead",
    "evaluate",
    "keep",
    "audit",
]
"""What all ranks do together: a method of `Leader` and its replica and work, and one of `Follower`."""

_STOP: Final = "stop"
_WITH_COLLECTIVES: Final[frozenset[Announced]] = frozenset(
    {"propose", "propose_again", "work_ahead", "evaluate", "sums", "audit"}
)


def open_channel() -> Ranks:
    """For announcements, once this process is a rank (`sharding.join_node`). All ranks call this."""
    import torch.distributed as dist

    return GroupRanks(dist.new_group(backend="gloo", timeout=_FOR_EVER))


class Leader:
    """Rank 0's side of the channel."""

    def __init__(
        self, channel: Ranks, device: torch.device, sharding: Sharding, folder: Path | None = None
    ) -> None:
        """`folder`: for base weights while they are read; None: a temporary one."""
        self._channel, self._device, self._sharding = channel, device, sharding
        self.folder = folder
        self._is_inside = False

    @contextmanager
    def call(self, what: Announced, *values: Any) -> Iterator[None]:
        """All ranks do the same meanwhile."""
        self._is_inside = True
        self._channel.broadcast(msgpack.packb([what, *values]))
        try:
            yield
        except _alike(what):
            self._is_inside = False
            raise
        self._is_inside = False

    def replica(self, run_id: bytes, body: GenesisBody, peer_id: str, task: Task) -> Replica:
        """Every rank makes its part. `task`: rank 0's own; the others make theirs."""
        with self.call("build", run_id, encode_record(body), peer_id), collective_errors(self._channel):
            model, strategy = _sharded(body, task, self._device, self._sharding)
            return LeaderReplica(self, run_id, body, model, strategy, peer_id)

    def work(self, replica: Replica, task: Task, texts: Sequence[bytes | None]) -> LocalWork:
        """`texts`: what `task` has loaded already, for the others."""
        with self.call("load", *texts), collective_errors(self._channel):
            return LeaderWork(self, replica, task, self._sharding.precision)

    def stop(self) -> None:
        """The others end; where something broke in the middle, they do so without being told."""
        if not self._is_inside:
            self._channel.broadcast(msgpack.packb([_STOP]))


class LeaderReplica(Replica):
    """Rank 0's part of a node's replica."""

    def __init__(
        self,
        leader: Leader,
        run_id: bytes,
        genesis: GenesisBody,
        model: nn.Module,
        strategy: Strategy,
        peer_id: str,
    ) -> None:
        super().__init__(run_id, genesis, model, strategy, peer_id)
        self._leader = leader
        self._told_peers: Mapping[int, str] | None = None

    def apply_batch(
        self, commits: Sequence[Commit], payload_bytes: PayloadBytes, offered: Container[int] = ()
    ) -> list[Own]:
        """All payloads of the batch are fetched before anything is announced."""
        payloads = [payload_bytes(offer) for commit in commits for offer in self.heard(commit)]
        said = self.condemned, self.newcomers, self.failed
        standing = [(*(sorted(peers(c)) for peers in said), _plain_paces(self.paces(c))) for c in commits]
        own = [commit.body.round for commit in commits if commit.body.round in offered]
        peers = None if self.peers == self._told_peers else list(self.peers.items())
        self._told_peers = dict(self.peers)
        plain = [_plain(commit) for commit in commits]
        with self._leader.call("apply", plain, payloads, own, peers, standing):
            fetched = iter(payloads)
            owns = super().apply_batch(commits, lambda _offer: next(fetched), own)
        self._told_peers = dict(self.peers)
        return owns

    def sums(self) -> dict[str, int]:
        with self._leader.call("sums"):
            return super().sums()

    def begin(self, base: bytes | Path | None) -> None:
        """Base weights are put into a file, of which every rank reads its rows."""
        if isinstance(base, bytes):
            with _as_file(base, self._leader.folder) as path:
                self.begin(path)
            return
        with self._leader.call("begin", None if base is None else str(base)):
            super().begin(base)

    def take(self, store: SnapshotStore, stored: Stored, commit: Commit) -> None:
        manifest, path = store.verified(stored)
        with self._leader.call("take", str(path), encode_record(manifest), _plain(commit)):
            self.take_file(path, manifest, commit)

    def take_local_state(self, folder: Path) -> bool:
        with self._leader.call("take_local_state", str(folder)):
            return super().take_local_state(folder)

    def write_snapshot(self, writer: SnapshotWriter) -> None:
        """Training waits until every rank has its part on disk; not for the digests."""
        fingerprint = self.fingerprint()
        folder = writer.store.aside()
        try:
            with self._leader.call("write", str(folder)):
                self.write_part(folder)
        except BaseException as e:
            shutil.rmtree(folder, ignore_errors=True)
            if not isinstance(e, OSError):
                raise
            writer.tell_failure(self.round, e)
            return
        writer.complete(
            folder,
            round=self.round,
            commit=self.digest,
            fingerprint=fingerprint,
            changes=self.course.changes,
        )

    def saved(self) -> Saved:
        """This rank's part; the others keep theirs until `restore` or the next offer."""
        with self._leader.call("save"):
            return super().saved()

    def restore(self, saved: Saved) -> None:
        with self._leader.call("restore"):
            super().restore(saved)

    def save_weights(self, path: Path | None, own: bool = False) -> None:
        """On nodes of several ranks nobody has a model of its own."""
        with self._leader.call("save_weights"):
            super().save_weights(path)


class FollowerReplica(Replica):
    """Another rank's part. Only rank 0 reads the ledger: it tells who is condemned in the rounds to come, who
    is new, whose last audit has failed, and how often each offers."""

    told: Mapping[int, tuple[tuple[frozenset[int], ...], tuple[dict[int, int], int]]] = {}

    def condemned(self, commit: Commit) -> frozenset[int]:
        return self.told[commit.body.round][0][0]

    def newcomers(self, commit: Commit) -> frozenset[int]:
        return self.told[commit.body.round][0][1]

    def failed(self, commit: Commit) -> frozenset[int]:
        return self.told[commit.body.round][0][2]

    def paces(self, commit: Commit) -> tuple[dict[int, int], int]:
        return self.told[commit.body.round][1]


class LeaderWork(LocalWork):
    """Rank 0's part of a node's local work."""

    def __init__(self, leader: Leader, replica: Replica, task: Task, precision: Precision) -> None:
        super().__init__(replica, task, precision)
        self._leader = leader

    def propose(self, allotted: Allotment | None = None) -> Proposal:
        allotted = allotted or Allotment()
        with self._leader.call("propose", *astuple(allotted)):
            return super().propose(allotted)

    def propose_again(self, missed: Proposal) -> Proposal | None:
        with self._leader.call("propose_again", *astuple(replace(missed, payload=b""))):
            return super().propose_again(missed)

    def work_ahead(self, sent: bytes = b"") -> bool:
        with self._leader.call("work_ahead", sent):
            return super().work_ahead(sent)

    def evaluate(self) -> float:
        with self._leader.call("evaluate"):
            return super().evaluate()

    def keep(self) -> Earlier | None:
        with self._leader.call("keep"):
            return super().keep()

    def audit(
        self,
        payloads: Mapping[str, Payload],
        at: Earlier,
        seed: Callable[[int], int],
        n_batches: int,
        sent: Payload | None = None,
    ) -> list[Evidence | None]:
        """Every rank draws its rows of the same batches, and decodes its part of the same payloads."""
        replica = self._replica
        n_seeds = len(payloads) * max(MAX_BATCHES, replica.strategy.most_batches)
        seeds = [seed(i) for i in range(n_seeds)]
        encoded = [(peer, replica.encode(payload, at.turn_of(peer))) for peer, payload in payloads.items()]
        before = b"" if sent is None else replica.encode(sent, at.turn_before())
        with self._leader.call("audit", encoded, seeds, n_batches, before):
            return super().audit(payloads, at, seeds.__getitem__, n_batches, sent)


class Follower:
    """A rank that does what rank 0 announces. `import_path`, `data`: as the node's user has given them."""

    _task: Task
    _replica: FollowerReplica
    _work: LocalWork
    _earlier: Earlier

    def __init__(
        self,
        channel: Ranks,
        device: torch.device,
        sharding: Sharding,
        *,
        import_path: str | None,
        data: Path | None,
    ) -> None:
        self._channel, self._device, self._sharding = channel, device, sharding
        self._import_path, self._data = import_path, data
        self._saved: Saved | None = None
        self._methods: dict[Announced, Callable[..., None]] = {
            "build": self._build,
            "load": self._load,
            "apply": self._apply,
            "sums": self._sums,
            "begin": self._begin,
            "take": self._take,
            "take_local_state": self._take_local_state,
            "write": self._write,
            "save": self._save,
            "restore": self._restore,
            "save_weights": self._save_weights,
            "propose": self._propose,
            "propose_again": self._propose_again,
            "work_ahead": self._work_ahead,
            "evaluate": self._evaluate,
            "keep": self._keep,
            "audit": self._audit,
        }

    def run(self) -> None:
        """Until rank 0 says that it is over."""
        while True:
            what, *values = msgpack.unpackb(self._channel.broadcast(None))
            if what == _STOP:
                return
            try:
                self._methods[what](*values)
            except _alike(what):
                continue  # rank 0 decides what comes next

    def _build(self, run_id: bytes, genesis: bytes, peer_id: str) -> None:
        with collective_errors(self._channel):
            body = decode_record(GenesisBody, genesis)
            self._task = make_task(parse_config(body.config).task, self._import_path, self._data)
            model, strategy = _sharded(body, self._task, self._device, self._sharding)
            self._replica = FollowerReplica(run_id, body, model, strategy, peer_id)

    def _load(self, corpus: bytes | None, held_out: bytes | None) -> None:
        with collective_errors(self._channel):
            self._task.load(corpus, held_out)
            self._work = LocalWork(self._replica, self._task, self._sharding.precision)

    def _apply(
        self,
        plain: list[list[bytes]],
        payloads: list[bytes],
        offered: list[int],
        peers: list[tuple[int, str]] | None,
        standing: list[tuple[Any, ...]],
    ) -> None:
        if peers is not None:
            self._replica.peers = dict(peers)
        commits, fetched = [_commit(c) for c in plain], iter(payloads)
        self._replica.told = {
            c.body.round: (tuple(map(frozenset, said)), (dict(gaps), n_active))
            for c, (*said, (gaps, n_active)) in zip(commits, standing, strict=True)
        }
        self._replica.apply_batch(commits, lambda _offer: next(fetched), offered)

    def _sums(self) -> None:
        self._replica.sums()

    def _begin(self, base: str | None) -> None:
        self._replica.begin(None if base is None else Path(base))

    def _take(self, path: str, manifest: bytes, commit: list[bytes]) -> None:
        self._replica.take_file(Path(path), decode_record(Manifest, manifest), _commit(commit))

    def _take_local_state(self, folder: str) -> None:
        self._replica.take_local_state(Path(folder))

    def _write(self, folder: str) -> None:
        self._replica.write_part(Path(folder))

    def _save(self) -> None:
        self._saved = self._replica.saved()

    def _restore(self) -> None:
        assert self._saved is not None
        self._replica.restore(self._saved)
        self._saved = None

    def _save_weights(self) -> None:
        self._replica.save_weights(None)

    def _propose(self, n_batches: int | None, share: float) -> None:
        self._saved = None
        self._work.propose(Allotment(n_batches, share))

    def _propose_again(self, *missed: Any) -> None:
        self._saved = None
        self._work.propose_again(Proposal(*missed))

    def _work_ahead(self, sent: bytes) -> None:
        self._work.work_ahead(sent)

    def _evaluate(self) -> None:
        self._work.evaluate()

    def _keep(self) -> None:
        earlier = self._work.keep()
        if earlier is not None:
            self._earlier = earlier

    def _audit(
        self, encoded: list[tuple[str, bytes]], seeds: list[int], n_batches: int, before: bytes
    ) -> None:
        at = self._earlier
        sent = self._replica.decode(before, at.turn_before()) if before else None
        payloads = {peer: self._replica.decode(data, at.turn_of(peer)) for peer, data in encoded}
        self._work.audit(payloads, at, seeds.__getitem__, n_batches, sent)


def _alike(what: Announced) -> tuple[type[Exception], ...]:
    """What every rank raises if one does: after anything else they are out of step."""
    return (ThinwireError,) if what in _WITH_COLLECTIVES else (ThinwireError, OSError)


def _sharded(
    body: GenesisBody, task: Task, device: torch.device, sharding: Sharding
) -> tuple[nn.Module, Strategy]:
    model = sharded_model(task, device, sharding, parse_config(body.config))
    return model, strategy_for(body, task, model)


@contextmanager
def _as_file(data: bytes, where: Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="thinwire-base-", dir=where) as folder:
        path = Path(folder) / "base.safetensors"
        path.write_bytes(data)
        yield path


def _plain_paces(paces: tuple[dict[int, int], int]) -> tuple[list[tuple[int, int]], int]:
    gaps, n_active = paces
    return sorted(gaps.items()), n_active


def _plain(commit: Commit) -> list[bytes]:
    return [commit.record, commit.signature]


def _commit(plain: Sequence[bytes]) -> Commit:
    record, signature = plain
    return Commit(record=record, signature=signature)
