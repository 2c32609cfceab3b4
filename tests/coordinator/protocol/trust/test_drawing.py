"""Which offers are audited, and by whom."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.audited_ledger import RUN, bare, offer
from thinwire.coordinator.protocol.messages import digest_of
from thinwire.coordinator.protocol.trust.drawing import MAX_AUDITORS, Draw, audits_of
from thinwire.coordinator.protocol.trust.stock import Stock


@dataclass
class Known:
    """Everybody has worked but `idle`."""

    idle: set[int] = field(default_factory=set)
    suspects: set[int] = field(default_factory=set)
    fresh: set[int] = field(default_factory=set)
    known: set[int] = field(default_factory=set)
    looked_at: set[int] = field(default_factory=set)

    def has_worked(self, peer: int) -> bool:
        return peer not in self.idle

    def is_suspect(self, peer: int) -> bool:
        return peer in self.suspects

    def is_fresh(self, peer: int) -> bool:
        return peer in self.fresh

    def is_known(self, peer: int) -> bool:
        return peer in self.known

    def is_looked_at(self, peer: int) -> bool:
        return peer in self.looked_at


def draws(seed: int, n_peers: int, rate: float, known: Known | None = None) -> tuple[Draw, ...]:
    body = bare(1, [offer(p) for p in range(n_peers)])
    return audits_of(RUN, digest_of(b"%d" % seed), body, known or Known(), rate)


def test_draws_are_known() -> None:
    """Any program that draws gets these."""
    assert draws(7, 7, 1.0) == (
        Draw(target=0, auditors=(1, 3, 4, 5, 6)),
        Draw(target=4, auditors=(0, 1, 2, 5, 6)),
    )


@pytest.mark.parametrize(
    ("n_peers", "n_auditors"), [(1, None), (3, None), (4, 3), (5, 3), (6, 5), (7, 5), (8, 5), (40, 5)]
)
def test_an_odd_number_of_others_audits(n_peers: int, n_auditors: int | None) -> None:
    found = [draw for seed in range(300) for draw in draws(seed, n_peers, 1.0)]
    assert {len(draw.auditors) for draw in found} == ({n_auditors} if n_auditors else set())
    for draw in found:
        assert draw.target not in draw.auditors
        assert len(set(draw.auditors)) == len(draw.auditors)
        assert set(draw.auditors) <= set(range(n_peers))


def test_everybody_is_drawn_as_often_as_the_rate_says_and_by_everybody_alike() -> None:
    n_rounds, n_peers, rate = 20_000, 8, 0.2
    targets, auditors = Counter[int](), Counter[int]()
    for seed in range(n_rounds):
        for draw in draws(seed, n_peers, rate):
            if not draw.for_suspects:
                targets[draw.target] += 1
                auditors.update(draw.auditors)
    work = sum(auditors.values()) / (n_rounds * n_peers)
    assert work == pytest.approx(rate, rel=0.03)
    # Five standard deviations of a binomial count.
    for counts, expected in ((targets, n_rounds * rate / MAX_AUDITORS), (auditors, n_rounds * rate)):
        assert all(abs(counts[peer] - expected) < 5 * expected**0.5 for peer in range(n_peers))


def test_suspects_are_drawn_for_one_offer_in_ten() -> None:
    n_rounds = 20_000
    always, for_suspects = Counter[int](), Counter[int]()
    for seed in range(n_rounds):
        for draw in draws(seed, 8, 0.01, Known(suspects={3})):
            (for_suspects if draw.for_suspects else always)[draw.target] += 1
    assert always[3] == pytest.approx(n_rounds / 10, rel=0.1)
    assert for_suspects[3] == 0
    # Who is suspect to the replicas alone is drawn as often, all in all.
    assert always[4] + for_suspects[4] == pytest.approx(n_rounds / 10, rel=0.1)
    assert always[4] == pytest.approx(n_rounds * 0.01 / MAX_AUDITORS, abs=35)


def test_first_offers_of_newcomers_are_drawn_as_often_as_the_run_says() -> None:
    """But not of those with data of their own, whose audits may never say anything."""
    n_rounds, found = 4000, Counter[int]()
    body = bare(1, [offer(p, own_data=p == 2) for p in range(8)])
    known = Known(suspects={2, 3, 4}, fresh={2, 3})
    for seed in range(n_rounds):
        drawn = audits_of(RUN, digest_of(b"%d" % seed), body, known, 0.01, newcomers_rate=0.5)
        found.update(draw.target for draw in drawn if not draw.for_suspects)
    assert found[3] == pytest.approx(n_rounds / 2, rel=0.1)
    assert found[2] == pytest.approx(n_rounds / 10, rel=0.2)
    assert found[4] == pytest.approx(n_rounds / 10, rel=0.2)


def test_a_flood_of_newcomers_waits_and_takes_a_share_of_the_known_ones_work() -> None:
    """Fifty identities, none of which ever passes: those of four who are known."""
    n_rounds, stock, known = 250, Stock(100_000), Known(suspects=set(range(4, 54)), known=set(range(4)))
    known.fresh = known.suspects
    body, done, waited = bare(1, [offer(p) for p in range(54)]), Counter[int](), Counter[int]()
    for seed in range(n_rounds):
        digest = digest_of(b"%d" % seed)
        drawn = audits_of(RUN, digest, body, known, 0.01, newcomers_rate=1.0, stock=stock)
        audits = [draw for draw in drawn if draw.target not in known.known]
        assert all(set(draw.auditors) < known.known for draw in audits)
        work = sum(len(draw.auditors) for draw in audits)
        assert work <= 3 * 4
        done.update(draw.target for draw in audits)
        waited[0] += work
    most = 16 + 0.1 * n_rounds
    assert 0.95 * most <= waited[0] / 4 <= most, "rounds of work of each"
    assert len(done) > 25, "whose turn it is, is drawn: each one's comes"


def test_a_newcomer_is_audited_once_while_its_auditors_may_still_report() -> None:
    known = Known(suspects={4, 5}, known=set(range(4)), fresh={4, 5}, looked_at={5})
    body = bare(1, [offer(p, own_data=p == 4) for p in range(6)])
    drawn = audits_of(RUN, digest_of(b""), body, known, 0.01, newcomers_rate=1.0, stock=Stock(100_000))
    assert [draw.target for draw in drawn if not draw.for_suspects] == [4], "of other data as well"


@pytest.mark.parametrize(("n_known", "n_auditors"), [(0, 5), (1, 3), (2, 3), (3, 3), (5, 5), (7, 5)])
def test_auditors_are_known_as_far_as_there_are_any(n_known: int, n_auditors: int) -> None:
    known = Known(suspects={11}, known=set(range(n_known)), fresh={11})
    body, found = bare(1, [offer(p) for p in range(12)]), list[tuple[int, ...]]()
    for seed in range(40):
        digest = digest_of(b"%d" % seed)
        drawn = audits_of(RUN, digest, body, known, 0.01, newcomers_rate=1.0, stock=Stock(0))
        found += [draw.auditors for draw in drawn if draw.target == 11]
    assert len(found) >= 4
    assert {len(auditors) for auditors in found} == {n_auditors}
    assert {len(known.known & {*auditors}) for auditors in found} == {min(n_known, n_auditors)}


def test_no_work_no_part_in_audits() -> None:
    """Neither who has never worked, nor an offer of 0 samples, nor who is not in the round."""
    known = Known(idle={1})
    body = bare(1, [offer(p, n_samples=int(p != 2)) for p in range(8) if p != 3])
    for seed in range(500):
        for draw in audits_of(RUN, digest_of(b"%d" % seed), body, known, 1.0):
            assert not {1, 2, 3} & {draw.target, *draw.auditors}
            assert len(draw.auditors) == 3


def test_peers_with_data_of_their_own_are_audited_and_do_not_audit() -> None:
    body = bare(1, [offer(p, own_data=p in (2, 5)) for p in range(7)])
    for of_all in (True, False):
        found = [audits_of(RUN, digest_of(b"%d" % i), body, Known(), 1.0, of_all) for i in range(100)]
        drawn = [draw for draws in found for draw in draws]
        assert {draw.target for draw in drawn} == set(range(7))
        assert any({2, 5} & {*draw.auditors} for draw in drawn) == of_all
        # Five peers have the run's text: of them four audit a fifth, so three do; all five audit another.
        sizes = {len(draw.auditors) for draw in drawn if draw.target not in (2, 5)}
        assert sizes == ({5} if of_all else {3})
        assert {len(draw.auditors) for draw in drawn if draw.target in (2, 5)} == {5}


def test_a_rate_of_nothing_draws_nobody() -> None:
    assert not any(draws(seed, 8, 0.0, Known(suspects={0})) for seed in range(300))


@given(
    peers=st.lists(st.integers(0, 2**16 - 1), max_size=40),
    digest=st.binary(min_size=32, max_size=32),
    rate=st.floats(0, 1),
    idle=st.sets(st.integers(0, 2**16 - 1)),
)
def test_any_commit_can_be_drawn_from(peers: list[int], digest: bytes, rate: float, idle: set[int]) -> None:
    body = bare(1, [offer(0), *(offer(p) for p in peers)])
    found = audits_of(RUN, digest, body, Known(idle=idle), rate)
    assert found == audits_of(RUN, digest, body, Known(idle=idle), rate)
    for draw in found:
        assert len(draw.auditors) in (3, 5)
        assert not idle & {draw.target, *draw.auditors}
