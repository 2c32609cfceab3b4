"""`thinwire bench audits`: how often audits fail honest peers, strategy by strategy and stage by stage.

Every peer is honest; of four the last one may have other data than the run's text: the source of Python's
standard library, where the run's is the reference of the language. All offers are audited that can be.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Final

from ...system.jobs import Call, Rows, Work, until_stopped, work_off
from ...system.output import make_console, to_stderr, to_stdout
from .bad_peers import HONEST, OTHER_DATA, Attack
from .swarm import STRATEGIES, Outcome, Plan
from .table import Train, Wanted, trained_quietly

STAGES: Final = (10, 50)
"""Rounds up to these are stages of their own: the learning rate rises, and is at its peak."""


@dataclass(frozen=True, slots=True)
class HonestRow:
    """`data`: of the peers that are looked at, "text" or "other". Audits that were decided in the rounds up
    to `until` and after those of the row before it, and those of them that failed, of all seeds."""

    strategy: str
    data: str
    until: int
    n_audits: int
    n_failed: int


def audits_command(wanted: Wanted, as_json: bool) -> int:
    """A table on stdout, or a JSON list of rows; how far it is on stderr. What there is, if it is stopped:
    then the exit code is the signal's."""
    rows = list[HonestRow]()

    def keep(row: HonestRow) -> None:
        rows.append(row)
        to_stderr("  ".join(_cells(row)))

    stopped = until_stopped(honest_rows(wanted), keep)
    rows.sort(key=lambda row: (wanted.strategies.index(row.strategy), row.data != "text", row.until))
    if as_json:
        to_stdout(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        _print(rows)
    return stopped


def honest_rows(wanted: Wanted, train: Train = trained_quietly) -> Rows[HonestRow]:
    """`n_bad` of the peers have other data in the rows of such."""
    works = [
        _work(wanted, strategy, data, attack, train)
        for strategy in wanted.strategies
        for data, attack in (("text", HONEST), ("other", OTHER_DATA))
    ]
    for _, rows in work_off(works, wanted.n_jobs, preload=[__name__]):
        yield from rows


def _work(wanted: Wanted, strategy: str, data: str, attack: Attack, train: Train) -> Work[list[HonestRow]]:
    outcomes = yield [Call(train, (plan,)) for plan in _plans(wanted, strategy, attack)]
    return list(_rows(wanted, strategy, data, outcomes))


def _plans(wanted: Wanted, strategy: str, attack: Attack) -> Iterator[Plan]:
    settings = (("audits.rate", 1.0), *wanted.settings)
    for seed in range(1, wanted.n_seeds + 1):
        options = STRATEGIES[strategy]
        yield Plan(options, attack, wanted.n_honest, wanted.n_bad, wanted.n_rounds, seed, settings)


def _rows(wanted: Wanted, strategy: str, data: str, outcomes: Sequence[Outcome]) -> Iterator[HonestRow]:
    before = 0
    first = 0 if data == "text" else wanted.n_honest
    for until in sorted({*(s for s in STAGES if s < wanted.n_rounds), wanted.n_rounds}):
        judged = [
            failed
            for outcome in outcomes
            for round_, peer, failed in outcome.judged
            if before < round_ <= until and peer >= first
        ]
        yield HonestRow(strategy, data, until, len(judged), sum(judged))
        before = until


def _cells(row: HonestRow) -> list[str]:
    return [row.strategy, row.data, f"up to {row.until}", str(row.n_audits), str(row.n_failed)]


def _print(rows: Sequence[HonestRow]) -> None:
    from rich.table import Table

    table = Table(title="bench audits: of honest peers", title_justify="left")
    for head in ("strategy", "data", "rounds", "audits", "failed"):
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*_cells(row))
    make_console().print(table)
