"""Whether an audited offer has failed: from the reports of its auditors, weighed by their counted work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Final

from .drawing import Draw

REPORT_ROUNDS: Final = 20
"""Reports count that are in the records of so many rounds after the offer's."""

MIN_REPORTS: Final = 3
"""Of auditors drawn for the same offer: fewer prove nothing."""

MIN_FAILED: Final = 2
"""Nobody fails an offer alone, however long it has worked."""


@dataclass(frozen=True, slots=True)
class Judged:
    """What became of an audited offer."""

    round: int
    target: int
    failed: bool


@dataclass(slots=True)
class OpenAudit:
    """An audit that waits for reports. `digest`: of the payload; `work`: of each auditor when it was drawn;
    `failed`: what those say that have reported."""

    round: int
    draw: Draw
    digest: bytes
    work: dict[int, int]
    failed: dict[int, bool] = field(default_factory=dict)

    def judged(self, round_: int, is_condemned: Callable[[int], bool]) -> Judged | None:
        """After the record of `round_`; None: not yet, or never if the time is over. What condemned peers say
        is not heard. It is judged as soon as no report to come can change it."""
        heard = {auditor: work for auditor, work in self.work.items() if not is_condemned(auditor)}
        said = {auditor: self.failed[auditor] for auditor in heard if auditor in self.failed}
        if len(said) < MIN_REPORTS:
            return None
        failed = sum(heard[auditor] for auditor, has_failed in said.items() if has_failed)
        passed = sum(heard[auditor] for auditor in said) - failed
        is_enough = sum(said.values()) >= MIN_FAILED
        total = sum(heard.values())
        if is_enough and 2 * failed > total:
            return Judged(self.round, self.draw.target, failed=True)
        if 2 * passed >= total:
            return Judged(self.round, self.draw.target, failed=False)
        if len(said) == len(heard) or self.is_due(round_):
            return Judged(self.round, self.draw.target, failed=is_enough and failed > passed)
        return None

    def is_due(self, round_: int) -> bool:
        """Whether no later record's reports count."""
        return round_ >= self.round + REPORT_ROUNDS


class Judging:
    """The audits that wait, of the last REPORT_ROUNDS rounds. Pure; fed by `Standing`."""

    def __init__(self) -> None:
        self._open: dict[tuple[int, int], OpenAudit] = {}
        self._news: set[tuple[int, int]] = set()

    def begin(self, audit: OpenAudit) -> None:
        """An offer was drawn; rounds come in order."""
        self._open[audit.round, audit.draw.target] = audit

    def waiting(self, round_: int, target: int) -> OpenAudit | None:
        """None: this offer was not drawn, or was judged, or its time is over."""
        return self._open.get((round_, target))

    def heard(self, audit: OpenAudit, auditor: int, has_failed: bool) -> None:
        """A report on an audit that waits, of an auditor that was drawn for it and had said nothing."""
        audit.failed[auditor] = has_failed
        self._news.add((audit.round, audit.draw.target))

    def judge(self, round_: int, is_condemned: Callable[[int], bool]) -> list[Judged]:
        """What the reports up to the record of `round_` have decided, in the order of round and target.
        Looked at are audits of which a report has come with this record, and those whose time is over."""
        due = list(takewhile(lambda key: self._open[key].is_due(round_), self._open))
        found = []
        for key in sorted({*due, *self._news}):
            audit = self._open[key]
            judged = audit.judged(round_, is_condemned)
            if judged is not None or audit.is_due(round_):
                del self._open[key]
            if judged is not None:
                found.append(judged)
        self._news.clear()
        return found
