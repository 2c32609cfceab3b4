"""How much peers have done, by the ledger."""

from __future__ import annotations

import pytest

from tests.support.records import OFFER, commit_body
from thinwire.coordinator.protocol.messages import CommitBody
from thinwire.coordinator.protocol.trust.worked import Worked


def body_of(round_: int, **n_samples: int) -> CommitBody:
    offers = ((int(peer[1:]), n) for peer, n in n_samples.items())
    return commit_body(
        round_, offers=tuple(OFFER.model_copy(update={"peer": peer, "n_samples": n}) for peer, n in offers)
    )


def test_samples_between_any_two_rounds_whatever_came_later() -> None:
    worked = Worked()
    for round_, offers in enumerate(({"p0": 5, "p1": 1}, {"p0": 6}, {"p1": 2, "p0": 0}, {"p0": 7}), 1):
        worked.committed(body_of(round_, **offers))
        worked.committed(body_of(round_, p0=1000))  # known already
    assert [worked.samples(0, after, 3) for after in (0, 1, 2)] == [11, 6, 0]
    assert [worked.samples(1, 0, r) for r in (1, 2, 3, 4, 99)] == [1, 1, 3, 3, 3]
    assert worked.samples(2, 0, 4) == 0


def test_a_gap_in_the_ledger_is_refused_and_the_condemned_do_not_count() -> None:
    worked = Worked()
    with pytest.raises(ValueError, match="from the first on"):
        worked.committed(body_of(2, p0=1))
    worked.committed(body_of(1, p0=1, p1=1), condemned={1})
    assert (worked.samples(0, 0, 1), worked.samples(1, 0, 1)) == (1, 0)
