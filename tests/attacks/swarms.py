"""Swarms under attack that several tests look at: each is trained once."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from torch import Tensor

from thinwire.node.bench.attacks.bad_peers import Attack
from thinwire.node.bench.attacks.swarm import STRATEGIES, Outcome, Plan, trained

UNMEASURED = (("task.held_out_bytes", 1024),)
"""Settings of a swarm whose loss nobody looks at: half of a short run's work is to measure it."""


@cache
def swarm(
    strategy: str,
    attack: Attack | None,
    n_rounds: int,
    *,
    n_honest: int = 3,
    n_bad: int = 1,
    seed: int = 1,
    settings: tuple[tuple[str, float], ...] = (),
) -> Outcome:
    """After its last round; of new runs' own settings, but for the given ones."""
    return trained(Plan(STRATEGIES[strategy], attack, n_honest, n_bad, n_rounds, seed, settings))


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """L2, of all parameters together."""
    return float(sum(float((a[name].double() - b[name].double()).square().sum()) for name in a) ** 0.5)
