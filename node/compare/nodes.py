"""The nodes of a comparison: peers that train, and a reader that applies the ledger and evaluates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite

from torch import nn

from ...compression.errors import ReplicaDiverged
from ...coordinator.protocol.messages import BlobRef, Commit, GenesisBody, NodeState
from ...optim.base import Closure
from ..config import parse_config
from ..links.local import LocalLink
from ..local_work import LocalWork
from ..phases import Stopwatch, time_calls, time_compressor
from ..replica import Replica, build_replica, data_seed
from ..runner import Runner
from ..tasks.base import Init, Task
from ..tasks.registry import make_task


@dataclass(frozen=True, slots=True)
class Point:
    """The replica after a round: what every peer has done for it (on average), and the held-out loss.
    `payload_bytes`: what it has sent to neighbours is among them."""

    round: int
    steps: float
    tokens: float
    payload_bytes: float
    held_out: float


OwnData = tuple[bytes, bytes]
"""A corpus, and what is held out, as `Task.load` takes them."""


class Peer(Runner):
    """A node whose batches are the same whatever the strategy, and whose time is taken."""

    def __init__(
        self, link: LocalLink, import_path: str | None, seed: int, own: OwnData | None = None
    ) -> None:
        """`own`: what it trains on, instead of what the run has."""
        super().__init__(
            link,
            import_path=import_path,
            on_prepared=lambda _runner: self._take_times(),
            on_proposing=lambda _runner: self.stopwatch.next_round(),
        )
        self.stopwatch = Stopwatch()
        self._seed, self._own = seed, own

    def _take_times(self) -> None:
        if self._own is not None:
            self.work.task.load(*self._own)
        self.work.task = SameBatches(self.work.task, self._seed, self.link.peer_id)
        watch, strategy = self.stopwatch, self.replica.strategy
        time_compressor(strategy, watch)
        time_calls(strategy, {"propose": "compute", "work_ahead": "compute"}, watch)
        time_calls(self.replica, {"encode": "pack", "apply_batch": "decode"}, watch)
        time_calls(self.link, {"payload": "exchange", "offer": "exchange"}, watch)


class SameBatches:
    """A task whose n-th batch is drawn from (seed, peer, n): what a run, a round and a strategy are does not
    come into it."""

    def __init__(self, task: Task, seed: int, peer_id: str) -> None:
        self._task, self._seed, self._peer_id, self._n_drawn = task, seed.to_bytes(32, "little"), peer_id, 0
        self.n_samples, self.n_tokens = task.n_samples, task.n_tokens

    def draw(self, model: nn.Module, seed: int, rank: int = 0, ranks: int = 1) -> Closure:
        self._n_drawn += 1
        closure = self._task.draw(model, data_seed(self._seed, 0, self._peer_id, self._n_drawn))
        self.n_tokens = self._task.n_tokens
        return closure

    def model(self) -> nn.Module:
        return self._task.model()

    def init(self, name: str, shape: tuple[int, ...]) -> Init:
        return self._task.init(name, shape)

    def held_out(self) -> bytes | None:
        return self._task.held_out()

    def corpus(self) -> bytes | None:
        return self._task.corpus()

    def load(self, corpus: bytes | None, held_out: bytes | None) -> None:
        self._task.load(corpus, held_out)

    def evaluate(self, model: nn.Module, rank: int = 0, ranks: int = 1) -> float:
        return self._task.evaluate(model)


class Reader:
    """Applies every commit and evaluates on the way. Nobody waits for it."""

    def __init__(
        self,
        link: LocalLink,
        body: GenesisBody,
        import_path: str | None,
        *,
        every: int,
        n_peers: int,
        samples_per_step: int,
        is_alone: bool = False,
        to_neighbours: Callable[[int], int] = lambda _round: 0,
    ) -> None:
        """`every`: rounds between evaluations; `is_alone`: what the one peer offers goes nowhere;
        `to_neighbours`: bytes that all peers have sent to neighbours, up to a round."""
        self.link, self.curve = link, list[Point]()
        self._every, self._n_peers, self._samples_per_step = every, n_peers, samples_per_step
        self._samples = self._tokens = self._payload_bytes = 0
        self._body, self._is_alone, self._to_neighbours = body, is_alone, to_neighbours
        config = parse_config(body.config)
        self._rounds = config.run.rounds
        self._task = make_task(config.task, import_path, None)
        self.replica: Replica = build_replica(link.run_id, body, self._task)
        self._work = LocalWork(self.replica, self._task)

    @property
    def held_out(self) -> float | None:
        return self.curve[-1].held_out if self.curve else None

    def run(self) -> None:
        self._task.load(self._fetched(self._body.corpus), self._fetched(self._body.held_out))
        self.replica.begin(self._fetched(self._body.base))
        self._needs_after(0)
        self._evaluate()
        for commit in self.link.commits(0):
            self._apply(commit)
            if self.replica.round == self._rounds:
                break

    def _apply(self, commit: Commit) -> None:
        self.replica.apply(commit, self.link.payload, offered=False)
        self._samples += sum(offer.n_samples for offer in commit.body.offers)
        self._tokens += sum(offer.n_tokens for offer in commit.body.offers)
        self._payload_bytes += 0 if self._is_alone else sum(offer.n_bytes for offer in commit.body.offers)
        if self.replica.round % self._every == 0 or self.replica.round == self._rounds:
            self._evaluate()
        self._needs_after(self.replica.round)

    def _needs_after(self, round_: int) -> None:
        """Payloads of later rounds are kept until this replica has applied them."""
        self.link.state(NodeState.JOINING, needs_after=round_)

    def _evaluate(self) -> None:
        sent_bytes = self._payload_bytes + self._to_neighbours(self.replica.round)
        held_out = self._work.evaluate()
        if not isfinite(held_out):
            raise ReplicaDiverged(f"the held-out loss is non-finite after round {self.replica.round}")
        self.curve.append(
            Point(
                round=self.replica.round,
                steps=self._samples / self._n_peers / self._samples_per_step,
                tokens=self._tokens / self._n_peers,
                payload_bytes=sent_bytes / self._n_peers,
                held_out=held_out,
            )
        )

    def _fetched(self, blob: BlobRef | None) -> bytes | None:
        return None if blob is None else self.link.fetch(blob.digest, blob.n_bytes)
