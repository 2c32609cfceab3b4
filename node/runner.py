"""The node's loop, one for live rounds and for catching up: for every commit, apply and report;
if it was the newest one, propose and offer.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path

import torch

from ..compression.errors import ReplicaDiverged, SwarmUnreachable
from ..coordinator.protocol.figures import ddp_bytes, mean_loss
from ..coordinator.protocol.messages import (
    BlobRef,
    Commit,
    GenesisBody,
    NodeState,
    Offer,
    OfferEntry,
    Report,
    Welcome,
)
from ..optim.base import Own
from .batches import batches
from .config import RunConfig, parse_config
from .healing import Healer
from .history import History
from .joining import CatchingUp, Joiner
from .links.base import Link
from .local_work import LocalWork
from .precision import Precision
from .ranks.leader import Leader
from .replica import Replica, build_replica
from .result import Result
from .snapshots.format import Stored
from .snapshots.store import SnapshotStore
from .snapshots.writer import SnapshotWriter
from .tasks.registry import make_task
from .tracking.metrics import NodeMetrics
from .tracking.records import Records
from .tracking.trackers import Tracks
from .units import human_bytes
from .workload import Workload

log = logging.getLogger("thinwire.node")


class PayloadGone(SwarmUnreachable):
    """Nobody has a payload that the ledger counted: a snapshot of a later round is needed."""


class Runner:
    """One node in one run, from `open` to the last round.

    `import_path` and `data` come from the user's own command line (see `tasks.make_task`). `folder`: where
    snapshots are kept, to be resumed from and served; None: a temporary one. `stop` may be set from any
    thread (or a signal handler): the node leaves the swarm cleanly. `lead`: the node has several ranks, this
    is rank 0's. `tracks`: where records of the run go; whoever opened them closes them.
    """

    def __init__(
        self,
        link: Link,
        *,
        import_path: str | None = None,
        data: Path | None = None,
        device: str = "cpu",
        folder: Path | None = None,
        metrics: NodeMetrics | None = None,
        clock: Callable[[], float] = time.monotonic,
        precision: Precision = "auto",
        leader: Leader | None = None,
        tracks: Tracks | None = None,
    ) -> None:
        self.link = link
        self.folder = folder
        self.import_path = import_path
        self.data = data
        self.device = torch.device(device)
        self.metrics = metrics or NodeMetrics()
        self.stop = threading.Event()
        self._clock = clock
        self._leader = leader
        self._records = Records(tracks or Tracks(self.metrics), self.metrics, link.traffic)
        self._precision = precision
        self._workload: Workload | None = None
        self._offered_round = 0
        self._is_joining = self._is_replay = True
        self._came_s = clock()
        self._applied_s: float | None = None
        self._offered_s: float | None = None
        self._fetched_s = 0.0
        self._n_parameters = 0
        self._counted = self._missed = self._n_offers = self._payload_bytes = 0
        self._held_out: list[tuple[int, float]] = []

    # ------------------------------------------------------------------------------------------ the run

    def run(self) -> Result:
        """Raises what `Link.open` and `Link.commits` raise, Incompatible, ConfigError, NoStart and
        ReplicaDiverged."""
        welcome = self.link.open()
        self._prepare(welcome)
        with self._snapshots():
            try:
                self._joiner.read_ledger()
                self._begin()
                self._record_start()
                while self._follow():
                    pass
            finally:
                self.metrics.training(False)
                self._records.event("end", self.replica.round, counted=self._counted, missed=self._missed)
                self.link.state(NodeState.LEAVING)
        return self.result()

    def request_stop(self) -> None:
        """Safe in a signal handler: leaves the swarm after what is being computed right now."""
        self.stop.set()
        threading.Thread(target=self.link.close, name="leave", daemon=True).start()

    def _prepare(self, welcome: Welcome) -> None:
        """Task, model, strategy; nothing is downloaded before the layout was compared."""
        body: GenesisBody = welcome.body
        self.genesis = body
        self.config: RunConfig = parse_config(body.config)
        self.peer_index = welcome.peer_index
        task = make_task(self.config.task, self.import_path, self.data)
        run_id, peer_id, leader = self.link.run_id, self.link.peer_id, self._leader
        if leader is None:
            self.replica: Replica = build_replica(run_id, body, task, peer_id, self.device)
        else:
            self.replica = leader.replica(run_id, body, peer_id, task)
        strategy = self.replica.strategy
        texts = self._download(body.corpus, "text"), self._download(body.held_out, "held-out text")
        task.load(*texts)
        if leader is None:
            self.work = LocalWork(self.replica, task, self._precision)
        else:
            self.work = leader.work(self.replica, task, texts)
        if self.config.work.round_s > 0:
            most = min(strategy.most_batches, max(1, body.limits.max_samples // task.n_samples))
            self._workload = Workload(self.config.work.round_s, most)
        self._welcome = welcome
        self.history = History.of(self.replica, self.config.run.snapshot_every)
        n_parameters = sum(p.tensor.numel() for p in strategy.parameters_in_order())
        self._n_parameters = sum(prod(entry.shape) for entry in body.layout)
        self.metrics.behind(lambda: max(0, self.link.head - self.replica.round))
        log.info(
            "run %s: %d parameters, strategy %s, %d rounds, peer %d",
            *(self.config.run.name, n_parameters, self.config.strategy["name"], self.config.run.rounds),
            self.peer_index,
        )

    def _download(self, blob: BlobRef | None, what: str) -> bytes | None:
        if blob is None:
            return None
        log.info("fetching the %s (%s)", what, human_bytes(blob.n_bytes))
        return self.link.fetch(blob.digest, blob.n_bytes)

    @contextmanager
    def _snapshots(self) -> Iterator[None]:
        """The store, the writer and who uses them; in the end the replica is written once more."""
        with ExitStack() as stack:
            if self.folder is None:
                temporary = tempfile.TemporaryDirectory(prefix="thinwire-node-")
                folder = Path(stack.enter_context(temporary))
            else:
                folder = self.folder
            self.store = SnapshotStore(folder / "snapshots", self.link.run_id)
            self._writer = SnapshotWriter(self.store, self._stored)
            self._joiner = Joiner(
                *(self.link, self.replica, self.store, self.history),
                base=self._welcome.body.base,
                kept_from=self._welcome.kept_from,
                stopped=self.stop.is_set,
            )
            self._healer = Healer(
                *(self.link, self.replica, self.history, self._joiner),
                peer_index=self.peer_index,
                device=self.device,
                discard=self._discard_snapshots,
            )
            try:
                yield
                if self.folder is not None:
                    self._write_snapshot()
            finally:
                self.link.serve(None)
                self._writer.close()

    def _begin(self) -> None:
        """Brings the replica to the cheapest start."""
        self._give_up_offer()
        self._is_joining, self._is_replay = True, False
        start = self._joiner.begin()
        self._is_replay = start.is_trusted
        self._catching_up = CatchingUp(self.replica.round)
        self.link.serve(self.store)
        if start.kind == "swarm":
            self._announce(self.store.stored()[-1])

    # -------------------------------------------------------------------------------------- the ledger

    def _follow(self) -> bool:
        """Applies commits until the run ends or is stopped; True: the replica was moved to another round."""
        if self.replica.round >= self.link.head:
            self._arrive()
        if self._is_over():
            self._report(evaluate=False)
            return False
        for commits in batches(self._commits(), self.replica.strategy, _Ends(self)):
            if self.stop.is_set():
                return False
            if not self._applied(commits) or self._look_around(commits[-1]):
                return True
            if self._is_over():
                return False
        return False

    def _commits(self) -> Iterator[Commit]:
        for commit in self.link.commits(self.replica.round):
            self.history.add(commit)
            self._came_s = self._clock()
            yield commit

    def _applied(self, commits: list[Commit]) -> bool:
        """False: they could not be applied, and the replica was moved to another round."""
        try:
            self._apply(commits)
        except PayloadGone as e:
            log.warning("%s", e)
            self._joiner.payloads_gone(self.replica.round + 1)
            self._joiner.read_ledger()
            self._begin()
            return False
        except ReplicaDiverged as e:
            self._start_over(e)
            return False
        return True

    def _look_around(self, commit: Commit) -> bool:
        """What there is to do after a commit was applied; True: the replica was moved to another round."""
        at_head = self._is_at_head()
        self._report(evaluate=commit.body.evaluator == self.peer_index and at_head)
        if self.replica.round % self.history.every == 0 and self._is_near(self.history.every):
            self._write_snapshot()
        if not at_head:
            return self._is_joining and self._jump()
        if rounds := self._healer.due():
            self._is_joining = True
            self.metrics.training(False)
            was_wrong = self._healer.check(rounds)
            self._count_replay(was_wrong)
            if was_wrong:
                self._go_on_from_replay()
                return True
        if self._is_at_head():  # a check takes its time
            self._arrive()
        return False

    def _arrive(self) -> None:
        """The replica is at the head of the ledger: this node trains."""
        if self._is_over():
            return
        if self._is_joining:
            self.link.state(NodeState.TRAINING)
            self.link.serve(self.store)
            self.metrics.training(True)
            self._applied_s = None
        self._is_joining = self._is_replay = False
        if self.replica.round == 0:
            self._report(evaluate=self.peer_index == 0)
        self._propose()

    def _jump(self) -> bool:
        """Says how far behind the replica is; True: it took a newer snapshot that is nearer to the head."""
        if not self._catching_up.tell(self.replica.round, self.link.head):
            return False
        self._joiner.read_ledger()
        if not self._joiner.is_worth_it():
            return False
        log.info("a newer snapshot is nearer to the head: taking that one")
        self._begin()
        return True

    def _start_over(self, error: ReplicaDiverged) -> None:
        """Applying a commit failed: a replay shows whether it was this machine. Raises the error if not."""
        if self._is_replay:
            raise error
        log.error("%s; replaying the ledger to see whether this machine was wrong", error)
        self._joiner.begin(lambda: self._joiner.trusted_starts(self.link.head), with_local_state=False)
        self._discard_snapshots(self.replica.round)
        self._count_replay(was_wrong=True)
        self._go_on_from_replay()

    def _go_on_from_replay(self) -> None:
        """The replica is at an earlier round: what this node offered since was settled already."""
        self._give_up_offer()
        self._is_joining, self._is_replay = True, True
        self._catching_up = CatchingUp(self.replica.round)

    def _give_up_offer(self) -> None:
        """The replica goes to another round: what was offered for the open one is not settled any more."""
        if self._offered_s is not None:
            self.metrics.not_counted("given_up")
        self._offered_round, self._offered_s = 0, None
        self.metrics.training(False)

    def _is_over(self) -> bool:
        return self.replica.round == self.config.run.rounds

    def _is_at_head(self) -> bool:
        return self._is_near(1)

    def _is_near(self, n_rounds: int) -> bool:
        """Whether fewer than `n_rounds` commits are known that the replica has not applied."""
        return self.link.head - self.replica.round < n_rounds

    def is_due(self, round_: int) -> bool:
        """Whether fingerprints of this round are compared."""
        return round_ > 0 and (round_ % self.config.run.verify_every == 0 or round_ == self.config.run.rounds)

    # --------------------------------------------------------------------------------------- snapshots

    def _write_snapshot(self) -> None:
        """Training goes on when the tensors are copied; what is on disk is announced."""
        if self.replica.round == 0 or any(s.round == self.replica.round for s in self.store.stored()):
            return
        self.replica.write_snapshot(self._writer)

    def _stored(self, stored: Stored) -> None:
        """A snapshot is on the disk; called by the writer's thread."""
        if stored.round % self.history.every == 0:
            self._announce(stored)

    def _announce(self, stored: Stored) -> None:
        self.link.report(Report(round=stored.round, snapshot=stored.manifest, snapshot_bytes=stored.n_bytes))

    def _discard_snapshots(self, after: int) -> None:
        """What this node has written after this round may be wrong, unless others have it, too: it is taken
        back."""
        for stored in self.store.stored():
            if stored.round > after and not self.history.is_shared(stored.manifest):
                self.store.discard(stored)
                self.link.report(Report(round=stored.round, snapshot=stored.manifest, snapshot_bytes=0))

    # ------------------------------------------------------------------------------------------ one round

    def _propose(self) -> None:
        """This replica is at the head of the ledger: local work and an offer for the next round."""
        started_s = self._clock()
        allotted = None if self._workload is None else self._workload.allotment()
        proposal = self.work.propose(allotted)
        duration_s = self._clock() - started_s
        self._offered_round = proposal.round
        self._n_offers += 1
        self._payload_bytes += len(proposal.payload)
        self.metrics.proposed(
            proposal.loss, len(proposal.payload), proposal.n_samples, proposal.n_tokens, proposal.n_batches
        )
        self._records.proposed(proposal)
        self.metrics.not_finite(self.replica.strategy.counters)
        self.metrics.phase("compute", proposal.compute_s)
        self.metrics.phase("pack", proposal.pack_s)
        if self._workload is not None and allotted is not None:
            if self.replica.round > 0:
                self._workload.began(started_s - self._came_s)
            self._workload.worked(proposal.n_batches, duration_s)
            speed = self.link.traffic().upload_bytes_per_s
            self._workload.sent(len(proposal.payload), allotted.share, speed)
        self.link.offer(
            Offer(
                round=proposal.round,
                n_samples=proposal.n_samples,
                n_tokens=proposal.n_tokens,
                loss=proposal.loss,
                n_bytes=len(proposal.payload),
                payload=proposal.payload,
                digest=None,
            )
        )
        self._offered_s = self._clock()
        self._work_ahead(proposal.round)

    def _work_ahead(self, round_: int) -> None:
        """What the strategy can do for the next round while the commit of this one has not come."""
        is_last = round_ == self.config.run.rounds
        while not is_last and self._is_at_head() and not self.stop.is_set():
            started_s = time.monotonic()
            if not self.work.work_ahead():
                return
            self.metrics.phase("ahead", time.monotonic() - started_s)

    def _apply(self, commits: list[Commit]) -> None:
        """One live commit, or several older ones."""
        last = commits[-1].body
        started_s, self._fetched_s = self._clock(), 0.0
        owns = self.replica.apply_batch(commits, self._payload, offered={self._offered_round})
        own = next((own for own in owns if own is not None), None)  # one offer at most is under way
        self._counted += own == "counted"
        self._missed += own == "missed"
        round_s = self._count_round(commits, owns, started_s)
        loss = mean_loss(last)
        log.info(
            "round %d/%d: %d offers, loss %s%s",
            *(self.replica.round, self.config.run.rounds, len(last.offers)),
            "-" if loss is None else f"{loss:.4f}",
            ", ours came too late" if own == "missed" else "",
        )
        self._records.applied(commits, own, round_s)

    def _record_start(self) -> None:
        self._records.event(
            "start",
            self.replica.round,
            run=self.config.run.name,
            run_id=self.link.run_id.hex(),
            peer_id=self.link.peer_id,
            parameters=self._n_parameters,
            config=self.config.model_dump(mode="json"),
        )

    def _count_replay(self, was_wrong: bool) -> None:
        self.metrics.replayed(was_wrong)
        self._records.event("replay", self.replica.round, was_wrong=was_wrong)

    def _count_round(self, commits: list[Commit], owns: list[Own], started_s: float) -> float | None:
        """What metrics say of the rounds that were just applied. Returns how long the live round took."""
        now_s, metrics = self._clock(), self.metrics
        for commit, own in zip(commits, owns, strict=True):
            metrics.result(own or "none")
            if own == "missed":
                is_here = any(offer.peer == self.peer_index for offer in commit.body.offers)
                metrics.not_counted("bad_payload" if is_here else "late")
        metrics.phase("apply", now_s - started_s - self._fetched_s)
        if self._offered_s is not None:
            metrics.phase("exchange", max(0.0, self._came_s - self._offered_s) + self._fetched_s)
            self._offered_s = None
        is_live = self._applied_s is not None and len(commits) == 1
        round_s = now_s - (self._applied_s or 0.0) if is_live else None
        metrics.round(self.replica.round, round_s)
        self._applied_s = None if self._is_joining else now_s
        metrics.traffic(self.link.traffic())
        metrics.bad_payloads(self.replica.bad)
        n_peers = len(commits[-1].body.offers)
        if n_peers > 1 and self._payload_bytes:
            data_parallel = ddp_bytes(n_peers, self._n_parameters)
            metrics.compression(data_parallel * self._n_offers / self._payload_bytes)
        return round_s

    def _payload(self, offer: OfferEntry) -> bytes:
        started_s = self._clock()
        try:
            return self.link.payload(offer)
        except SwarmUnreachable as e:
            if self.stop.is_set():
                raise
            raise PayloadGone(f"a counted payload of peer {offer.peer} cannot be had: {e}") from e
        finally:
            self._fetched_s += self._clock() - started_s

    def _report(self, evaluate: bool) -> None:
        """The fingerprint when it is due, the held-out loss when this node is asked to measure it."""
        round_ = self.replica.round
        takes_back = self._is_replay and self._healer.said(round_)
        is_news = (
            takes_back or self._is_near(self.config.run.verify_every) or self.history.verdicts.differs(round_)
        )
        told = self.is_due(round_) and is_news
        fingerprint = self._healer.fingerprint(checked=self._is_replay) if told else None
        held_out = self._evaluate() if evaluate else None
        if fingerprint is None and held_out is None:
            return
        if fingerprint is not None:
            self.metrics.fingerprint_reported()
        checked = self._is_replay and told
        self.link.report(Report(round=round_, fingerprint=fingerprint, checked=checked, held_out=held_out))

    def _evaluate(self) -> float:
        loss = self.work.evaluate()
        self._held_out.append((self.replica.round, loss))
        self.metrics.held_out(loss)
        self._records.event("held_out", self.replica.round, loss=loss)
        log.info("round %d: held-out loss %.4f", self.replica.round, loss)
        return loss

    def result(self) -> Result:
        traffic = self.link.traffic()
        return Result(
            rounds=self.replica.round,
            fingerprint=self.replica.fingerprint().hex(),
            held_out=tuple(self._held_out),
            sent_bytes=sum(traffic.sent.values()),
            received_bytes=sum(traffic.received.values()),
            payload_bytes=self._payload_bytes,
            counted=self._counted,
            missed=self._missed,
        )


class _Ends(Container[int]):
    """Rounds at which a batch of commits ends: the newest one, and those with a duty."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def __contains__(self, round_: object) -> bool:
        assert isinstance(round_, int)
        return round_ >= self._runner.link.head or self._runner.is_due(round_)


def follow_events(link: Link) -> threading.Thread:
    """Logs what the link waits for until it is closed."""

    def pump() -> None:
        for event in link.events():
            log.log(logging.WARNING if event.warning else logging.INFO, "%s", event.text)

    thread = threading.Thread(target=pump, name="events", daemon=True)
    thread.start()
    return thread
