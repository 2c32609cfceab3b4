"""What a comparison comes to: the search for rates, several seeds, equal bytes, equal time, the sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from math import log10

import pytest

from thinwire.node.compare.comparison import Comparison, Outcome
from thinwire.node.compare.nodes import Point
from thinwire.node.compare.search import Row, Train, rates, search
from thinwire.node.compare.specs import ComparePlan, plans, with_baselines
from thinwire.node.compare.verdict import Link, loss_at, round_seconds, verdict_of
from thinwire.node.config import load_config
from thinwire.node.system.jobs import work_off

LINK = Link(1e6, 0.0, "a link")
TINY = {
    **{"task.layers": 1, "task.width": 16, "task.heads": 2, "task.context": 16, "task.batch": 2},
    **{"task.held_out_bytes": 1024, "run.rounds": 3, "strategy.name": "decoupled", "strategy.lr": 1e-2},
}


def outcome(
    plan: ComparePlan,
    losses: Sequence[float],
    *,
    n_bytes: float = 0.0,
    round_s: float = 0.1,
    error: str | None = None,
) -> Outcome:
    """`losses`: from round 0 on, evenly over its rounds; `n_bytes`: of a round."""
    every = plan.rounds / (len(losses) - 1)
    points = [
        Point(round(i * every), i * every, 0.0, i * every * n_bytes, loss) for i, loss in enumerate(losses)
    ]
    phases = {"compute": round_s, "pack": 0.0, "decode": 0.0}
    return Outcome(plan, tuple(points), phases, 0, 0, 1e6, ("a", "a"), 1.0, error)


def plan(label: str, rounds: int = 20, lr: float = 1e-2) -> ComparePlan:
    baseline = label if label in ("alone", "ddp") else None
    return ComparePlan(label, {"name": "decoupled", "lr": lr}, rounds, 1, baseline)  # type: ignore[arg-type]


def best_at(lr: float, trained: list[tuple[float, int, int]]) -> Train:
    """The nearer to this rate and the longer, the better."""

    def train(of: ComparePlan, seed: int) -> Outcome:
        trained.append((of.options["lr"], of.rounds, seed))
        loss = 2.0 + abs(log10(of.options["lr"] / lr)) + 0.01 * seed - of.rounds / 1000
        return outcome(of, [5.0, loss])

    return train


def searched(of: ComparePlan, train: Train, n_rates: int, n_seeds: int) -> Row:
    ((_, row),) = work_off([search(of, train, n_rates, n_seeds)], 1)
    return row


def test_all_rates_are_tried_for_a_quarter_and_the_better_half_for_longer() -> None:
    trained: list[tuple[float, int, int]] = []
    row = searched(plan("x", rounds=40), best_at(4e-2, trained), n_rates=3, n_seeds=2)
    low, middle, high = rates(1e-2, 3)
    assert (low, middle, high) == pytest.approx((1e-2 / 3, 1e-2, 3e-2), rel=1e-3)
    assert trained == [
        *[(low, 10, 0), (middle, 10, 0), (high, 10, 0)],
        *[(high, 20, 0), (middle, 20, 0)],
        *[(high, 40, 0), (high, 40, 1)],
    ]
    assert row.plan.options["lr"] == high
    assert row.is_at_edge
    assert [t.rounds for t in row.tried] == [10, 10, 10, 20, 20]
    assert row.spread == pytest.approx(0.01)
    assert row.curve[-1].held_out == pytest.approx(sum(row.losses) / 2)


def test_without_tuning_a_row_is_trained_once_per_seed() -> None:
    trained: list[tuple[float, int, int]] = []
    row = searched(plan("x", rounds=40), best_at(1e-2, trained), n_rates=1, n_seeds=1)
    assert trained == [(1e-2, 40, 0)]
    assert not row.is_at_edge


def test_a_rate_that_diverges_loses_and_a_stop_ends_the_search() -> None:
    def train(of: ComparePlan, seed: int) -> Outcome:
        error = "non-finite" if of.options["lr"] > 1e-2 else None
        return outcome(of, [5.0, 1.0 if error else 3.0], error=error)

    row = searched(plan("x"), train, n_rates=3, n_seeds=1)
    assert row.error is None
    assert row.plan.options["lr"] <= 1e-2
    assert next(t for t in row.tried if t.lr > 1e-2).held_out is None
    stopped = [search(plan("x"), lambda _plan, _seed: None, n_rates=3, n_seeds=1)]
    assert not list(work_off(stopped, 1, stopped=lambda: True))


def test_losses_between_the_points_of_a_curve() -> None:
    assert [loss_at([0, 10, 20], [5.0, 3.0, 2.0], x) for x in (0, 5, 10, 15, 20, 99)] == [5, 4, 3, 2.5, 2, 2]


def test_with_overlap_a_round_takes_as_long_as_computing_or_exchanging() -> None:
    found = []
    for overlap, round_s in product((0, 1), (0.01, 0.5)):
        of = plan("x")
        of.options["overlap"] = overlap
        found.append(round_seconds(Row((outcome(of, [5.0, 2.0], n_bytes=1e4, round_s=round_s),)), 2, LINK))
    link_s = found[0] - 0.01
    assert 0.01 < link_s < 0.5
    assert found == pytest.approx([link_s + 0.01, link_s + 0.5, link_s, 0.5])


def rows(alone: float, good: float, *, n_seeds: int = 1, seeds_apart: float = 0.0) -> list[Row]:
    """A round takes alone 0.1 s, the strategies as long and their bytes: with 10 kB some 0.02 s more."""

    def row(of: ComparePlan, last: float, n_bytes: float) -> Row:
        seeds = [last + seeds_apart * i for i in range(n_seeds)]
        return Row(tuple(outcome(of, [5.0, (5.0 + end) / 2, end], n_bytes=n_bytes) for end in seeds))

    return [
        row(plan("alone"), alone, 0.0),
        row(plan("ddp"), 1.5, 1e6),
        row(plan("good"), good, 1e4),
        row(plan("worse"), alone + 0.5, 10.0),
    ]


def test_equal_bytes_and_equal_time_and_what_to_take() -> None:
    verdict = verdict_of(rows(alone=3.0, good=2.0), 2, LINK, "nats/byte")
    assert verdict is not None
    assert verdict.seconds == pytest.approx(2.0)  # 20 rounds alone
    assert verdict.n_bytes == 20 * 1e4  # "worse" sent less, for nothing
    equal = verdict.equal
    assert equal["alone"].at_time == equal["alone"].at_tokens == 3.0
    assert equal["good"].at_bytes == equal["good"].at_tokens == 2.0
    assert 2.0 < equal["good"].at_time < 3.0
    assert equal["ddp"].at_bytes == pytest.approx(5.0 - 0.2 / 20 * 3.5)  # a fifth of its first round
    assert equal["ddp"].at_time > 4.0
    assert verdict.recommendation.startswith("Take good: in 2.0 s on a link it reaches 2.")
    assert "where one peer alone reaches 3.000 and ddp 4." in verdict.recommendation
    assert any("One seed" in w for w in verdict.warnings)


def test_a_swarm_that_is_not_worth_it_is_said_to_be_none() -> None:
    verdict = verdict_of(rows(alone=2.0, good=1.9), 2, LINK, "nats/byte")
    assert verdict is not None
    assert verdict.recommendation.startswith(
        "Train alone: in 2.0 s on a link one peer reaches 2.000 nats/byte"
    )
    assert "(ddp 1.500, when it is through after" in verdict.recommendation
    verdict = verdict_of(rows(alone=1.0, good=1.9), 2, LINK, "nats/byte")
    assert verdict is not None
    assert verdict.n_bytes is None
    assert "when it is through" not in verdict.recommendation


def test_seeds_that_lie_further_apart_than_rows_are_said_and_few_rounds_too() -> None:
    near = rows(alone=3.0, good=2.0, n_seeds=2, seeds_apart=1.5)
    verdict = verdict_of(near, 2, LINK, "nats/byte")
    assert verdict is not None
    assert "which is no more than seeds differ by (1.500)" in verdict.recommendation
    assert not any("One seed" in w for w in verdict.warnings)
    short = replace(near[2].first.plan, rounds=19)
    few = Row((replace(near[2].first, plan=short),))
    verdict = verdict_of([*near[:2], few], 2, LINK, "nats/byte")
    assert verdict is not None
    assert verdict.warnings[0].startswith(
        "Fewer than 20 rounds say little of momentum and error feedback: good (19)"
    )


def test_alone_learns_from_its_own_batches_what_ddp_of_one_would() -> None:
    """And a seed further it is another run."""
    run = load_config(None, TINY, environ={})
    found = with_baselines(plans("ddp(lr=2e-3)", run), run)
    assert [p.label for p in found] == ["alone", "ddp(lr=2e-3)"]
    comparison = Comparison(run, found, n_peers=2)
    first = next(comparison.train(lambda *_: None, lambda: False))
    assert len(first.fingerprints) == 2  # a reader and one peer
    assert first.sent_bytes == first.last.payload_bytes == 0
    again = next(comparison.alike(found[0], 0).train(lambda *_: None, lambda: False))
    other = next(comparison.alike(found[0], 1).train(lambda *_: None, lambda: False))
    assert again.fingerprints == first.fingerprints
    assert other.fingerprints != first.fingerprints
    assert other.curve[0].held_out != first.curve[0].held_out
