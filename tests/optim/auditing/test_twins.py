"""Payloads that are too much alike to be the work of two peers."""

from __future__ import annotations

import pytest

from thinwire.optim.auditing.twins import nearest_twins


@pytest.mark.parametrize(
    ("cosines", "found"),
    [
        ([0.6, 0.7, 0.65], []),
        ([0.6, 0.999, 0.65], [1]),
        ([0.0, 0.95, 0.05, 0.99], [1, 3]),
        ([0.97, 0.98, 0.975], []),  # large batches: all are as near
        ([0.97, 0.999, 0.975], [1]),
        ([0.9, 1.0], []),  # of two nobody knows what is usual
        ([1.0, 1.0, 1.0], []),
        ([float("nan"), 0.5, 0.5], []),
    ],
)
def test_what_agrees_far_better_than_others_do_has_one_origin(cosines: list[float], found: list[int]) -> None:
    assert nearest_twins(cosines) == found
