"""How far bad peers move the model in one round, against what honest ones in their place would: a row for
each attack and strategy. Bad peers are real nodes, members like others, whose offers have bad contents."""

from __future__ import annotations

import pytest

from tests.attacks.swarms import distance, swarm
from thinwire.node.bench.attacks.bad_peers import ATTACKS, EMPTY, HONEST, Attack
from thinwire.node.bench.attacks.swarm import STRATEGIES

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_core")]

MOST = {
    "decoupled": 1.75,
    "decoupled-without-sign": 2.3,
    "diloco-dense": 2.3,
    "diloco-sparse": 2.3,
    "spsa": 1.5,
}
"""Times what honest peers in their place move the model by. Without bounds an attacker without sign has 7 to
14 times that, or 130 with many samples; with sign, where no element moves farther than the learning rate, 1.9
to 2.7; with probes, which code 2^15.75 at most and are clipped by the median of all, 2.9."""

MORE = {("decoupled", "random"): 2.1, ("decoupled", "constant"): 2.1} | {
    (strategy, "most-samples"): 3.2 for strategy in ("diloco-dense", "diloco-sparse")
}
"""What is spread over more elements than honest payloads; norm and samples both at twice the median."""

ROWS = [
    (strategy, name)
    for strategy, options in STRATEGIES.items()
    for name, attack in ATTACKS.items()
    if attack.strategy in (None, options["name"])
]


def influence(strategy: str, attack: Attack, settings: tuple[tuple[str, float], ...] = ()) -> float:
    """1.0: as much as honest peers in their place; 0.0: as if they had sent nothing."""

    def weights(of: Attack) -> dict[str, object]:
        n_bad = attack.least_bad
        outcome = swarm(strategy, of, 1, n_honest=3 * n_bad, n_bad=n_bad, settings=settings)
        assert outcome.fingerprint, "every honest replica is finite and like the others"
        return dict(outcome.weights)

    nothing = weights(EMPTY)
    return distance(weights(attack), nothing) / distance(weights(HONEST), nothing)


@pytest.mark.parametrize(("strategy", "attack"), ROWS)
def test_bad_peers_move_the_model_no_further_than_a_small_multiple_of_honest_ones(
    strategy: str, attack: str
) -> None:
    most = MORE.get((strategy, attack), MOST[strategy])
    assert influence(strategy, ATTACKS[attack]) < most


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_payload_of_a_billion_times_its_size_weighs_what_one_of_a_thousand_times_does(
    strategy: str,
) -> None:
    most, less = (influence(strategy, ATTACKS[name]) for name in ("flipped-1e9", "flipped-1e3"))
    assert most < 1.02 * less


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_without_the_bound_the_same_rows_fail(strategy: str) -> None:
    """The attacks are real ones."""
    unbounded = (("strategy.bound", 0.0),)
    assert influence(strategy, ATTACKS["flipped-1e9"], unbounded) > MOST[strategy]


def test_what_no_check_lets_pass_is_as_good_as_no_offer() -> None:
    for strategy in STRATEGIES:
        refused, absent = swarm(strategy, ATTACKS["nan"], 1), swarm(strategy, None, 1)
        assert refused.fingerprint == absent.fingerprint, strategy
