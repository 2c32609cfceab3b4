"""Whose turn it is to check a replica, from reports in the ledger alone."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from thinwire.coordinator.protocol.messages import CommitBody, OfferEntry, ReportEntry
from thinwire.node.verdicts import TURN_ROUNDS, Verdicts

RIGHT, WRONG, OTHER = b"right...", b"wrong...", b"other..."
OFFER = OfferEntry(peer=0, n_samples=1, n_tokens=1, loss=None, n_bytes=1, payload=b"x", digest=None)


def commit(round_: int, reports: Sequence[ReportEntry] = ()) -> CommitBody:
    return CommitBody(
        round=round_,
        parent=bytes(32),
        offers=(OFFER,),
        admitted=(),
        lr_factor_bits=0,
        reports=tuple(reports),
        snapshots=(),
        evaluator=None,
        time_ms=0,
    )


def report(peer: int, fingerprint: bytes, checked: bool = False, round_: int = 10) -> ReportEntry:
    return ReportEntry(peer=peer, round=round_, fingerprint=fingerprint, checked=checked)


def told(*reports: ReportEntry, until: int = 13) -> Verdicts:
    """All of them in the commit after round 10."""
    verdicts = Verdicts()
    verdicts.committed(commit(11, reports))
    for round_ in range(12, until + 1):
        verdicts.committed(commit(round_))
    return verdicts


def turns(verdicts: Verdicts, n_peers: int = 4) -> list[int]:
    return [peer for peer in range(n_peers) if verdicts.to_check(peer, 1)]


def test_nobody_checks_when_all_are_equal() -> None:
    verdicts = told(*(report(peer, RIGHT) for peer in range(4)))
    assert turns(verdicts) == []
    assert not verdicts.differs(10)


def test_the_smallest_group_checks_first_and_joins_the_others() -> None:
    verdicts = told(report(0, RIGHT), report(1, RIGHT), report(2, WRONG), report(3, RIGHT))
    assert turns(verdicts) == [2]
    assert verdicts.to_check(2, oldest=10) == [10]
    assert verdicts.to_check(2, oldest=11) == [], "its payloads are gone"
    verdicts.committed(commit(14, [report(2, RIGHT, checked=True)]))
    assert turns(verdicts) == []
    assert not verdicts.differs(10)


def test_the_majority_checks_when_the_smallest_group_was_right() -> None:
    verdicts = told(report(0, WRONG), report(1, WRONG), report(2, RIGHT), report(3, WRONG))
    assert turns(verdicts) == [2]
    verdicts.committed(commit(14, [report(2, RIGHT, checked=True)]))
    assert turns(verdicts) == [0, 1, 3]
    verdicts.committed(commit(15, [report(peer, RIGHT, checked=True) for peer in (0, 1, 3)]))
    assert turns(verdicts) == []


def test_one_against_one_the_lower_index_begins() -> None:
    verdicts = told(report(1, RIGHT), report(0, WRONG))
    assert turns(verdicts) == [0]
    verdicts.committed(commit(14, [report(0, WRONG, checked=True)]))
    assert turns(verdicts) == [1]
    assert verdicts.undecided(1) is None
    verdicts.committed(commit(15, [report(1, RIGHT, checked=True)]))
    assert turns(verdicts) == []
    assert verdicts.undecided(1) == 10, "two machines that compute different things"
    assert verdicts.smallest_group(10) == {0}


def test_three_groups_one_after_the_other() -> None:
    verdicts = told(report(0, RIGHT), report(1, OTHER), report(2, WRONG), report(3, RIGHT))
    assert turns(verdicts) == [1]
    verdicts.committed(commit(14, [report(1, RIGHT, checked=True)]))
    assert turns(verdicts) == [2]
    verdicts.committed(commit(15, [report(2, RIGHT, checked=True)]))
    assert turns(verdicts) == []


def test_a_report_that_is_on_its_way_is_waited_for() -> None:
    reports = [report(0, RIGHT), report(1, WRONG)]
    assert turns(told(*reports, until=11)) == []
    assert turns(told(*reports, until=12)) == [0]


def test_a_group_that_is_gone_does_not_hold_up_the_others() -> None:
    reports = [report(0, WRONG), report(1, WRONG), report(2, RIGHT)]
    assert turns(told(*reports, until=10 + TURN_ROUNDS)) == [2]
    assert turns(told(*reports, until=11 + TURN_ROUNDS)) == [0, 1]


@given(st.lists(st.sampled_from([RIGHT, WRONG, OTHER]), min_size=2, max_size=6), st.randoms())
def test_whoever_was_wrong_ends_right(values: list[bytes], rng: object) -> None:
    """Every peer that checks finds RIGHT out: after at most one turn for each group all say the same."""
    verdicts = told(*(report(peer, value) for peer, value in enumerate(values)))
    has_checked: set[int] = set()
    for round_ in range(14, 20):
        due = turns(verdicts, len(values))
        has_checked.update(due)
        verdicts.committed(commit(round_, [report(peer, RIGHT, checked=True) for peer in due]))
    assert turns(verdicts, len(values)) == []
    assert not verdicts.differs(10)
    wrong = {peer for peer, value in enumerate(values) if value != RIGHT}
    assert wrong <= has_checked or len(set(values)) == 1
