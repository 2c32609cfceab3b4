"""Whether an audited offer has failed: from the reports of its auditors, weighed by their counted work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
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

    def begin(self, audit: OpenAudit) -> None:
        """An offer was drawn."""
        self._open[audit.round, audit.draw.target] = audit

    def waiting(self, round_: int, target: int) -> OpenAudit | None:
        """None: this offer was not drawn, or was judged, or its time is over."""
        return self._open.get((round_, target))

    def judge(self, round_: int, is_condemned: Callable[[int], bool]) -> list[Judged]:
        """What the reports up to the record of `round_` have decided, in the order of round and target."""
        found = []
        for key, audit in sorted(self._open.items()):
            judged = audit.judged(round_, is_condemned)
            if judged is not None or audit.is_due(round_):
                del self._open[key]
            if judged is not None:
                found.append(judged)
        return found
