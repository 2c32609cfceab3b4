"""How often offers count, by the ledger."""

from __future__ import annotations

import pytest

from tests.support.records import OFFER, commit_body
from thinwire.coordinator.protocol.messages import CommitBody
from thinwire.coordinator.protocol.trust.paces import MOST, Paces


def body_of(round_: int, *peers: int) -> CommitBody:
    return commit_body(round_, offers=tuple(OFFER.model_copy(update={"peer": peer}) for peer in peers))


def test_of_any_round_that_is_known_whatever_came_later() -> None:
    paces = Paces()
    offers = [(0, 1), (0,), (0,), (0, 1), (0, 2), (2,), (0, 1)]
    for round_, peers in enumerate(offers, 1):
        paces.committed(body_of(round_, *peers))
        paces.committed(body_of(round_, 9))  # known already
    assert [paces.gap(1, r) for r in (1, 4, 5, 7, 8)] == [1, 3, 1, 3, 1]
    assert [paces.gap(0, r) for r in (1, 2, 5, 7)] == [1, 1, 1, 2]
    assert paces.gap(2, 5) == 1, "its first one"
    assert paces.gap(0, 1000) == MOST
    assert [paces.n_active(r) for r in (1, 4, 5, 7)] == [2, 2, 3, 3]
    assert paces.n_active(4 + MOST) == 3
    assert paces.n_active(6 + MOST) == 2


def test_a_gap_in_the_ledger_is_refused_and_the_condemned_do_not_count() -> None:
    paces = Paces()
    with pytest.raises(ValueError, match="from the first on"):
        paces.committed(body_of(2, 0))
    paces.committed(body_of(1, 0, 1), condemned={1})
    assert paces.n_active(1) == 1
