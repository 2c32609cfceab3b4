"""`thinwire bench attacks`: what peers that send bad contents do to a swarm, strategy by strategy.

A row compares a swarm under attack with the same swarm, seed by seed, in which those peers harm nobody: their
payloads are empty, or, where they are to be found out, never arrive.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from ....compression.errors import ConfigError, nearest
from ....optim.registry import complete_new_run
from ....optim.rules import selects_its_own
from ...compare.comparison import one_thread
from ...system.output import make_console, to_stderr, to_stdout
from .bad_peers import ATTACKS, EMPTY, Attack
from .swarm import STRATEGIES, Outcome, Plan, trained


@dataclass(frozen=True, slots=True)
class Row:
    """Losses are means over the seeds, in nats per byte; None: the replicas did not stay finite.
    `found_after_rounds`: until no bad peer weighs anything, at the latest seed; None: not in this run."""

    strategy: str
    attack: str
    n_honest: int
    n_bad: int
    held_out_honest: float | None
    held_out_attacked: float | None
    ratio: float | None
    found_after_rounds: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which rows. For attacks that need more bad peers than `n_bad` there are as many times more of both.
    `after`: swarms go on for so many rounds, and are compared that long after the bad peers were found."""

    strategies: Sequence[str]
    attacks: Sequence[str]
    n_rounds: int = 80
    n_seeds: int = 1
    n_honest: int = 3
    n_bad: int = 1
    settings: tuple[tuple[str, Any], ...] = ()
    after: int = 0

    def compared_after(self, found_after: int | None) -> int | None:
        """Which round; None: the last one, as bad peers were found too late or not at all."""
        if self.after == 0 or found_after is None or found_after > self.n_rounds:
            return None
        return found_after + self.after


Train = Callable[[Plan], Outcome]


def names_of(text: str | None, known: Sequence[str], option: str) -> list[str]:
    """Names with commas between them; None: all. Raises ConfigError."""
    if text is None:
        return list(known)
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ConfigError(f"{option} {name}: {nearest(name, known)}")
    return names


def attacks_command(wanted: Wanted, as_json: bool) -> None:
    """A table on stdout, or a JSON list of rows; how far it is on stderr."""
    with one_thread(), without_warnings():
        rows = list(rows_of(wanted, _Trained(), progress=lambda row: to_stderr(_line(row))))
    if as_json:
        to_stdout(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        print_rows(rows)


@contextmanager
def without_warnings() -> Iterator[None]:
    """Of payloads that are left out there is one for each node and round."""
    log = logging.getLogger("thinwire")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def rows_of(wanted: Wanted, train: Train, progress: Callable[[Row], object]) -> Iterator[Row]:
    """One for every strategy and attack that it has a meaning for. Raises ConfigError where swarms end before
    bad peers join."""
    for name in wanted.attacks:
        if wanted.n_rounds <= (joins_after := ATTACKS[name].joins_after):
            raise ConfigError(f"--rounds {wanted.n_rounds}: the bad peers of {name} join after {joins_after}")
    for strategy in wanted.strategies:
        for name in wanted.attacks:
            attack = ATTACKS[name]
            if not is_meant(attack, STRATEGIES[strategy]):
                continue
            row = _row(wanted, strategy, name, attack, train)
            progress(row)
            yield row


def is_meant(attack: Attack, options: Mapping[str, Any]) -> bool:
    """For this strategy."""
    if attack.where_selected:
        complete = complete_new_run(options)
        return "compressor" in complete and selects_its_own(complete)
    return attack.strategy in (None, options["name"])


def _row(wanted: Wanted, strategy: str, name: str, attack: Attack, train: Train) -> Row:
    times = -(-attack.least_bad // wanted.n_bad)
    n_honest, n_bad = wanted.n_honest * times, wanted.n_bad * times
    baseline = EMPTY if attack.against == "empty" else None
    honest, attacked, found = [], [], []
    for seed in range(1, wanted.n_seeds + 1):

        def plan(of: Attack | None, seed: int = seed) -> Plan:
            n_rounds, watched = wanted.n_rounds + wanted.after, wanted.after or None
            options = STRATEGIES[strategy]
            peers = n_honest, n_bad, n_rounds, seed
            return Plan(options, of, *peers, wanted.settings, watched, attack.joins_after)

        outcome = train(plan(attack))
        compared = wanted.compared_after(outcome.found_after)
        honest.append(train(plan(baseline)).loss_after(compared))
        attacked.append(outcome.loss_after(compared))
        found.append(outcome.found_after)
    mean_honest, mean_attacked = (sum(losses) / len(losses) for losses in (honest, attacked))
    last_found = [after for after in found if after is not None]
    return Row(
        strategy=strategy,
        attack=name,
        n_honest=n_honest,
        n_bad=n_bad * attack.identities,
        held_out_honest=_finite(mean_honest),
        held_out_attacked=_finite(mean_attacked),
        ratio=_finite(mean_attacked / mean_honest),
        found_after_rounds=max(last_found) if len(last_found) == len(found) else None,
    )


class _Trained:
    """Trains what it has not trained yet: rows share the swarms that they are compared with."""

    def __init__(self) -> None:
        self._known: list[tuple[Plan, Outcome]] = []

    def __call__(self, plan: Plan) -> Outcome:
        for known, outcome in self._known:
            if known == plan:
                return outcome
        outcome = trained(plan)
        self._known.append((plan, outcome))
        return outcome


def _finite(x: float) -> float | None:
    return round(x, 5) if isfinite(x) else None


def _line(row: Row) -> str:
    return "  ".join(_cells(row))


def _cells(row: Row) -> list[str]:
    def figure(x: float | None, digits: int) -> str:
        return "not finite" if x is None else f"{x:.{digits}f}"

    return [
        row.strategy,
        row.attack,
        f"{row.n_honest} + {row.n_bad}",
        figure(row.held_out_honest, 3),
        figure(row.held_out_attacked, 3),
        figure(row.ratio, 3),
        "-" if row.found_after_rounds is None else str(row.found_after_rounds),
    ]


def print_rows(rows: Sequence[Row]) -> None:
    """A table on stdout."""
    from rich.table import Table

    table = Table(title="bench attacks: held-out loss, nats per byte", title_justify="left")
    for head in ("strategy", "attack", "honest + bad", "without", "attacked", "ratio", "found after rounds"):
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*_cells(row))
    make_console().print(table)
