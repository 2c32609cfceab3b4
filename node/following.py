"""A node's way along the ledger, one loop for live rounds and for catching up: for every commit, apply and
report; where it was the newest one, propose.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Generator, Iterator
from enum import Enum

from ..compression.errors import ReplicaDiverged, SwarmUnreachable
from ..coordinator.protocol.figures import RoundLines, counted, human_seconds, mean_loss
from ..coordinator.protocol.messages import Commit, NodeState, OfferEntry
from ..coordinator.protocol.settings import Course
from ..coordinator.protocol.trust.governing import told_of_seats
from .auditing.auditor import Auditor
from .batches import batches
from .healing import Healer
from .joining import CatchingUp, Joiner, NoStart, Start
from .links.base import Link
from .preparing import PreparedRun
from .proposing import Proposer
from .reporting import Reporter
from .snapshots.publishing import SnapshotPublisher
from .tracking.observer import Applied, Observer
from .tracking.pace import Pace
from .trust.start_check import StartCheck

log = logging.getLogger("thinwire.node")


class PayloadGone(SwarmUnreachable):
    """Nobody has a payload that the ledger counted: a snapshot of a later round is needed."""


class Stage(Enum):
    """How a replica is on its way to the head of the ledger."""

    CATCHING_UP = "catching up"
    """It is behind, and began at a snapshot of this node's own."""

    REPLAYING = "replaying"
    """It is behind, and began where a fault of this machine's would have shown: what comes out needs no
    check."""

    TRAINING = "training"
    """It has reached the head, and this node takes part in rounds."""


class LedgerFollower:
    """Brings a replica to the head of the ledger and keeps it there.

    `publisher`: of own snapshots; `check`: of where the replica began. `clock`: in seconds; `since_s`: when
    this node began, by that clock. `stopped`: whether this node is to leave the run. `on_proposing` is called
    before each local work.
    """

    def __init__(
        self,
        run: PreparedRun,
        *,
        joiner: Joiner,
        healer: Healer,
        check: StartCheck,
        publisher: SnapshotPublisher,
        observer: Observer,
        clock: Callable[[], float],
        since_s: float,
        stopped: Callable[[], bool],
        on_proposing: Callable[[], object],
    ) -> None:
        self._run, self._link, self._replica = run, run.link, run.replica
        self._joiner, self._healer, self._publisher = joiner, healer, publisher
        self._check = check
        self._observer, self._clock, self._stopped = observer, clock, stopped
        self._on_proposing = on_proposing
        self._proposer = Proposer(run, observer, clock, stopped)
        self._reporter = Reporter(run, healer, observer)
        self._auditor = Auditor(run, observer)
        self._round_lines = RoundLines()
        self._stage = Stage.CATCHING_UP
        self._is_at_base = run.replica.round == 0
        """Whether no offer has been applied yet."""
        self._catching_up = CatchingUp(run.replica.round)
        self._pace = Pace()
        self._came_s = since_s
        """When the last commit came; before the first one, when this node began."""

    def follow(self) -> Iterator[Applied | None]:
        """From the cheapest start to the last round, or until this node is stopped; as an iterator, so that
        its owner can do something of its own between rounds, when the model is the replica.

        Gives what was applied, when this node's offer for the next round is under way; None when the head of
        the ledger is reached, before the first offer. Raises what `Link.commits` and `Joiner.begin` raise,
        Incompatible and ReplicaDiverged."""
        self._joiner.read_ledger()
        self._tell_if_over()
        self._begin()
        self._observer.started(self._replica.round)
        while (yield from self._follow()):
            pass

    def _tell_if_over(self) -> None:
        history = self._run.history
        course = Course.of(self._run.genesis.config, history.changes_at(history.round))
        if course.run.is_over(history.round):
            log.info(
                "the run is over after round %d: this node fetches its weights, and trains nothing",
                history.round,
            )

    def _begin(self) -> None:
        """Brings the replica to the cheapest start."""
        self._stop_training()
        start = self._check.begin()
        self._began(start, is_replay=start.is_proof)
        self._link.serve(self._publisher.store)
        if start.kind == "swarm" and self._joiner.stored is not None:
            self._publisher.announce(self._joiner.stored)

    def _began(self, start: Start, *, is_replay: bool) -> None:
        self._stage = Stage.REPLAYING if is_replay else Stage.CATCHING_UP
        self._auditor.forget()
        self._is_at_base = self._replica.round == 0
        self._catching_up = CatchingUp(self._replica.round)
        self._publisher.began(self._joiner.stored, is_verified=start.is_trusted)
        self._check.began(start)

    def _follow(self) -> Generator[Applied | None, None, bool]:
        """Applies commits until the run ends or is stopped; True: the replica was moved to another round."""
        run = self._run
        if self._replica.round >= self._link.head:
            yield from self._arrive()
        if run.is_over:
            self._report(evaluate=False)
            return False
        for commits in batches(self._commits(), self._replica.strategy, _Ends(run)):
            if self._stopped():
                return False
            changes_weights = any(commit.body.offers for commit in commits)
            if changes_weights and self._is_to_measure_base():  # the others began without this node
                self._reporter.evaluate()
            applied = self._applied(commits)
            self._is_at_base &= not changes_weights
            evaluates = commits[-1].body.evaluator == run.peer_index and run.is_at_head
            if applied is None or self._look_around(evaluates):
                return True
            if run.is_at_head:  # a check takes its time
                yield from self._arrive(evaluates)
            yield applied
            if run.is_over:
                return False
        return False

    def _commits(self) -> Iterator[Commit]:
        for commit in self._link.commits(self._replica.round):
            self._run.history.add(commit)
            self._came_s = self._clock()
            yield commit

    def _look_around(self, evaluates: bool) -> bool:
        """What there is to do after a commit was applied; True: the replica was moved to another round.

        `evaluates`: this node is to do so; but for the last round it offers before."""
        run = self._run
        if self._check.is_refuted():
            self._leave_start()
            return True
        at_head = run.is_at_head
        self._report(evaluate=evaluates and run.is_over)
        if self._replica.round % run.history.every == 0 and run.is_near(run.history.every):
            self._publisher.write()
        if not at_head:
            return self._stage is not Stage.TRAINING and self._jump()
        return self._heal()

    def _arrive(self, evaluates: bool = False) -> Iterator[None]:
        """The replica is at the head of the ledger: this node trains, and evaluates meanwhile."""
        if self._run.is_over:
            return
        if self._stage is not Stage.TRAINING:
            yield
            if self._stopped() or not self._run.is_at_head:
                return
            self._link.state(NodeState.TRAINING)
            self._link.serve(self._publisher.store)
            self._observer.training(True)
        self._stage = Stage.TRAINING
        evaluates |= self._is_to_measure_base()
        if self._replica.course.is_paused:
            log.info("the run is paused after round %d: waiting until it goes on", self._replica.round)
            if evaluates:
                self._reporter.evaluate()
            return
        self._on_proposing()
        self._proposer.propose(self._came_s, lambda: self._while_offered(evaluates))

    def _is_to_measure_base(self) -> bool:
        """Whether this node is to evaluate the base weights, for which no commit names anybody."""
        run = self._run
        is_asked = run.given_index == 0 and run.config.run.eval_every > 0
        return is_asked and self._is_at_base and not self._reporter.has_evaluated

    def _while_offered(self, evaluates: bool) -> None:
        """What this node does for the others while its own offer is under way."""
        if evaluates:
            self._reporter.evaluate()
        self._auditor.audit()

    def _jump(self) -> bool:
        """Says how far behind the replica is; True: it took a newer snapshot that is nearer to the head."""
        if not self._catching_up.tell(self._replica.round, self._link.head):
            return False
        self._joiner.read_ledger()
        if not self._check.may_leave() or not self._joiner.is_worth_it():
            return False
        log.info("a newer snapshot is nearer to the head: taking that one")
        self._begin()
        return True

    def _report(self, *, evaluate: bool) -> None:
        is_replay = self._stage is Stage.REPLAYING
        self._reporter.report(
            evaluate=evaluate, is_replay=is_replay, is_proof=is_replay and self._publisher.is_verified
        )

    def _stop_training(self) -> None:
        """The replica goes to another round; an open offer is nothing to wait for any more."""
        self._proposer.give_up()
        self._observer.training(False)

    # ------------------------------------------------------------------------------------ applying commits

    def _applied(self, commits: list[Commit]) -> Applied | None:
        """None: they could not be applied, and the replica was moved to another round."""
        try:
            return self._apply(commits)
        except PayloadGone as e:
            log.warning("%s", e)
            self._joiner.payloads_gone(self._replica.round + 1)
            self._joiner.read_ledger()
            self._begin()
        except ReplicaDiverged as e:
            self._start_over(e)
        return None

    def _apply(self, commits: list[Commit]) -> Applied:
        """One live commit, or several older ones."""
        last = commits[-1].body.round
        if self._link.head <= last < self._replica.course.n_rounds:
            self._proposer.finish_ahead(commits[-1])
        began_s, offer = self._clock(), self._proposer.open_offer
        payloads = _Payloads(self._link, self._clock, self._stopped)
        self._auditor.coming(commits)
        owns = self._replica.apply_batch(
            commits, payloads.fetch, offered=() if offer is None else {offer.round}
        )
        self._proposer.settled(missed="missed" in owns)
        applied = Applied(
            commits=commits,
            owns=owns,
            offer=offer,
            came_s=self._came_s,
            began_s=began_s,
            ended_s=self._clock(),
            fetched_s=payloads.waited_s,
            is_training=self._stage is Stage.TRAINING,
        )
        self._tell(applied)
        self._observer.applied(applied)
        self._auditor.applied(commits[-1])
        return applied

    def _tell(self, applied: Applied) -> None:
        body = applied.commits[-1].body
        if body.changes:
            told = "; ".join(f"{change.key} = {change.value}" for change in body.changes)
            log.info("the run changes after round %d: %s", body.round, told)
        for text in told_of_seats(body):
            log.info("after round %d: %s", body.round, text)
        if not body.offers:
            return
        n_rounds = self._replica.course.n_rounds
        if applied.is_training:
            self._pace.ended(body.round, applied.came_s)
        n_quiet = self._round_lines.due(self._clock(), body.round >= n_rounds)
        if n_quiet is None:
            return
        loss = mean_loss(body)
        left_s = self._pace.left_s(n_rounds) if body.round < n_rounds else None
        log.info(
            "round %d/%d: %s, loss %s%s%s%s",
            body.round,
            n_rounds,
            counted(len(body.offers), "offer"),
            "-" if loss is None else f"{loss:.4f}",
            ", ours came too late" if applied.own == "missed" else "",
            "" if left_s is None or left_s < 1 else f", about {human_seconds(left_s)} left",
            f" ({n_quiet + 1} rounds since the last line)" if n_quiet else "",
        )

    # -------------------------------------------------------------------------------- when replicas differ

    def _heal(self) -> bool:
        """Checks the replica if it is its turn; True: it was wrong, and is the replay's now."""
        rounds = self._healer.due()
        if not rounds:
            return False
        if self._stage is Stage.TRAINING:
            self._stage = Stage.CATCHING_UP
        self._observer.training(False)
        start = self._healer.check(rounds)
        self._observer.replayed(self._replica.round, start is not None)
        if start is not None:
            self._go_on_from_replay(start)
        return start is not None

    def _start_over(self, error: ReplicaDiverged) -> None:
        """Applying a commit failed: a replay shows whether it was this machine. Raises the error if not."""
        if self._stage is Stage.REPLAYING:
            raise error
        log.error("%s; replaying the ledger to see whether this machine was wrong", error)
        verified = self._publisher.is_verified
        try:
            start = self._joiner.begin(
                lambda: self._joiner.own_starts(self._link.head, verified=verified), with_local_state=False
            )
        except NoStart as e:
            raise ReplicaDiverged(f"{error}. {e}") from error
        self._publisher.discard(start.round)
        self._observer.replayed(self._replica.round, True)
        self._go_on_from_replay(start)

    def _leave_start(self) -> None:
        """What the replica began at was wrong. Raises ReplicaDiverged when there is no other start."""
        try:
            start = self._joiner.begin(
                lambda: self._joiner.trusted_starts(self._link.head), with_local_state=False
            )
        except NoStart as e:
            raise ReplicaDiverged(
                f"this replica began at a snapshot that is wrong, and the payloads of a replay are gone by "
                f"now. Start this node again once the peers that vouched for it are shut out. {e}"
            ) from e
        self._observer.replayed(self._replica.round, True)
        self._go_on_from_replay(start)

    def _go_on_from_replay(self, start: Start) -> None:
        """The replica is at an earlier round: what this node offered since was settled already."""
        self._stop_training()
        self._began(start, is_replay=True)


class _Ends(Container[int]):
    """Rounds at which a batch of commits ends: the newest one, and those with a duty."""

    def __init__(self, run: PreparedRun) -> None:
        self._run = run

    def __contains__(self, round_: object) -> bool:
        assert isinstance(round_, int)
        return round_ >= self._run.link.head or self._run.is_verified(round_)


class _Payloads:
    """Counted payloads of the commits that are being applied; `waited_s`: for all of them, in seconds."""

    def __init__(self, link: Link, clock: Callable[[], float], stopped: Callable[[], bool]) -> None:
        self._link, self._clock, self._stopped = link, clock, stopped
        self.waited_s = 0.0

    def fetch(self, offer: OfferEntry) -> bytes:
        """Raises PayloadGone, and SwarmUnreachable when this node is stopped."""
        began_s = self._clock()
        try:
            return self._link.payload(offer)
        except SwarmUnreachable as e:
            if self._stopped():
                raise
            raise PayloadGone(f"a counted payload of peer {offer.peer} cannot be had: {e}") from e
        finally:
            self.waited_s += self._clock() - began_s
