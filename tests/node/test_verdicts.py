"""Whose turn it is to check a replica, from reports in the ledger alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hypothesis import given
from hypothesis import strategies as st

from thinwire.coordinator.protocol.messages import CommitBody, OfferEntry, ReportEntry
from thinwire.coordinator.protocol.trust.standing import Standing
from thinwire.node.verdicts import TURN_ROUNDS, Verdicts

RIGHT, WRONG, OTHER = b"right...", b"wrong...", b"other..."
EQUAL: Mapping[int, int] = dict.fromkeys(range(6), 10)
"""Peer -> its counted offers by round 10."""


def offer(peer: int) -> OfferEntry:
    return OfferEntry(peer=peer, n_samples=1, n_tokens=1, loss=None, n_bytes=1, payload=b"x", digest=None)


def commit(round_: int, reports: Sequence[ReportEntry] = (), peers: Sequence[int] = (0,)) -> CommitBody:
    return CommitBody(
        round=round_,
        parent=bytes(32),
        offers=tuple(map(offer, peers)),
        admitted=(),
        lr_factor_bits=0,
        reports=tuple(reports),
        snapshots=(),
        evaluator=None,
        time_ms=0,
    )


def report(peer: int, fingerprint: bytes, checked: bool = False, round_: int = 10) -> ReportEntry:
    return ReportEntry(peer=peer, round=round_, fingerprint=fingerprint, checked=checked)


def told(*reports: ReportEntry, until: int = 13, work: Mapping[int, int] = EQUAL) -> Verdicts:
    """All of them in the commit after round 10."""
    standing = Standing()
    verdicts = Verdicts(standing)
    for round_ in range(1, 11):
        standing.committed(commit(round_, peers=[peer for peer, n in work.items() if n >= round_]))
    verdicts.committed(commit(11, reports))
    for round_ in range(12, until + 1):
        verdicts.committed(commit(round_))
    return verdicts


def turns(verdicts: Verdicts, n_peers: int = 4) -> list[int]:
    return [peer for peer in range(n_peers) if verdicts.to_check(peer)]


def test_nobody_checks_when_all_are_equal() -> None:
    verdicts = told(*(report(peer, RIGHT) for peer in range(4)))
    assert turns(verdicts) == []
    assert not verdicts.differs(10)


def test_the_smallest_group_checks_first_and_joins_the_others() -> None:
    verdicts = told(report(0, RIGHT), report(1, RIGHT), report(2, WRONG), report(3, RIGHT))
    assert turns(verdicts) == [2]
    assert verdicts.to_check(2) == [10]
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
    verdicts.committed(commit(15, [report(1, RIGHT, checked=True)]))
    assert turns(verdicts) == []
    assert verdicts.differs(10), "two machines that compute different things"
    assert list(verdicts.others(0, 10)) == [1]
    assert list(verdicts.others(1, 10)) == [0]


def test_all_but_the_heaviest_group_check_at_once() -> None:
    verdicts = told(report(0, RIGHT), report(1, OTHER), report(2, WRONG), report(3, RIGHT))
    assert turns(verdicts) == [1, 2]
    verdicts.committed(commit(14, [report(1, RIGHT, checked=True), report(2, RIGHT, checked=True)]))
    assert turns(verdicts) == []


def test_work_says_which_group_is_the_heaviest() -> None:
    reports = [report(0, RIGHT), report(1, WRONG), report(2, WRONG), report(3, WRONG)]
    assert turns(told(*reports, work={0: 10, 1: 2, 2: 2, 3: 2})) == [1, 2, 3]
    assert turns(told(*reports, work=EQUAL)) == [0]


def test_who_has_not_worked_is_in_no_group() -> None:
    """However many identities say so, and say that they have checked: nobody even looks."""
    idle = [report(peer, OTHER, checked=True) for peer in (2, 3, 4)]
    verdicts = told(report(0, RIGHT), report(1, RIGHT), *idle, until=11 + TURN_ROUNDS, work={0: 10, 1: 10})
    assert turns(verdicts) == []
    assert not verdicts.differs(10)
    assert verdicts.others(0, 10) == {}


def test_nobody_s_check_stands_for_another_s() -> None:
    """One who says the same as a wrong peer, and that it has checked, does not keep that one from looking."""
    said = [report(0, RIGHT), report(1, RIGHT), report(2, WRONG), report(3, WRONG, checked=True)]
    assert turns(told(*said, work={0: 10, 1: 10, 2: 9, 3: 9})) == [0, 1, 2]


def test_what_a_replay_has_disproved_is_no_reason_to_look_again() -> None:
    verdicts = told(report(0, RIGHT), report(1, RIGHT), report(2, WRONG, checked=True))
    assert turns(verdicts) == [0, 1]
    verdicts.disproved(2, before=20)
    assert turns(verdicts) == []
    again = [report(0, RIGHT, round_=19), report(2, WRONG, checked=True, round_=19)]
    verdicts.committed(commit(20, again))
    for round_ in (21, 22):
        verdicts.committed(commit(round_))
    assert turns(verdicts) == []
    assert list(verdicts.others(0, 19)) == [2], "people are told all the same"
    verdicts.committed(commit(23, [report(0, RIGHT, round_=20), report(2, WRONG, checked=True, round_=20)]))
    assert verdicts.to_check(0) == [20]


def test_a_state_is_shared_that_somebody_else_has_and_nobody_denies() -> None:
    assert told(report(0, RIGHT), report(1, RIGHT)).is_shared(0, 10, RIGHT)
    assert not told(report(0, RIGHT)).is_shared(0, 10, RIGHT)
    assert not told(report(0, RIGHT), report(1, RIGHT), report(2, OTHER)).is_shared(0, 10, RIGHT)
    assert not told(report(1, RIGHT), report(2, RIGHT)).is_shared(0, 10, OTHER)


def test_a_report_that_is_on_its_way_is_waited_for() -> None:
    reports = [report(0, RIGHT), report(1, WRONG)]
    assert turns(told(*reports, until=11)) == []
    assert turns(told(*reports, until=12)) == [0]


def test_a_group_that_is_gone_does_not_hold_up_the_others() -> None:
    reports = [report(0, WRONG), report(1, WRONG), report(2, RIGHT)]
    assert turns(told(*reports, until=10 + TURN_ROUNDS)) == [2]
    assert turns(told(*reports, until=11 + TURN_ROUNDS)) == [0, 1, 2]


@given(st.lists(st.sampled_from([RIGHT, WRONG, OTHER]), min_size=2, max_size=6), st.randoms())
def test_whoever_was_wrong_ends_right(values: list[bytes], rng: object) -> None:
    """Every peer that checks finds RIGHT out: after at most two turns all say the same."""
    verdicts = told(*(report(peer, value) for peer, value in enumerate(values)))
    has_checked: set[int] = set()
    for round_ in range(14, 17):
        due = turns(verdicts, len(values))
        has_checked.update(due)
        verdicts.committed(commit(round_, [report(peer, RIGHT, checked=True) for peer in due]))
    assert turns(verdicts, len(values)) == []
    assert not verdicts.differs(10)
    wrong = {peer for peer, value in enumerate(values) if value != RIGHT}
    assert wrong <= has_checked or len(set(values)) == 1
