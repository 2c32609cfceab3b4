"""A small search for a strategy's learning rate, and its training from several seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf
from statistics import mean
from typing import Final

from ..system.jobs import Call, Work
from .comparison import Outcome
from .nodes import Point
from .specs import ComparePlan

APART: Final = 3.0
"""A learning rate over the one below."""

FIRST_SHARE: Final = 4
"""The first trainings have a 4th of the rounds."""

Train = Callable[[ComparePlan, int], Outcome | None]
"""By a plan, from a seed that is so much further than the run's; None: it was stopped, and nobody asks."""


@dataclass(frozen=True, slots=True)
class Tried:
    """`held_out`: None, it diverged."""

    lr: float
    rounds: int
    held_out: float | None


@dataclass(frozen=True, slots=True)
class Row:
    """A strategy, with the learning rate that was best: an outcome for every seed, and what was tried."""

    outcomes: tuple[Outcome, ...]
    tried: tuple[Tried, ...] = ()

    @property
    def first(self) -> Outcome:
        return self.outcomes[0]

    @property
    def plan(self) -> ComparePlan:
        return self.first.plan

    @property
    def error(self) -> str | None:
        return next((o.error for o in self.outcomes if o.error is not None), None)

    @property
    def has_rounds(self) -> bool:
        return all(o.has_rounds for o in self.outcomes)

    @property
    def is_at_edge(self) -> bool:
        """Of the learning rates that were tried the best is the last one to a side."""
        lrs = {t.lr for t in self.tried}
        return bool(lrs) and self.plan.options["lr"] in (min(lrs), max(lrs))

    @property
    def losses(self) -> list[float]:
        """Held-out, in the end, by seed."""
        return [o.last.held_out for o in self.outcomes]

    @property
    def spread(self) -> float:
        """Between the best and the worst seed."""
        return max(self.losses) - min(self.losses)

    @property
    def curve(self) -> list[Point]:
        """The first seed's, with losses that are the means of all."""
        rows = zip(*(o.curve for o in self.outcomes), strict=False)
        return [replace(points[0], held_out=mean(p.held_out for p in points)) for points in rows]


def rates(lr: float, n: int) -> list[float]:
    """`n` of them, around `lr`, which is one."""
    return [float(f"{lr * APART**i:.4g}") for i in range(-((n - 1) // 2), n // 2 + 1)]


def search(plan: ComparePlan, train: Train, n_rates: int, n_seeds: int) -> Work[Row]:
    """Successive halving: all rates for a quarter of the rounds, the better half for twice as many, the best
    to the end; then from the other seeds."""
    lrs = rates(float(plan.options["lr"]), n_rates) if n_rates > 1 else [float(plan.options["lr"])]
    tried: list[Tried] = []
    share = FIRST_SHARE if len(lrs) > 1 else 1
    while share > 1:
        found: list[Outcome] = yield [Call(train, (_with_lr(plan, lr, share), 0)) for lr in lrs]
        now = [Tried(lr, _rounds(plan, share), _loss(o)) for lr, o in zip(lrs, found, strict=True)]
        tried += now
        lrs = [t.lr for t in _better_half(now)]
        share = share // 2
    outcomes: list[Outcome] = yield [Call(train, (_with_lr(plan, lr, 1), 0)) for lr in lrs]
    best = min(outcomes, key=lambda o: inf if (loss := _loss(o)) is None else loss)
    seeds = range(1, n_seeds) if best.error is None else ()
    others: list[Outcome] = yield [Call(train, (best.plan, seed)) for seed in seeds]
    return Row((best, *others), tuple(tried))


def _better_half(tried: Sequence[Tried]) -> list[Tried]:
    in_order = sorted(tried, key=lambda t: inf if t.held_out is None else t.held_out)
    return in_order[: (len(in_order) + 1) // 2]


def _loss(outcome: Outcome) -> float | None:
    return outcome.last.held_out if outcome.error is None and outcome.has_rounds else None


def _rounds(plan: ComparePlan, share: int) -> int:
    return max(1, plan.rounds // share)


def _with_lr(plan: ComparePlan, lr: float, share: int) -> ComparePlan:
    return replace(plan, options={**plan.options, "lr": lr}, rounds=_rounds(plan, share))
