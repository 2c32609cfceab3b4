"""How far bad peers move the model in one round, against what honest ones in their place would: a row for
each attack and strategy. Bad peers are real nodes, members like others, whose offers have bad contents."""

from __future__ import annotations

from functools import cache
from statistics import fmean

import pytest

from tests.attacks.swarms import UNMEASURED, distance, swarm
from thinwire.node.bench.attacks.bad_peers import ATTACKS, EMPTY, HONEST, Attack
from thinwire.node.bench.attacks.swarm import STRATEGIES
from thinwire.node.bench.attacks.table import is_meant

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_core")]

MOST = 3.0
"""Times what honest peers in their place move the model by on average: 1.1 to 2.8 here. Without bounds and
without sign an attacker has 7 to 14 times that, or 130 with many samples. With sign, where no element moves
farther than the learning rate, it has 1.9 to 2.7 anyway: losses tell the difference."""

MORE = {"most-samples": 4.0, "spsa": 4.5}
"""Twice the median in norm and in samples; |g| of 4 medians in every probe."""

OLD_PROBES = (("strategy.bound", 0.0), ("strategy.clip", 10.0), ("strategy.max_probes", 4096))
UNBOUNDED = (("strategy.bound", 0.0),)

BY_LEDGER = {name: options for name, options in STRATEGIES.items() if options["name"] != "gossip"}
"""What gossip's peers lie about goes from node to node: `thinwire bench attacks` has rows for that."""

ROWS = [
    (strategy, name)
    for strategy, options in BY_LEDGER.items()
    for name, attack in ATTACKS.items()
    if is_meant(attack, options) and not attack.joins_after and name != "control"
]


SEEDS = range(1, 6)
"""In one round an honest peer moves the model by 0.3 to 1.6 times what it does on average."""


def influence(strategy: str, attack: Attack, settings: tuple[tuple[str, float], ...] = ()) -> float:
    """1.0: as much as honest peers in their place on average; 0.0: as if they had sent nothing."""
    honest = fmean(moved(strategy, HONEST, attack.least_bad, seed) for seed in SEEDS)
    return moved(strategy, attack, attack.least_bad, 1, settings) / honest


@cache
def moved(
    strategy: str, attack: Attack, n_bad: int, seed: int, settings: tuple[tuple[str, float], ...] = ()
) -> float:
    """How far from where the model is without them, L2."""
    weights = []
    for of in (attack, EMPTY):
        settings_of_all = (*settings, *UNMEASURED)
        outcome = swarm(strategy, of, 1, n_honest=3 * n_bad, n_bad=n_bad, seed=seed, settings=settings_of_all)
        assert outcome.fingerprint, "every honest replica is finite and like the others"
        weights.append(dict(outcome.weights))
    return distance(*weights)


@pytest.mark.parametrize(("strategy", "attack"), ROWS)
def test_bad_peers_move_the_model_no_further_than_a_small_multiple_of_honest_ones(
    strategy: str, attack: str
) -> None:
    assert influence(strategy, ATTACKS[attack]) < MORE.get(attack, MORE.get(strategy, MOST))


@pytest.mark.parametrize("strategy", BY_LEDGER)
def test_a_payload_of_a_billion_times_its_size_weighs_what_one_of_a_thousand_times_does(
    strategy: str,
) -> None:
    most, less = (influence(strategy, ATTACKS[name]) for name in ("flipped-1e9", "flipped-1e3"))
    assert most < 1.02 * less


@pytest.mark.parametrize(
    ("strategy", "attack", "settings"),
    [
        ("decoupled-without-sign", "flipped-1e9", UNBOUNDED),
        ("diloco-dense", "flipped-1e9", UNBOUNDED),
        ("diloco-sparse", "flipped-1e9", UNBOUNDED),
        ("spsa", "max-probes", OLD_PROBES),
    ],
    ids=["decoupled-without-sign", "diloco-dense", "diloco-sparse", "spsa"],
)
def test_without_the_bound_the_same_rows_fail(
    strategy: str, attack: str, settings: tuple[tuple[str, float], ...]
) -> None:
    """The attacks are real ones."""
    assert influence(strategy, ATTACKS[attack], settings) > MOST


def test_what_no_check_lets_pass_is_as_good_as_no_offer() -> None:
    for strategy in BY_LEDGER:
        refused, absent = (swarm(strategy, of, 1, settings=UNMEASURED) for of in (ATTACKS["nan"], None))
        assert refused.fingerprint == absent.fingerprint, strategy
