"""What audits in the ledger make of a peer: from failed offers to a term without weight, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.audited_ledger import KEYS, PEERS, RUN, AuditedRun, Rules, bare, offer
from thinwire.coordinator.protocol.messages import AuditEntry, Verdict, digest_of, encode_record
from thinwire.coordinator.protocol.trust.drawing import Draw
from thinwire.coordinator.protocol.trust.judging import REPORT_ROUNDS
from thinwire.coordinator.protocol.trust.standing import FIRST_OFFERS, SEASONED, Standing

PASSED, FAILED = Verdict.PASSED, Verdict.FAILED


def drawn(run: AuditedRun, target: int) -> Draw:
    """Rounds until an offer of the target is to be audited by everybody drawn."""
    for _ in range(2000):
        run.commit()
        for draw in run.standing.drawn(run.standing.round):
            if draw.target == target and not draw.for_suspects:
                return draw
    raise AssertionError("never drawn")


def audit(run: AuditedRun, target: int, verdicts: str) -> Draw:
    """An audit of the target; one letter for each auditor: passed, failed, or silent."""
    draw, round_ = drawn(run, target), run.standing.round
    said = {"p": PASSED, "f": FAILED}
    run.commit(
        run.report(round_, target, auditor, said[letter])
        for auditor, letter in zip(draw.auditors, verdicts, strict=True)
        if letter in said
    )
    return draw


@pytest.mark.parametrize(
    ("verdicts", "found"),
    [
        ("fffff", (0, 1)),
        ("fffpp", (0, 1)),
        ("ffppp", (1, 0)),
        ("ppppp", (1, 0)),
        ("fff--", (0, 1)),
        ("ff---", (0, 0)),
        ("pp---", (0, 0)),
        ("ppp--", (1, 0)),
        ("ffp--", (0, 1)),
    ],
)
def test_three_reports_and_a_majority_decide(verdicts: str, found: tuple[int, int]) -> None:
    run = AuditedRun(8)
    audit(run, 2, verdicts)
    for _ in range(REPORT_ROUNDS):
        run.commit()
    assert run.standing.audited(2) == found


def test_work_counts_not_heads() -> None:
    """Three newcomers do not outvote two who have worked for long, and nobody fails an offer alone."""
    run = AuditedRun(6)
    for _ in range(60):
        run.commit(absent={3, 4, 5})
    draw = drawn(run, 0)
    round_ = run.standing.round
    assert draw.auditors == (1, 2, 3, 4, 5)
    run.commit(run.report(round_, 0, a, FAILED if a > 2 else PASSED) for a in draw.auditors)
    assert run.standing.audited(0) == (1, 0)
    old = AuditedRun(4)
    for _ in range(60):
        old.commit(absent={2, 3})
    assert drawn(old, 0).auditors == (1, 2, 3)
    round_ = old.standing.round
    old.commit(old.report(round_, 0, a, FAILED if a == 1 else PASSED) for a in (1, 2, 3))
    assert old.standing.audited(0) == (1, 0)


def _not_drawn(run: AuditedRun, draw: Draw, round_: int) -> list[AuditEntry]:
    others = set(range(8)) - {draw.target, *draw.auditors}
    return [run.report(round_, draw.target, other, FAILED) for other in others]


def _unsigned(run: AuditedRun, draw: Draw, round_: int) -> list[AuditEntry]:
    return [run.report(round_, draw.target, a, FAILED, KEYS[11]) for a in draw.auditors]


def _changed(run: AuditedRun, draw: Draw, round_: int) -> list[AuditEntry]:
    signed = [run.report(round_, draw.target, a, PASSED) for a in draw.auditors]
    return [entry.model_copy(update={"verdict": FAILED}) for entry in signed]


@pytest.mark.parametrize("invented", [_not_drawn, _unsigned, _changed])
def test_what_no_auditor_has_signed_does_not_count(
    invented: Callable[[AuditedRun, Draw, int], list[AuditEntry]],
) -> None:
    """A coordinator cannot make up reports."""
    run = AuditedRun(8)
    draw = drawn(run, 2)
    run.commit(invented(run, draw, run.standing.round))
    for _ in range(REPORT_ROUNDS):
        run.commit()
    assert run.standing.audited(2) == (0, 0)


@pytest.mark.parametrize(("n_late", "found"), [(REPORT_ROUNDS, (0, 1)), (REPORT_ROUNDS + 1, (0, 0))])
def test_reports_count_for_some_rounds(n_late: int, found: tuple[int, int]) -> None:
    run = AuditedRun(8)
    draw, round_ = drawn(run, 2), run.standing.round
    for _ in range(n_late - 1):
        run.commit()
    run.commit(run.report(round_, 2, a, FAILED) for a in draw.auditors)
    run.commit()
    assert run.standing.audited(2) == found
    assert not run.standing.awaits(round_, 2, draw.auditors[0])


def test_a_second_report_of_the_same_auditor_does_not_count() -> None:
    run = AuditedRun(8)
    draw, round_ = drawn(run, 2), run.standing.round
    first, second, *_ = draw.auditors
    run.commit([run.report(round_, 2, first, PASSED), run.report(round_, 2, second, PASSED)])
    for _ in range(3):
        run.commit([run.report(round_, 2, first, FAILED), run.report(round_, 2, second, FAILED)])
    for _ in range(REPORT_ROUNDS):
        run.commit()
    assert run.standing.audited(2) == (0, 0), "two auditors are no three"


def test_too_many_failures_cost_the_weight_from_the_next_round_on_and_for_a_term() -> None:
    run = AuditedRun(8, Rules(failures=2, window_rounds=100))
    audit(run, 2, "fffff")
    assert not run.standing.is_condemned(2)
    audit(run, 2, "fffff")
    at = run.standing.round
    assert run.standing.condemned_in(at) == frozenset()
    assert run.standing.condemned_in(at + 1) == {2}
    assert run.standing.changed() == ([2], [])
    assert run.standing.condemned_until(2) == at + 100
    assert not run.standing.has_worked(2)
    work = run.standing.work(2)
    for _ in range(99):
        run.commit()
    assert run.standing.condemned_in(at + 100) == {2}
    run.commit()
    assert run.standing.changed() == ([], [2])
    assert run.standing.work(2) == work, "what it did meanwhile is no work"
    assert run.standing.has_worked(2)
    assert run.standing.is_suspect(2), "until it has passed an audit"
    run.commit()
    assert run.standing.work(2) == work + 1
    audit(run, 2, "fffff")
    assert not run.standing.is_condemned(2), "the old failures are forgotten"
    audit(run, 2, "fffff")
    again = run.standing.round
    assert run.standing.condemned_until(2) == again + 200, "twice as long as the first time"
    assert run.standing.condemned_in(at + 1) == {2}
    assert run.standing.condemned_in(at + 101) == frozenset()


def test_newcomers_are_suspect_until_they_pass_and_who_fails_for_a_while() -> None:
    run = AuditedRun(8, Rules(failures=2, window_rounds=30))
    run.commit()
    assert run.standing.is_suspect(2)
    audit(run, 2, "ppppp")
    assert not run.standing.is_suspect(2)
    audit(run, 2, "fffff")
    assert run.standing.is_suspect(2)
    for _ in range(30):
        run.commit()
    assert not run.standing.is_suspect(2)


def test_a_peer_is_fresh_until_it_passes_or_has_worked() -> None:
    run = AuditedRun(8)
    run.commit()
    assert all(run.standing.is_fresh(peer) for peer in range(8))
    while run.standing.audited(2) == (0, 0):
        run.live(1, lambda _auditor, _target: PASSED)
    assert not run.standing.is_fresh(2)
    never = AuditedRun(8)
    never.live(FIRST_OFFERS, lambda _auditor, _target: None)
    assert never.standing.is_fresh(2)
    never.commit(absent={3})
    assert (never.standing.is_fresh(2), never.standing.is_fresh(3)) == (False, True)


def test_a_peer_is_new_while_its_last_audit_has_not_passed() -> None:
    run, turns = AuditedRun(8, Rules(failures=2)), list[int]()
    for verdicts in ("ppppp", "ppppp", "fffff", "ppppp", "fffff", "fffff"):
        audit(run, 2, verdicts)
        turns.append(run.standing.round + 1)
    first, _, failed, again, last, _ = turns
    assert run.standing.is_condemned(2)
    for round_ in range(1, run.standing.round + 2):
        is_known = first <= round_ < failed or again <= round_ < last
        assert run.standing.is_new_in(2, round_) == (not is_known)
    assert run.standing.is_new_in(9, 1), "whoever it is"


def test_nobody_is_new_before_half_are_known_and_who_fails_weighs_nothing() -> None:
    """In runs with a budget for newcomers."""
    rules = Rules(rate=0.01, newcomers_rate=1.0, newcomers_budget=10.0, window_rounds=30)
    run = AuditedRun(8, rules)
    new, failed = dict[int, set[int]](), dict[int, set[int]]()
    for _ in range(60):
        run.live(1, lambda _auditor, target: FAILED if target == 2 else PASSED)
        round_ = run.standing.round + 1
        new[round_] = {peer for peer in range(8) if run.standing.is_new_in(peer, round_)}
        failed[round_] = {peer for peer in range(8) if run.standing.has_failed_in(peer, round_)}
    settled = min(round_ for round_, peers in new.items() if peers)
    assert settled <= 6
    assert len(new[settled]) <= 4
    assert all(2 in peers for round_, peers in new.items() if round_ >= settled), "after its term, too"
    first = min(round_ for round_, peers in failed.items() if peers)
    assert first <= 6
    assert all(peers == {2} for round_, peers in failed.items() if round_ >= first)
    assert 2 in run.standing.condemned_in(10)
    for round_ in new:
        assert new[round_] == {peer for peer in range(8) if run.standing.is_new_in(peer, round_)}
        assert failed[round_] == {peer for peer in range(8) if run.standing.has_failed_in(peer, round_)}
    run.live(40, lambda _auditor, _target: PASSED)
    assert run.standing.round > 60
    assert not run.standing.has_failed_in(2, run.standing.round + 1), "it has passed one since"
    # In older runs a failure alone changes no weight.
    older = AuditedRun(8)
    audit(older, 2, "fffff")
    assert not older.standing.has_failed_in(2, older.standing.round + 1)


def test_nobody_is_new_where_nobody_could_audit_it() -> None:
    run = AuditedRun(4, Rules(rate=0.01, newcomers_rate=1.0, newcomers_budget=10.0))
    run.live(10, lambda _auditor, _target: PASSED)
    run.n_peers = 5
    assert run.standing.new_among(run.commit()) == {4}
    assert run.standing.new_among(run.commit(absent={0})) == {4}
    assert run.standing.new_among(run.commit(absent={0, 1})) == frozenset()
    assert run.standing.new_among(run.commit()) == {4}


def test_who_has_worked_among_too_few_for_audits_is_known_to_those_who_come_later() -> None:
    run = AuditedRun(3, Rules(rate=0.01, newcomers_rate=1.0, newcomers_budget=10.0))
    for _ in range(SEASONED):
        assert not run.standing.new_among(run.commit())
    run.n_peers = 12
    assert run.standing.new_among(run.commit()) == set(range(3, 12))
    own_data = Standing(RUN, Rules(newcomers_budget=10.0, own_data_auditors=False))
    for round_ in range(1, SEASONED + 2):
        body = bare(round_, [offer(p, own_data=p == 3) for p in range(4)])
        own_data.committed(body, digest_of(b"%d" % round_))
    assert own_data.new_among(body) == {3}
    run.live(10, lambda auditor, target: PASSED if (auditor < 3) == (target < 3) else FAILED)
    assert run.standing.condemned_in(run.standing.round + 1) > set()
    assert not any(run.standing.audited(peer)[1] for peer in range(3)), "newcomers alone fail nobody"


def test_in_a_flood_newcomers_weigh_nothing_before_they_have_passed() -> None:
    rules = Rules(0.01, newcomers_rate=1.0, newcomers_budget=10.0, flood_failures=6)
    known, liars = frozenset(range(4)), frozenset(range(4, 12))
    runs = AuditedRun(4, rules), AuditedRun(4, replace(rules, flood_failures=0))
    for run in runs:
        run.live(10, lambda _auditor, _target: PASSED)
        run.n_peers = 12
    run, older = runs
    while run.standing.flood_turns() is None:
        for each in runs:
            each.live(1, lambda _auditor, target: FAILED if target in liars else PASSED)
    assert run.standing.flood_turns()
    assert run.standing.round <= 14
    assert not run.standing.weightless_among(run.bodies[10]), "the round in which they came"
    bodies = [run.commit(), run.commit(absent=known)]
    assert run.standing.weightless_among(bodies[0]) == liars, "not only those whose audits are decided"
    assert run.standing.weightless_among(bodies[1]) < liars, "where nobody else is"
    assert older.standing.weightless_among(older.commit()) < liars
    run.live(20, lambda _auditor, target: FAILED if target in liars else PASSED)
    assert run.standing.weightless_among(bodies[0]) == liars, "later, too"


def test_old_failures_are_forgotten() -> None:
    run = AuditedRun(8, Rules(failures=2, window_rounds=30))
    audit(run, 2, "fffff")
    for _ in range(30):
        run.commit()
    audit(run, 2, "fffff")
    assert not run.standing.is_condemned(2)


def test_who_passes_more_often_than_it_fails_keeps_its_weight() -> None:
    run = AuditedRun(8, Rules(failures=2, window_rounds=10_000))
    for verdicts in ("ppppp", "ppppp", "ppppp", "fffff", "fffff"):
        audit(run, 2, verdicts)
    assert not run.standing.is_condemned(2)
    audit(run, 2, "fffff")
    assert run.standing.is_condemned(2)


def test_who_turns_bad_after_any_number_of_passes_is_out_after_a_few_failures() -> None:
    run = AuditedRun(8, Rules(failures=2, window_rounds=10_000))
    for _ in range(12):
        audit(run, 2, "ppppp")
    for _ in range(3):
        audit(run, 2, "fffff")
    assert not run.standing.is_condemned(2)
    audit(run, 2, "fffff")
    assert run.standing.is_condemned(2)


def test_what_condemned_peers_say_is_not_heard() -> None:
    run = AuditedRun(8, Rules(failures=2, window_rounds=10_000))
    late = next(draw for _ in range(500) if 2 in (draw := drawn(run, 0)).auditors)
    round_ = run.standing.round
    run.commit([run.report(round_, 0, 2, FAILED)])
    while not run.standing.is_condemned(2) and run.standing.round < round_ + REPORT_ROUNDS - 2:
        for draw in run.standing.drawn(run.standing.round):
            if draw.target == 2:
                run.commit(run.report(run.standing.round, 2, a, FAILED) for a in draw.auditors)
        run.commit()
    if not run.standing.is_condemned(2):
        pytest.fail("this ledger does not draw the peer often enough: choose another target")
    others = [a for a in late.auditors if a != 2][:2]
    run.commit(run.report(round_, 0, a, FAILED) for a in others)
    for _ in range(REPORT_ROUNDS):
        run.commit()
    assert run.standing.audited(0) == (0, 0), "two are heard, and two prove nothing"


@pytest.mark.parametrize(("n_peers", "bad"), [(4, {3}), (8, {6, 7})])
def test_colluding_minorities_are_out_and_condemn_nobody(n_peers: int, bad: set[int]) -> None:
    """Liars say the contrary of the truth of everybody: honest offers failed, each other's passed."""
    run = AuditedRun(n_peers)
    run.live(200, lambda auditor, target: FAILED if (target in bad) != (auditor in bad) else PASSED)
    assert run.standing.condemned_in(run.standing.round) <= bad
    ever = {peer for peer in range(n_peers) if run.standing.audited(peer)[1] > 0}
    assert ever == bad


def test_a_commit_that_is_known_changes_nothing_and_a_gap_is_refused() -> None:
    run = AuditedRun(8)
    run.live(50, lambda _auditor, target: FAILED if target == 2 else PASSED)
    before = [run.standing.work(p) for p in range(8)], [run.standing.audited(p) for p in range(8)]
    for body in run.bodies:
        run.standing.committed(body, digest_of(encode_record(body)))
    assert before == ([run.standing.work(p) for p in range(8)], [run.standing.audited(p) for p in range(8)])
    with pytest.raises(ValueError, match="in order"):
        run.standing.committed(bare(60, [offer(0)]), digest_of(b""))
    with pytest.raises(ValueError, match="not known"):
        run.standing.condemned_in(run.standing.round + 2)


def test_a_run_without_audits_condemns_nobody() -> None:
    run = AuditedRun(8)
    run.live(100, lambda _auditor, target: FAILED if target == 2 else PASSED)
    assert run.standing.is_condemned(2)
    plain = Standing(RUN)
    for body in run.bodies:
        plain.committed(body)
        assert plain.condemned_in(body.round + 1) == frozenset()
    assert plain.work(2) == 100


def test_everybody_that_reads_the_ledger_says_the_same() -> None:
    run = AuditedRun(8, Rules(window_rounds=20))
    terms = dict[int, frozenset[int]]()
    for _ in range(300):
        run.live(1, lambda _auditor, target: FAILED if target in (2, 5) else PASSED)
        terms[run.standing.round + 1] = run.standing.condemned_in(run.standing.round + 1)
    assert any(terms.values())
    again = Standing(RUN, Rules(window_rounds=20))
    for body in run.bodies:
        again.committed(body, digest_of(encode_record(body)))
    # Of rounds long past, too: a replay asks from the beginning.
    assert all(again.condemned_in(round_) == found for round_, found in terms.items())


def test_it_stays_small() -> None:
    run = AuditedRun(8, Rules(failures=1, window_rounds=1))
    run.live(1500, lambda _auditor, target: FAILED if target == 2 else PASSED)
    standing = run.standing
    assert len(standing._ever) < 12, "terms double"
    assert len(standing._drawn) <= REPORT_ROUNDS
    assert len(standing._judging._open) < 8 * REPORT_ROUNDS
    assert all(len(tried.judged) <= 4 for tried in standing._tried.values())


ENTRIES = st.builds(
    AuditEntry,
    round=st.integers(1, 12),
    target=st.integers(0, 9),
    auditor=st.integers(0, 9),
    verdict=st.sampled_from(Verdict),
    signature=st.binary(min_size=64, max_size=64),
)


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), min_size=1, max_size=12),
            st.lists(ENTRIES, max_size=6, unique_by=lambda a: (a.round, a.target, a.auditor)),
            st.lists(st.booleans(), min_size=10, max_size=10),
        ),
        max_size=12,
    )
)
def test_no_sequence_of_commits_is_an_error(
    rounds: list[tuple[list[tuple[int, int]], list[AuditEntry], list[bool]]],
) -> None:
    """Any offers, any entries, and some that auditors have really signed."""
    run = AuditedRun(10, Rules(failures=1, window_rounds=3))
    for offers, entries, failed in rounds:
        standing, round_ = run.standing, len(run.bodies) + 1
        signed = {
            (draw.target, auditor): run.report(
                round_ - 1, draw.target, auditor, FAILED if failed[auditor] else PASSED
            )
            for draw in standing.drawn(round_ - 1)
            for auditor in draw.auditors
        }
        known = {(a.round, a.target, a.auditor) for a in signed.values()}
        rest = [a for a in entries if (a.round, a.target, a.auditor) not in known]
        body = bare(round_, [offer(p, n, round_) for p, n in offers], [*signed.values(), *rest][:256])
        run.bodies.append(body)
        standing.committed(body, digest_of(encode_record(body)))
        now = standing.condemned_in(round_ + 1)
        assert all(not standing.has_worked(peer) for peer in now)
        assert all(standing.condemned_until(peer) is not None for peer in now)
    assert len(PEERS) > 9
