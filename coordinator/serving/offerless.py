"""Records that count no offers, made from a ledger alone: no service runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from ..ledger import Ledger
from ..protocol.figures import wall_ms
from ..protocol.messages import AccessEntry, Admission, Change, CommitBody, CommitteeEntry
from ..protocol.schedule import Samples, lr_factor_bits
from ..protocol.settings import Course


@dataclass(frozen=True, slots=True)
class Last:
    """After the newest record. `access`, `time_ms`: as the newest one has it that tells."""

    course: Course
    access: AccessEntry | None
    time_ms: int
    samples: Samples

    @classmethod
    def of(cls, ledger: Ledger) -> Self:
        """Reads all of it."""
        course, access, time_ms = Course.of(ledger.genesis.config), None, ledger.genesis.time_ms
        samples = Samples()
        for commit in ledger.all_commits():
            course, time_ms = course.after(commit.body.changes), commit.body.time_ms
            samples, access = samples.after(commit.body.offers), commit.body.access or access
        return cls(course, access, time_ms, samples)


def offerless(
    ledger: Ledger,
    last: Last,
    *,
    admitted: tuple[Admission, ...] = (),
    changes: tuple[Change, ...] = (),
    access: AccessEntry | None = None,
    committee: CommitteeEntry | None = None,
) -> CommitBody:
    """The record after the head."""
    round_, course = ledger.head_round + 1, last.course.after(changes)
    return CommitBody(
        round=round_,
        parent=ledger.head_digest,
        offers=(),
        admitted=admitted,
        lr_factor_bits=lr_factor_bits(course, round_ + 1, last.samples),
        reports=(),
        snapshots=(),
        evaluator=None,
        time_ms=max(wall_ms(), last.time_ms),
        changes=changes,
        committee=committee,
        access=access,
    )
