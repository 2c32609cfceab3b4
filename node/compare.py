"""`thinwire compare`: strategies one after another on the same data, each in a swarm of threads.

The n-th micro-batch of a peer is the same one whatever the strategy, and so are the initial weights and the
held-out data. The held-out loss is measured by a reader: a peer that applies the ledger and never trains.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import nn

from thinwire.compression.errors import ConfigError, ThinwireError
from thinwire.coordinator.board import finite
from thinwire.coordinator.identity import peer_id_of
from thinwire.coordinator.messages import BlobRef, Commit, NodeState, Welcome, digest_of
from thinwire.node.compare_specs import Plan, batches_per_step
from thinwire.node.config import RunConfig, parse_config
from thinwire.node.genesis import Genesis, make_genesis
from thinwire.node.link_local import LocalLink, local_swarm
from thinwire.node.local_work import LocalWork
from thinwire.node.phases import Stopwatch, time_calls, typical
from thinwire.node.replica import Replica, build_replica, data_seed
from thinwire.node.runner import Runner
from thinwire.node.tasks import Init, Task, make_task
from thinwire.optim.base import Closure
from thinwire.optim.registry import build_strategy

PHASES = ("compute", "pack", "decode")
POINTS = 8
"""Evaluations of a strategy, or more if the run's `eval_every` says so."""

KEPT_BYTES = 2**28
"""Payloads that may lie on the disk for one snapshot interval."""

POLL_S = 0.1

Progress = Callable[[Plan, int, float | None], None]
"""Told now and then: the plan, the last round that the reader has applied, the newest held-out loss."""


@dataclass(frozen=True, slots=True)
class Point:
    """The replica after a round: what every peer has done for it (on average), and the held-out loss."""

    round: int
    steps: float
    tokens: float
    payload_bytes: float
    held_out: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """One strategy's training. `phases`: median CPU seconds of a peer in a round. `sent_bytes`: payloads of
    all peers as their links counted them. `error`: why it ended early, then `curve` is what there is."""

    plan: Plan
    curve: tuple[Point, ...]
    phases: dict[str, float]
    sent_bytes: int
    ddp_bytes_per_step: float
    fingerprints: tuple[str, ...]
    seconds: float
    error: str | None = None

    @property
    def has_rounds(self) -> bool:
        """Whether anything was trained and evaluated; else there are no figures."""
        return len(self.curve) > 1

    @property
    def last(self) -> Point:
        return self.curve[-1]

    @property
    def steps_per_round(self) -> float:
        return self.last.steps / self.last.round

    @property
    def payload_bytes_per_peer_round(self) -> float:
        return self.last.payload_bytes / self.last.round

    @property
    def ddp_ratio(self) -> float:
        """What data-parallel training would have sent for as many steps, against what was sent."""
        return self.ddp_bytes_per_step * self.last.steps / self.last.payload_bytes

    def figures(self) -> dict[str, Any]:
        """JSON-able."""
        base = {"strategy": self.plan.label, "options": self.plan.options, "error": self.error}
        if not self.has_rounds:
            return base
        last = self.last
        return {
            **base,
            "rounds": last.round,
            "steps": last.steps,
            "tokens_per_peer": last.tokens,
            "held_out_first": finite(self.curve[0].held_out),
            "held_out_last": finite(last.held_out),
            "payload_bytes_per_peer_round": self.payload_bytes_per_peer_round,
            "payload_bytes_per_peer_step": last.payload_bytes / last.steps,
            "ddp_ratio": self.ddp_ratio,
            "phase_s_per_peer_round": self.phases,
            "fingerprint": self.fingerprints[0] if len(set(self.fingerprints)) == 1 else None,
            "seconds": round(self.seconds, 2),
            "curve": [[p.round, p.steps, p.tokens, p.payload_bytes, finite(p.held_out)] for p in self.curve],
        }


class Comparison:
    """Trains plans of one run. Raises ConfigError, before anything is trained, if one of them cannot be."""

    def __init__(
        self, run: RunConfig, plans: list[Plan], n_peers: int, import_path: str | None = None
    ) -> None:
        self.run, self.plans, self.n_peers, self.import_path = run, plans, n_peers, import_path
        task = make_task(run.task, import_path, None)
        if task.held_out() is None:
            raise ConfigError(
                "the task holds nothing out: without a held-out loss there is nothing to compare"
            )
        self.seed = run.run.seed
        self._n_samples = task.n_samples
        # Nobody else meets this coordinator: a key and a time that are always the same make the run's id, and
        # with it all noise, the same in every execution.
        self.key = Ed25519PrivateKey.from_private_bytes(run.run.seed.to_bytes(32, "little"))
        with torch.device("meta"):
            self._model = task.model()
        self._blobs: dict[bytes, bytes] = {}
        self._geneses = [self._genesis(plan, task) for plan in plans]
        self.n_params = sum(p.numel() for p in self._model.parameters() if p.requires_grad)

    @property
    def samples_per_step(self) -> int:
        """Of each peer."""
        return self._n_samples * batches_per_step(self.run)

    @property
    def ddp_bytes_per_step(self) -> float:
        """A ring all-reduce of the float32 gradients of what is trained, per peer."""
        return 2 * (self.n_peers - 1) / self.n_peers * 4 * self.n_params

    def points_every(self, plan: Plan) -> int:
        """Rounds between two evaluations: the run's `eval_every` in steps, but `POINTS` points at least."""
        run = self.run.run
        return max(1, min(run.eval_every * plan.rounds // run.rounds, plan.rounds // POINTS))

    def train(self, progress: Progress, stopped: Callable[[], bool]) -> Iterator[Outcome]:
        """One outcome after the other; ends early when `stopped`, without the strategy that was under way."""
        for plan, genesis in zip(self.plans, self._geneses, strict=True):
            if stopped():
                return
            with _one_thread(), tempfile.TemporaryDirectory(prefix="thinwire-compare-") as folder:
                outcome = _Training(self, plan, genesis).run(Path(folder), progress, stopped)
            if outcome is None:
                return
            yield outcome

    def _genesis(self, plan: Plan, task: Task) -> Genesis:
        try:
            config = self._config(plan)
            genesis = make_genesis(config, task, peer_id_of(self.key.public_key()), time_ms=0)
        except ConfigError as e:
            raise ConfigError(f"{plan.label}: {e}") from e
        # Base weights and text are the same for all: they are kept once.
        return Genesis(genesis.body, tuple(self._blobs.setdefault(digest_of(b), b) for b in genesis.blobs))

    def _config(self, plan: Plan) -> RunConfig:
        """The run's, with this strategy: warm-up is the same share of it, and every round waits for
        everybody, so that all offers count. Snapshots are written only where payloads would fill the disk."""
        run = self.run
        strategy = build_strategy(plan.options, self._model.named_parameters())
        n_bytes = sum(
            f.n_elements * f.dtype.itemsize for fields in strategy.fields().values() for f in fields
        )
        every = max(1, KEPT_BYTES // (n_bytes * self.n_peers))
        changes: dict[str, dict[str, Any]] = {
            "run": {
                "rounds": plan.rounds,
                "min_peers": self.n_peers,
                "eval_every": plan.rounds,
                "verify_every": min(every, plan.rounds),
                "snapshot_every": every if every < plan.rounds else 2 * plan.rounds,
            },
            "schedule": {"warmup_rounds": round(run.schedule.warmup_rounds * plan.rounds / run.run.rounds)},
            "policy": {"name": "all"},
            "limits": {"max_payload_bytes": 2**32, "max_samples": 2**20, "max_peers": self.n_peers + 1},
        }
        sections = {name: getattr(run, name).model_copy(update=u) for name, u in changes.items()}
        return run.model_copy(update={**sections, "strategy": plan.options})


@contextmanager
def _one_thread() -> Iterator[None]:
    """Peers are threads already, and only what a thread does itself is in its CPU time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Training:
    """One strategy: peers and a reader as threads over a local swarm."""

    def __init__(self, comparison: Comparison, plan: Plan, genesis: Genesis) -> None:
        self.comparison, self.plan, self.genesis = comparison, plan, genesis
        self.error: BaseException | None = None

    def run(self, folder: Path, progress: Progress, stopped: Callable[[], bool]) -> Outcome | None:
        """None: it was stopped."""
        started_s = time.monotonic()
        comparison = self.comparison
        with local_swarm(folder, self.genesis.body, comparison.key, blobs=self.genesis.blobs) as swarm:
            reader = _Reader(self, swarm.link("reader"))
            peers = [_Peer(swarm.link(f"peer-{i}"), comparison) for i in range(comparison.n_peers)]
            for link in (reader.link, *(peer.link for peer in peers)):
                link.open()  # admitted in this order: it is the first one that evaluates round 0
            threads = [
                self._thread(reader.run, "reader"),
                *(self._thread(p.run, p.link.peer_id) for p in peers),
            ]
            while any(thread.is_alive() for thread in threads):
                if stopped() or self.error is not None:
                    reader.link.close()
                    for peer in peers:
                        peer.stop.set()
                        peer.link.close()
                    break
                progress(self.plan, reader.replica.round, reader.held_out)
                time.sleep(POLL_S)
            for thread in threads:
                thread.join()
            sent_bytes = sum(peer.link.traffic().sent.get("payload", 0) for peer in peers)
        if stopped():
            return None
        # A ValueError: there are values that no payload can hold, because training diverged.
        if self.error is not None and not isinstance(self.error, ThinwireError | ValueError):
            raise self.error
        progress(self.plan, reader.replica.round, reader.held_out)
        return Outcome(
            plan=self.plan,
            curve=tuple(reader.curve),
            phases={phase: typical([peer.stopwatch for peer in peers], phase) for phase in PHASES},
            sent_bytes=sent_bytes,
            ddp_bytes_per_step=comparison.ddp_bytes_per_step,
            fingerprints=tuple(
                r.fingerprint().hex() for r in (reader.replica, *(peer.replica for peer in peers))
            ),
            seconds=time.monotonic() - started_s,
            error=None if self.error is None else str(self.error),
        )

    def _thread(self, run: Callable[[], object], name: str) -> threading.Thread:
        def target() -> None:
            try:
                run()
            except BaseException as e:  # noqa: BLE001 - raised, or told, by `run`
                self.error = self.error or e

        thread = threading.Thread(target=target, name=name)
        thread.start()
        return thread


class _Peer(Runner):
    """A node whose batches are the same whatever the strategy, and whose time is taken."""

    def __init__(self, link: LocalLink, comparison: Comparison) -> None:
        super().__init__(link, import_path=comparison.import_path)
        self.stopwatch = Stopwatch()
        self._comparison = comparison

    def _prepare(self, welcome: Welcome) -> None:
        super()._prepare(welcome)
        self.work.task = _SameBatches(self.work.task, self._comparison.seed, self.link.peer_id)
        watch, strategy = self.stopwatch, self.replica.strategy
        if hasattr(strategy, "compressor"):
            time_calls(strategy.compressor, {"pack": "pack", "decode": "decode"}, watch)
        time_calls(strategy, {"propose": "compute", "work_ahead": "compute"}, watch)
        time_calls(self.replica, {"encode": "pack", "apply_batch": "decode"}, watch)
        time_calls(self.link, {"payload": "exchange", "offer": "exchange"}, watch)

    def _propose(self) -> None:
        self.stopwatch.next_round()
        super()._propose()


class _SameBatches:
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


class _Reader:
    """Applies every commit and evaluates on the way. Nobody waits for it."""

    def __init__(self, training: _Training, link: LocalLink) -> None:
        self.link, self.curve = link, list[Point]()
        comparison, body = training.comparison, training.genesis.body
        self._rounds = training.plan.rounds
        self._every = comparison.points_every(training.plan)
        self._n_peers = comparison.n_peers
        self._samples_per_step = comparison.samples_per_step
        self._samples = self._tokens = self._payload_bytes = 0
        self._body = body
        self._task = make_task(parse_config(body.config).task, comparison.import_path, None)
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
        self._payload_bytes += sum(offer.n_bytes for offer in commit.body.offers)
        if self.replica.round % self._every == 0 or self.replica.round == self._rounds:
            self._evaluate()
        self._needs_after(self.replica.round)

    def _needs_after(self, round_: int) -> None:
        """Payloads of later rounds are kept until this replica has applied them."""
        self.link.state(NodeState.JOINING, needs_after=round_)

    def _evaluate(self) -> None:
        held_out = self._work.evaluate()
        self.curve.append(
            Point(
                round=self.replica.round,
                steps=self._samples / self._n_peers / self._samples_per_step,
                tokens=self._tokens / self._n_peers,
                payload_bytes=self._payload_bytes / self._n_peers,
                held_out=held_out,
            )
        )

    def _fetched(self, blob: BlobRef | None) -> bytes | None:
        return None if blob is None else self.link.fetch(blob.digest, blob.n_bytes)
