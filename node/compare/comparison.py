"""`thinwire compare`: strategies one after another on the same data, each in a swarm of threads.

The n-th micro-batch of a peer is the same one whatever the strategy, and so are the initial weights and the
held-out data. The held-out loss is measured by a reader: a peer that applies the ledger and never trains.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from math import inf
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ...compression.errors import ConfigError, ThinwireError
from ...coordinator.protocol.figures import bytes_per_token, ddp_bytes, finite
from ...coordinator.protocol.identity import peer_id_of
from ...coordinator.protocol.messages import digest_of
from ...optim.registry import build_strategy
from ..config import Audits, RunConfig
from ..genesis import Genesis, make_genesis
from ..links.local import LocalSwarm, local_swarm
from ..phases import typical
from ..system.jobs import one_thread
from ..tasks.base import Task, loss_unit_of
from ..tasks.classes import Divisible
from ..tasks.registry import make_task
from ..tasks.shapes import shapes_only
from .nodes import OwnData, Peer, Point, Reader
from .specs import ComparePlan, batches_per_step
from .split import Split, told

PHASES = ("compute", "pack", "decode")
POINTS = 8
"""Evaluations of a strategy, or more if the run's `eval_every` says so."""

KEPT_BYTES = 2**28
"""Payloads of one snapshot interval, which lie on the disk, have no more unless a caller says so."""

POLL_S = 0.1

Progress = Callable[[ComparePlan, int, float | None], None]
"""Told now and then: the plan, the last round that the reader has applied, the newest held-out loss."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One strategy's training. `phases`: median CPU seconds of a peer in a round. `sent_bytes`: payloads of
    all peers as their links counted them; `all_sent_bytes`: with messages. `fingerprints`: in hex, of the
    reader and of every peer in the end. `error`: why it ended early, then `curve` is what there is."""

    plan: ComparePlan
    curve: tuple[Point, ...]
    phases: dict[str, float]
    sent_bytes: int
    all_sent_bytes: int
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
        """The replica when training ended."""
        return self.curve[-1]

    @property
    def steps_per_round(self) -> float:
        """Of data-parallel training, that a round has the samples of."""
        return self.last.steps / self.last.round

    @property
    def payload_bytes_per_peer_round(self) -> float:
        """Mean over all rounds and peers."""
        return self.last.payload_bytes / self.last.round

    @property
    def all_sent_bytes_per_peer_step(self) -> float:
        """With messages, but without what a network's framing adds."""
        return self.all_sent_bytes / (len(self.fingerprints) - 1) / self.last.steps

    @property
    def ddp_ratio(self) -> float:
        """What data-parallel training would have sent for as many steps, against what was sent; infinite for
        one peer alone."""
        ddp = self.ddp_bytes_per_step * self.last.steps
        return ddp / self.last.payload_bytes if self.last.payload_bytes else inf

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
            "all_sent_bytes_per_peer_step": self.all_sent_bytes_per_peer_step,
            "ddp_ratio": finite(self.ddp_ratio),
            "phase_s_per_peer_round": self.phases,
            "fingerprint": self.fingerprints[0] if len(set(self.fingerprints)) == 1 else None,
            "seconds": round(self.seconds, 2),
            "curve": [[p.round, p.steps, p.tokens, p.payload_bytes, finite(p.held_out)] for p in self.curve],
        }


class Comparison:
    """Trains plans of one run. Raises ConfigError, before anything is trained, if one of them cannot be."""

    def __init__(
        self,
        run: RunConfig,
        plans: list[ComparePlan],
        n_peers: int,
        import_path: str | None = None,
        kept_bytes: int = KEPT_BYTES,
        split: Split | None = None,
    ) -> None:
        """`kept_bytes`: of payloads on the disk, before a snapshot takes their place. `split`: how uneven the
        peers' data are; None: each draws from all of them."""
        self.run, self.plans, self.n_peers, self.import_path = run, plans, n_peers, import_path
        self._kept_bytes, self.split = kept_bytes, split
        task = make_task(run.task, import_path, None)
        self.split_told: str | None = None
        self.own_data = self._divided(task)
        held_out = task.held_out()
        if held_out is None:
            raise ConfigError(
                "the task holds nothing out: without a held-out loss there is nothing to compare"
            )
        self.loss_unit = loss_unit_of(task)
        self.bytes_per_token = bytes_per_token(BytesIO(held_out))
        self.seed = run.run.seed
        self._n_samples = task.n_samples
        # Nobody else meets this coordinator: a key and a time that are always the same make the run's id, and
        # with it all noise, the same in every execution.
        self.key = Ed25519PrivateKey.from_private_bytes(run.run.seed.to_bytes(32, "little"))
        with shapes_only():
            self._model = task.model()
        self._blobs: dict[bytes, bytes] = {}
        self._geneses = [self._genesis(plan, task) for plan in plans]
        self.n_params = sum(p.numel() for p in self._model.parameters() if p.requires_grad)

    def alike(self, plan: ComparePlan, seed: int) -> Comparison:
        """Of one plan, from a seed that is so much further than the run's."""
        seeded = self.run.run.model_copy(update={"seed": self.seed + seed})
        run = self.run.model_copy(update={"run": seeded})
        return Comparison(run, [plan], self.n_peers, self.import_path, self._kept_bytes, self.split)

    def _divided(self, task: Task) -> list[OwnData | None]:
        """What each peer trains on; the task holds out some of every class from now on."""
        if self.split is None:
            return [None] * self.n_peers
        if not isinstance(task, Divisible):
            raise ConfigError(
                f"--split {self.split}: the task does not say what its classes are: it has no divide "
                f"(see thinwire.node.tasks.classes)"
            )
        classes = task.divide(self.split.n_sections(self.n_peers))
        pieces = self.split.pieces(classes.sizes, self.n_peers, self.run.run.seed)
        self.split_told = told(self.split, classes, pieces)
        return [(classes.taken(some), classes.held_out) for some in pieces]

    @property
    def elsewhere(self) -> Callable[[ComparePlan, int], Outcome]:
        """Trains as `alike` does, also in another process."""
        return partial(_trained_elsewhere, self.run, self.n_peers, self.import_path, self._kept_bytes)

    def peers_of(self, plan: ComparePlan) -> int:
        return 1 if plan.is_alone else self.n_peers

    @property
    def samples_per_step(self) -> int:
        """Of each peer."""
        return self._n_samples * batches_per_step(self.run)

    @property
    def ddp_bytes_per_step(self) -> float:
        """A ring all-reduce of the float32 gradients of what is trained, per peer."""
        return ddp_bytes(self.n_peers, self.n_params)

    def points_every(self, plan: ComparePlan) -> int:
        """Rounds between two evaluations: the run's `eval_every` in steps, but `POINTS` points at least."""
        run = self.run.run
        return max(1, min((run.eval_every or run.rounds) * plan.rounds // run.rounds, plan.rounds // POINTS))

    def train(self, progress: Progress, stopped: Callable[[], bool]) -> Iterator[Outcome]:
        """One outcome after the other; ends early when `stopped`, without the strategy that was under way."""
        for plan, genesis in zip(self.plans, self._geneses, strict=True):
            if stopped():
                return
            with one_thread(), tempfile.TemporaryDirectory(prefix="thinwire-compare-") as folder:
                outcome = _Training(self, plan, genesis).run(Path(folder), progress, stopped)
            if outcome is None:
                return
            yield outcome

    def _genesis(self, plan: ComparePlan, task: Task) -> Genesis:
        try:
            config = self._config(plan)
            genesis = make_genesis(config, task, peer_id_of(self.key.public_key()), time_ms=0)
        except ConfigError as e:
            raise ConfigError(f"{plan.label}: {e}") from e
        # Base weights and text are the same for all: they are kept once.
        return Genesis(genesis.body, tuple(self._blobs.setdefault(digest_of(b), b) for b in genesis.blobs))

    def _config(self, plan: ComparePlan) -> RunConfig:
        """The run's, with this strategy: warm-up is the same share of it, and every round waits for
        everybody, so that all offers count. Snapshots are written only where payloads would fill the disk."""
        run = self.run
        strategy = build_strategy(plan.options, self._model.named_parameters())
        n_bytes = sum(
            f.n_elements * f.dtype.itemsize for fields in strategy.fields().values() for f in fields
        )
        n_peers = self.peers_of(plan)
        every = max(1, self._kept_bytes // (n_bytes * n_peers))
        changes: dict[str, dict[str, Any]] = {
            "run": {
                "rounds": plan.rounds,
                "min_peers": n_peers,
                "eval_every": plan.rounds,
                "verify_every": min(every, plan.rounds),
                "snapshot_every": every if every < plan.rounds else 2 * plan.rounds,
            },
            "schedule": {"warmup_rounds": round(run.schedule.warmup_rounds * plan.rounds / run.run.rounds)},
            "policy": {"name": "all", "every_s": None},
            "limits": {"max_payload_bytes": 2**32, "max_samples": 2**20, "max_peers": n_peers + 1},
        }
        sections = {name: getattr(run, name).model_copy(update=u) for name, u in changes.items()}
        no_audits = Audits(rate=0.0)  # they would draw batches that are not the strategies' own
        return run.model_copy(update={**sections, "strategy": plan.options, "audits": no_audits})


def _trained_elsewhere(
    run: RunConfig, n_peers: int, import_path: str | None, kept_bytes: int, plan: ComparePlan, seed: int
) -> Outcome:
    comparison = Comparison(run, [plan], n_peers, import_path, kept_bytes).alike(plan, seed)
    return next(comparison.train(lambda _plan, _round, _held_out: None, lambda: False))


class _Training:
    """One strategy: peers and a reader as threads over a local swarm."""

    def __init__(self, comparison: Comparison, plan: ComparePlan, genesis: Genesis) -> None:
        self.comparison, self.plan, self.genesis = comparison, plan, genesis
        self.error: BaseException | None = None

    def run(self, folder: Path, progress: Progress, stopped: Callable[[], bool]) -> Outcome | None:
        """None: it was stopped. Raises what a thread raised, unless it says that training diverged."""
        started_s = time.monotonic()
        genesis = self.genesis
        with local_swarm(folder, genesis.body, self.comparison.key, blobs=genesis.blobs) as swarm:
            reader, peers = self._nodes(swarm)
            self._train(reader, peers, progress, stopped)
            sent: Counter[str] = Counter()
            for peer in peers:
                sent.update(peer.link.traffic().sent)
        if stopped():
            return None
        # A ValueError: there are values that no payload can hold, because training diverged.
        if self.error is not None and not isinstance(self.error, ThinwireError | ValueError):
            raise self.error
        progress(self.plan, reader.replica.round, reader.held_out)
        return self._outcome(reader, peers, sent, time.monotonic() - started_s)

    def _nodes(self, swarm: LocalSwarm) -> tuple[Reader, list[Peer]]:
        """With open links."""
        comparison, n_peers = self.comparison, self.comparison.peers_of(self.plan)
        links = [swarm.link(f"peer-{i}") for i in range(n_peers)]
        reader = Reader(
            swarm.link("reader"),
            self.genesis.body,
            comparison.import_path,
            every=comparison.points_every(self.plan),
            n_peers=n_peers,
            samples_per_step=comparison.samples_per_step,
            is_alone=self.plan.is_alone,
            to_neighbours=lambda round_: sum(link.sent_to_neighbours(round_) for link in links),
        )
        peers = [
            Peer(link, comparison.import_path, comparison.seed, own)
            for link, own in zip(links, comparison.own_data, strict=False)
        ]
        for link in (reader.link, *(peer.link for peer in peers)):
            link.open()  # admitted in this order: it is the first one that evaluates round 0
        return reader, peers

    def _train(
        self, reader: Reader, peers: Sequence[Peer], progress: Progress, stopped: Callable[[], bool]
    ) -> None:
        """Until all have ended, each in its thread; they are made to when one fails or it is `stopped`."""
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

    def _outcome(self, reader: Reader, peers: Sequence[Peer], sent: Counter[str], seconds: float) -> Outcome:
        replicas = (reader.replica, *(peer.replica for peer in peers))
        return Outcome(
            plan=self.plan,
            curve=tuple(reader.curve),
            phases={phase: typical([peer.stopwatch for peer in peers], phase) for phase in PHASES},
            sent_bytes=0 if self.plan.is_alone else sent["payload"] + sent["gossip"],
            all_sent_bytes=0 if self.plan.is_alone else sent.total(),
            ddp_bytes_per_step=self.comparison.ddp_bytes_per_step,
            fingerprints=tuple(replica.fingerprint().hex() for replica in replicas),
            seconds=seconds,
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
