"""`thinwire bench attacks`: what peers that send bad contents do to a swarm, strategy by strategy.

A row compares a swarm under attack with the same swarm, seed by seed, in which those peers harm nobody: their
payloads are empty, or, where they are to be found out, never arrive.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import isfinite
from typing import Any

from ....compression.errors import ConfigError, nearest
from ....optim.registry import complete_new_run
from ....optim.rules import selects_its_own
from ...system.jobs import Call, Rows, Work, until_stopped, work_off
from ...system.output import make_console, to_stderr, to_stdout
from .bad_peers import ATTACKS, EMPTY, Attack
from .swarm import STRATEGIES, Outcome, Plan, trained


@dataclass(frozen=True, slots=True)
class Row:
    """Losses are means over the seeds, in nats per byte; None: the replicas did not stay finite. `ratios`: of
    each seed; `ratio`: of the means. `found_after_rounds`: until all bad peers were condemned, at the latest
    seed; None: not in this run."""

    strategy: str
    attack: str
    n_honest: int
    n_bad: int
    held_out_honest: float | None
    held_out_attacked: float | None
    ratio: float | None
    found_after_rounds: int | None
    ratios: tuple[float | None, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which rows. For attacks that need more bad peers than `n_bad` there are as many times more of both.
    `after`: swarms go on for so many rounds, and are compared that long after the bad peers were found.
    `n_jobs`: swarms at a time."""

    strategies: Sequence[str]
    attacks: Sequence[str]
    n_rounds: int = 80
    n_seeds: int = 1
    n_honest: int = 3
    n_bad: int = 1
    settings: tuple[tuple[str, Any], ...] = ()
    after: int = 0
    n_jobs: int = 1

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


def attacks_command(wanted: Wanted, as_json: bool) -> int:
    """A table on stdout, or a JSON list of rows; how far it is on stderr. What there is, if it is stopped:
    then the exit code is the signal's."""
    rows = list[Row]()

    def keep(row: Row) -> None:
        rows.append(row)
        to_stderr(_line(row))

    stopped = until_stopped(rows_of(wanted), keep)
    rows.sort(key=lambda row: (wanted.strategies.index(row.strategy), wanted.attacks.index(row.attack)))
    if as_json:
        to_stdout(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        print_rows(rows)
    return stopped


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


def trained_quietly(plan: Plan) -> Outcome:
    """Without weights, which nobody asks for."""
    with without_warnings():
        return replace(trained(plan), weights={})


def rows_of(wanted: Wanted, train: Train = trained_quietly) -> Rows[Row]:
    """One for every strategy and attack that it has a meaning for, in the order in which they end. `train`:
    of a module, where there are several processes. Raises ConfigError where swarms end before bad peers
    join."""
    for name in wanted.attacks:
        if wanted.n_rounds <= (joins_after := ATTACKS[name].joins_after):
            raise ConfigError(f"--rounds {wanted.n_rounds}: the bad peers of {name} join after {joins_after}")
    works = [
        _row(wanted, strategy, name, train)
        for strategy in wanted.strategies
        for name in wanted.attacks
        if is_meant(ATTACKS[name], STRATEGIES[strategy])
    ]
    for _, row in work_off(works, wanted.n_jobs, preload=[__name__]):
        yield row


def is_meant(attack: Attack, options: Mapping[str, Any]) -> bool:
    """For this strategy."""
    if options["name"] == "gossip":
        return attack.lies is not None  # most of its offers have nothing to be changed
    if attack.where_selected:
        complete = complete_new_run(options)
        return "compressor" in complete and selects_its_own(complete)
    return attack.strategy in (None, options["name"])


def _row(wanted: Wanted, strategy: str, name: str, train: Train) -> Work[Row]:
    """Rows share the swarms that they are compared with."""
    attack = ATTACKS[name]
    times = -(-attack.least_bad // wanted.n_bad)
    n_honest, n_bad = wanted.n_honest * times, wanted.n_bad * times

    def call(of: Attack | None, seed: int) -> Call:
        n_rounds, watched = wanted.n_rounds + wanted.after, wanted.after or None
        options = STRATEGIES[strategy]
        peers = n_honest, n_bad, n_rounds, seed
        return Call(train, (Plan(options, of, *peers, wanted.settings, watched, attack.joins_after),))

    seeds = range(1, wanted.n_seeds + 1)
    baseline = EMPTY if attack.against == "empty" else None
    outcomes: list[Outcome] = yield [call(of, seed) for of in (baseline, attack) for seed in seeds]
    pairs = list(zip(outcomes[: len(seeds)], outcomes[len(seeds) :], strict=True))
    found = [bad.found_after for _, bad in pairs]
    compared = [wanted.compared_after(after) for after in found]
    honest = [good.loss_after(after) for (good, _), after in zip(pairs, compared, strict=True)]
    attacked = [bad.loss_after(after) for (_, bad), after in zip(pairs, compared, strict=True)]
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
        ratios=tuple(_finite(bad / good) for bad, good in zip(attacked, honest, strict=True)),
    )


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
