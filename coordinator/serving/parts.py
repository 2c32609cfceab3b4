"""The parts of a coordinator's service that a restart makes anew, and how they begin."""

from __future__ import annotations

from dataclasses import dataclass

from ..announcer import Announcer
from ..derived_state import DerivedState, Recalled
from ..entry.attendance import Attendance
from ..ledger import Ledger
from ..membership import Membership
from ..observe.notices import Notices
from ..observe.run_view import RunView
from ..open_round import OpenRound
from ..peers import Peers
from ..protocol.settings import Course
from ..quorum.memory import Memory
from ..rounds import Rounds
from ..trust.sentences import Sentences

FAREWELL_S = 60.0
"""After the last round the coordinator serves for at most this long."""


@dataclass(slots=True)
class Parts:
    """`over_s`: when the last round was committed, in monotonic seconds."""

    derived: DerivedState
    members: Membership
    announcer: Announcer
    notices: Notices
    sentences: Sentences
    rounds: Rounds
    open_round: OpenRound
    peers: Peers
    view: RunView
    over_s: float | None
    finished: bool = False

    def update_finished(self, now_s: float) -> None:
        """Once the run is over: whether nobody is waited for any more."""
        if self.over_s is None or self.finished:
            return
        awaited = set(self.members.training()) - self.derived.reports.acknowledged
        self.finished = not awaited or now_s >= self.over_s + FAREWELL_S


def open_rounds(
    course: Course, ledger: Ledger, past: Recalled, memory: Memory | None, now_s: float
) -> Rounds:
    """As they are after the ledger's newest record. `memory`: what another leader has seen."""
    settings = course.settings
    return Rounds(
        n_rounds=settings.run.rounds,
        min_peers=settings.run.min_peers,
        eval_every=settings.run.eval_every,
        policy=settings.policy.name,
        every_s=settings.policy.every_s,
        max_offers=ledger.genesis.limits.max_peers,
        head=ledger.head_round,
        is_paused=course.is_paused,
        has_begun=past.has_begun,
        training=past.training,
        evaluator=past.evaluator,
        evaluates=past.evaluates,
        times=None if memory is None else memory.offer_times(ledger.head_round),
        attendance=None if memory is None else Attendance(dict(memory.unkept)),
        now_s=now_s,
    )
