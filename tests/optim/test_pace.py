"""`pace`: what offers count for that do not come in every round."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from thinwire.compression.base import Turn
from thinwire.compression.codecs.dense import Dense
from thinwire.optim.base import Share
from thinwire.optim.diloco import Diloco
from thinwire.optim.parts.clip import Weighing
from thinwire.optim.registry import complete_new_run, recorded_config
from thinwire.optim.robust.pace import MOST_SCALE, Pace, by_pace, mean_scale

EVERY = (1, 1, 1, 5)
"""Rounds that each peer needs."""


def shares_of(round_: int) -> list[tuple[int, Share]]:
    there = [(peer, every) for peer, every in enumerate(EVERY) if round_ % every == 0]
    return [(peer, Share(peer, 8, {}, gap=every, n_active=len(EVERY))) for peer, every in there]


def parts(pace: Pace, n_rounds: int = 100) -> list[float]:
    """Of all outer steps, what each peer's work decides."""
    sums = [0.0] * len(EVERY)
    for round_ in range(1, n_rounds + 1):
        shares = [share for _, share in shares_of(round_)]
        w = by_pace(Weighing([8.0] * len(shares), [8.0] * len(shares)), shares, pace)
        scale = mean_scale(shares, pace)
        for (peer, _), weight in zip(shares_of(round_), w.weights, strict=True):
            sums[peer] += scale * weight / sum(w.whole)
    return [x / n_rounds for x in sums]


def test_with_favano_all_count_alike_over_many_rounds() -> None:
    assert parts("favano") == pytest.approx([0.25] * 4)
    assert parts("none")[3] == pytest.approx(0.05)
    assert parts("discount")[3] < parts("none")[3]


def test_a_bound_stays_what_it_was_and_a_long_absence_counts_no_more_than_sixteen_rounds() -> None:
    w = Weighing([2.0, 4.0], [4.0, 4.0], 0.75, (0.5, 1.0), (2.0, 1.0))
    shares = [Share(0, 8, {}, gap=100, n_active=2), Share(1, 8, {}, gap=1, n_active=2)]
    found = by_pace(w, shares, "favano")
    assert found.weights == [2.0, 0.25]
    assert found.whole == [4.0, 0.25]
    assert found.dilution == pytest.approx(2.25 / 4.25)
    assert found.kept == w.kept
    assert mean_scale(shares, "favano") == MOST_SCALE
    assert by_pace(w, shares, "none") is w
    assert mean_scale([], "favano") == mean_scale(shares, "discount") == 1.0


def test_a_step_is_as_long_as_its_offers_are_of_all(one_thread: None) -> None:
    def moved(pace: str, gap: int) -> torch.Tensor:
        x = nn.Parameter(torch.zeros(6))
        strategy = Diloco([("x", x)], compressor=Dense(bits=32), outer_lr=1.0, outer_momentum=0.0, pace=pace)
        payload = {"x": Dense(bits=32).pack(torch.arange(6.0), strategy.parameters_in_order()[0].part, TURN)}
        share = Share(1, 4, payload, gap=gap, n_active=4)
        strategy.apply([share, replace(share, seed=2)], TURN, None)
        return -x.detach()

    assert torch.equal(moved("none", 3), torch.arange(6.0))
    assert torch.equal(moved("favano", 1), torch.arange(6.0) / 2), "two of four"
    assert torch.equal(moved("favano", 3), torch.arange(6.0) * 1.5)


TURN = Turn(1, 5, 7, 1.0)


def test_what_missed_its_round_is_offered_in_another_as_it_is(one_thread: None) -> None:
    x = nn.Parameter(torch.zeros(6))
    options = {"compressor": Dense(bits=32), "inner": {"name": "SGD"}, "inner_steps": 2, "weight_decay": 0.0}
    strategy = Diloco([("x", x)], **options)  # type: ignore[arg-type]
    missed = strategy.propose(lambda: (x * torch.arange(6.0)).sum, TURN)
    strategy.apply([], TURN, "missed")
    for round_ in (2, 3):
        strategy.apply([], replace(TURN, round=round_), None)
    again = strategy.propose_again(replace(TURN, round=4))
    assert again is not None
    assert torch.equal(again["x"][0], missed["x"][0])
    assert not strategy.state[x]["leftover"].any(), "it has left"
    assert Diloco([("x", x)], **options, fragments=1, control="scaffold").propose_again(TURN) is None  # type: ignore[arg-type]


def test_record_0_has_a_pace_only_where_it_is_set() -> None:
    assert "pace" not in recorded_config(complete_new_run({"name": "diloco"}))
    assert recorded_config(complete_new_run({"name": "diloco", "pace": "favano"}))["pace"] == "favano"
