"""How far bad peers move the model in one round, against what honest ones in their place would: a row for
each attack and strategy. Bad peers are real nodes, members like others, whose offers have bad contents."""

from __future__ import annotations

import pytest

from tests.attacks.swarms import UNMEASURED, distance, swarm
from thinwire.node.bench.attacks.bad_peers import ATTACKS, EMPTY, HONEST, Attack
from thinwire.node.bench.attacks.swarm import STRATEGIES
from thinwire.node.bench.attacks.table import is_meant

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_core")]

MOST = 3.0
"""Times what honest peers in their place move the model by: 1.1 to 2.5 here. Without bounds and without sign
an attacker has 7 to 14 times that, or 130 with many samples. With sign, where no element moves farther than
the learning rate, it has 1.9 to 2.7 anyway: losses tell the difference."""

MORE = {"most-samples": 4.0, "spsa": 4.5}
"""Twice the median in norm and in samples; |g| of 4 medians in every probe."""

OLD_PROBES = (("strategy.bound", 0.0), ("strategy.clip", 10.0), ("strategy.max_probes", 4096))
UNBOUNDED = (("strategy.bound", 0.0),)

ROWS = [
    (strategy, name)
    for strategy, options in STRATEGIES.items()
    for name, attack in ATTACKS.items()
    if is_meant(attack, options)
]


def influence(strategy: str, attack: Attack, settings: tuple[tuple[str, float], ...] = ()) -> float:
    """1.0: as much as honest peers in their place; 0.0: as if they had sent nothing."""

    def weights(of: Attack) -> dict[str, object]:
        n_bad = attack.least_bad
        outcome = swarm(strategy, of, 1, n_honest=3 * n_bad, n_bad=n_bad, settings=(*settings, *UNMEASURED))
        assert outcome.fingerprint, "every honest replica is finite and like the others"
        return dict(outcome.weights)

    nothing = weights(EMPTY)
    return distance(weights(attack), nothing) / distance(weights(HONEST), nothing)


@pytest.mark.parametrize(("strategy", "attack"), ROWS)
def test_bad_peers_move_the_model_no_further_than_a_small_multiple_of_honest_ones(
    strategy: str, attack: str
) -> None:
    assert influence(strategy, ATTACKS[attack]) < MORE.get(attack, MORE.get(strategy, MOST))


@pytest.mark.parametrize("strategy", STRATEGIES)
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
    for strategy in STRATEGIES:
        refused, absent = (swarm(strategy, of, 1, settings=UNMEASURED) for of in (ATTACKS["nan"], None))
        assert refused.fingerprint == absent.fingerprint, strategy
