"""How likely the default rule condemns an honest peer, and how soon a bad one: exact sums, no sampling.

An offer is audited with the chance rate / a of its `a` auditors (1 / 300 with three, 1 / 500 with five), and
with 1 / 10 while its peer is suspect: to the ledger, for `window_rounds` after a failure, or to the replicas'
scores. `q` is the chance that an audit of an honest offer ends as a failure, `p` that one auditor errs.
"""

from __future__ import annotations

from functools import cache
from math import comb

import pytest

from tests.support.audited_ledger import AuditedRun, Rules
from thinwire.coordinator.protocol.messages import Verdict
from thinwire.coordinator.protocol.trust.drawing import SUSPECTS_MILLIONTHS
from thinwire.coordinator.protocol.trust.standing import LAST
from thinwire.node.config import Audits

RULES = Audits()
SUSPECT = SUSPECTS_MILLIONTHS / 1e6
ROUNDS = 10_000


def binomial(n: int, k: int, p: float) -> float:
    return comb(n, k) * p**k * (1 - p) ** (n - k)


def at_least(n: int, k: int, p: float) -> float:
    return 1.0 - sum(binomial(n, i, p) for i in range(k))


@cache
def condemns(q: float, failed: int, n_audits: int) -> float:
    """The chance that a peer with so many failures and no passes is condemned by the next so many audits, all
    of them in the window."""
    n_kept = LAST * RULES.failures
    states, condemned = {(True,) * failed: 1.0}, 0.0
    for _ in range(n_audits):
        after: dict[tuple[bool, ...], float] = {}
        for state, chance in states.items():
            passed, fails = (*state, False)[-n_kept:], (*state, True)[-n_kept:]
            after[passed] = after.get(passed, 0.0) + chance * (1 - q)
            if sum(fails) >= RULES.failures and 2 * sum(fails) >= len(fails):
                condemned += chance * q
            else:
                after[fails] = after.get(fails, 0.0) + chance * q
        states = after
    return condemned


def honest(q: float, n_auditors: int) -> float:
    """At most: every failure may be the first of its window, with nothing passed before it. One audit is that
    of a newcomer."""
    first = (ROUNDS * RULES.rate / n_auditors + 1) * q
    return first * condemns(q, 1, 200)


def rounds_until(*chances: float) -> float:
    """On average, until things have happened one after the other."""
    return sum(1 / chance for chance in chances)


def test_an_honest_peer_keeps_its_weight_for_ten_thousand_rounds() -> None:
    """With a chance of 99% if no more than one audit of a hundred goes wrong."""
    assert honest(0.0098, 3) < 0.01
    assert honest(0.0125, 5) < 0.01
    assert honest(0.02, 3) > 0.01, "and not much more than that can go wrong"


@pytest.mark.parametrize(
    ("n_auditors", "n_failed", "p"),
    [
        (3, 2, 0.057),  # each of them has worked as much, or not: two are always needed
        (5, 3, 0.104),  # all have worked as much
        (5, 2, 0.034),  # two have worked more than the three others together
    ],
)
def test_auditors_that_err_by_themselves_may_err_more_often(n_auditors: int, n_failed: int, p: float) -> None:
    """If they err together, for the same reason, q = p."""
    q = at_least(n_auditors, n_failed, p)
    assert honest(q, n_auditors) < 0.01
    assert honest(at_least(n_auditors, n_failed, 1.15 * p), n_auditors) > 0.01


def test_an_honest_peer_may_be_suspect_all_the_time() -> None:
    """To scores that are wrong: it is audited a thousand times, and passes nearly all of them."""
    assert condemns(0.0098, 0, round(ROUNDS * SUSPECT)) < 0.005


def test_a_bad_peer_is_out_soon() -> None:
    """One that fails every audit, with all reports in time: within 50 rounds of joining with a chance of 96%,
    after 20 rounds on average. One that turns bad after it has passed an audit: after some 310 rounds with
    three auditors, 510 with five, for its first failure makes it a suspect; as soon as a newcomer if the
    replicas' scores show it."""
    usual = RULES.rate / 3
    assert at_least(48, RULES.failures, SUSPECT) == pytest.approx(0.96, abs=0.005)
    assert rounds_until(SUSPECT, SUSPECT) == pytest.approx(20)
    assert rounds_until(usual, SUSPECT) == pytest.approx(310)
    assert rounds_until(RULES.rate / 5, SUSPECT) == pytest.approx(510)
    assert at_least(1000, 1, usual) == pytest.approx(0.965, abs=0.005)


def test_in_new_runs_a_bad_newcomer_weighs_nothing_as_soon_as_an_audit_is_decided() -> None:
    """And is condemned by the next one; half of the others are known by then."""
    for n_peers in (4, 5, 6, 7, 12):
        run = AuditedRun(n_peers, Rules(RULES.rate, newcomers_rate=1.0, newcomers_budget=10.0))
        failed = None
        while not (found := run.standing.condemned_in(run.standing.round + 1)):
            run.live(1, lambda _auditor, target: Verdict.FAILED if target == 1 else Verdict.PASSED)
            if failed is None and run.standing.has_failed_in(1, run.standing.round + 1):
                failed = run.standing.round
        assert found == {1}
        assert failed is not None
        assert failed < run.standing.round <= 10
        assert sum(map(run.standing.is_known, range(n_peers))) >= n_peers / 2


@pytest.mark.parametrize(
    ("begins", "scored", "soonest", "latest"),
    [(0, (), 2, 90), (150, (), 150, 1650), (150, (1,), 150, 240)],
    ids=["newcomer", "turns bad", "turns bad and it shows"],
)
def test_the_default_rule_finds_a_bad_peer_and_nobody_else(
    begins: int, scored: tuple[int, ...], soonest: int, latest: int
) -> None:
    """On ledgers that are drawn as they are. `begins`: the round after which it is bad."""
    for n_peers in (4, 5, 6, 7):
        run = AuditedRun(n_peers, Rules(RULES.rate, RULES.failures, RULES.window_rounds))

        def verdict(_auditor: int, target: int, run: AuditedRun = run) -> Verdict:
            return Verdict.FAILED if target == 1 and run.standing.round > begins else Verdict.PASSED

        while not (found := run.standing.condemned_in(run.standing.round + 1)):
            run.live(1, verdict, scored)
            assert run.standing.round <= latest
        assert found == {1}
        assert run.standing.round >= soonest
