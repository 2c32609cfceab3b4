"""Which snapshots the ledger vouches for: told by a script of commits, and by any history at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hypothesis import given
from hypothesis import strategies as st

from thinwire.coordinator.protocol.attested import KEPT, Attested, Snapshots
from thinwire.coordinator.protocol.messages import CommitBody, OfferEntry, SnapshotEntry
from thinwire.coordinator.protocol.trust.standing import Standing

A, B, C = (bytes([letter]) * 32 for letter in b"ABC")
Reported = tuple[int, int, bytes]
"""Peer, round, manifest."""


def commit(round_: int, n_peers: int, reported: Iterable[Reported] = ()) -> CommitBody:
    offers = tuple(
        OfferEntry(peer=peer, n_samples=1, n_tokens=1, loss=None, n_bytes=1, payload=b"x", digest=None)
        for peer in range(n_peers)
    )
    return CommitBody(
        round=round_,
        parent=bytes(32),
        offers=offers,
        admitted=(),
        lr_factor_bits=0,
        reports=(),
        snapshots=tuple(
            SnapshotEntry(peer=peer, round=at, manifest=manifest, n_bytes=at * 100)
            for peer, at, manifest in reported
        ),
        evaluator=None,
        time_ms=0,
    )


class Fed(Snapshots):
    """With a standing of its own."""

    def __init__(self, every: int) -> None:
        self.standing = Standing()
        super().__init__(every, self.standing)

    def committed(self, body: CommitBody) -> None:
        self.standing.committed(body)
        super().committed(body)


def fed(n_rounds: int, reported: dict[int, list[Reported]], every: int = 2, n_peers: int = 3) -> Fed:
    snapshots = Fed(every)
    for round_ in range(1, n_rounds + 1):
        snapshots.committed(commit(round_, n_peers, reported.get(round_, ())))
    return snapshots


def test_two_peers_attest_a_snapshot() -> None:
    alone = fed(3, {3: [(1, 2, A)]})
    assert alone.newest() is None
    assert alone.attested() == []
    assert fed(3, {3: [(1, 2, A), (0, 2, B)]}).newest() is None
    both = fed(5, {3: [(1, 2, A)], 5: [(0, 2, A)]})
    assert both.attested() == [Attested(round=2, manifest=A, n_bytes=200, peers=(0, 1))]


def test_one_is_enough_where_there_was_one() -> None:
    assert fed(3, {3: [(0, 2, A)]}, n_peers=1).newest() == Attested(2, A, 200, (0,))
    stranger = fed(4, {3: [(0, 2, A)], 4: [(1, 2, B)]}, n_peers=1)
    assert stranger.newest() == Attested(2, A, 200, (0,))
    doubtful = Fed(2)
    for body in (commit(1, 2), commit(2, 1), commit(3, 1, [(0, 2, A), (1, 2, B)])):
        doubtful.committed(body)
    assert doubtful.newest() is None


def test_the_same_manifest_with_another_size_is_another_one() -> None:
    snapshots = Fed(2)
    for round_ in (1, 2):
        snapshots.committed(commit(round_, 2))
    said = commit(3, 2, [(0, 2, A), (1, 2, A)])
    smaller = said.snapshots[1].model_copy(update={"n_bytes": 1})
    snapshots.committed(said.model_copy(update={"snapshots": (said.snapshots[0], smaller)}))
    assert snapshots.newest() is None


def test_other_rounds_and_the_future_do_not_count() -> None:
    snapshots = fed(4, {4: [(peer, at, A) for peer in (0, 1) for at in (0, 1, 3, 6)]})
    assert snapshots.attested() == []
    assert [round_ for round_ in range(8) if snapshots.is_known(round_)] == [2, 4]


def test_a_later_report_replaces_the_earlier_one() -> None:
    healed = fed(5, {3: [(0, 2, A), (1, 2, B)], 5: [(1, 2, A)]})
    assert healed.newest() == Attested(2, A, 200, (0, 1))
    taken_back = fed(5, {3: [(0, 2, A), (1, 2, A)], 5: [(1, 2, B)]})
    assert taken_back.newest() is None
    assert taken_back.reported(1, 2) == (B, 200)
    assert taken_back.reported(2, 2) is None


def test_a_report_of_no_bytes_takes_it_back() -> None:
    snapshots = fed(3, {3: [(0, 2, A), (1, 2, A)]})
    said = commit(4, 3, [(1, 2, A)])
    nothing = said.snapshots[0].model_copy(update={"n_bytes": 0})
    snapshots.committed(said.model_copy(update={"snapshots": (nothing,)}))
    assert snapshots.newest() is None
    snapshots.committed(commit(5, 3, [(2, 2, A)]))
    assert snapshots.newest() == Attested(2, A, 200, (0, 2))


def test_more_than_half_of_the_work_that_reported_decides() -> None:
    said = [(peer, 2, manifest) for peer, manifest in enumerate((C, C, B, B, A, A, A))]
    assert fed(3, {3: said}, n_peers=7).newest() is None, "three of seven"
    assert fed(3, {3: said[:4]}, n_peers=7).newest() is None, "two against two"
    assert fed(3, {3: said[2:]}, n_peers=7).newest() == Attested(2, A, 200, (4, 5, 6))


def test_identities_that_never_worked_attest_nothing() -> None:
    """Four of them against three that train: neither before the honest ones report nor after."""
    idle = [(peer, 2, B) for peer in range(3, 7)]
    assert fed(3, {3: idle}).newest() is None
    honest = [(peer, 2, A) for peer in range(3)]
    assert fed(4, {3: idle, 4: honest}).newest() == Attested(2, A, 200, (0, 1, 2))
    assert fed(3, {3: idle}).reported(3, 2) is None


def with_work(work: Mapping[int, int], *reports: list[Reported]) -> Fed:
    """Of round 40, by peers that have so many counted offers by then; the later ones in later commits."""
    snapshots = Fed(40)
    for round_ in range(1, 41):
        body = commit(round_, max(work) + 1)
        offers = tuple(offer for offer in body.offers if round_ > 40 - work.get(offer.peer, 0))
        snapshots.committed(body.model_copy(update={"offers": offers}))
    for i, reported in enumerate(reports, 41):
        snapshots.committed(commit(i, 1, reported))
    return snapshots


def test_work_weighs_not_the_number_of_peers() -> None:
    work = {0: 40, 1: 40, **dict.fromkeys(range(2, 8), 10)}
    bad = [(peer, 40, B) for peer in range(2, 8)]
    assert with_work(work, [(0, 40, A), (1, 40, A), *bad]).newest() == Attested(40, A, 4000, (0, 1))
    assert with_work({0: 40, 1: 3, 2: 3}, [(0, 40, A), (1, 40, B), (2, 40, B)]).newest() is None, "one alone"


def test_a_few_that_report_first_do_not_decide_alone() -> None:
    work = {**dict.fromkeys(range(6), 40), 6: 30, 7: 30}
    early = [(6, 40, B), (7, 40, B)]
    assert with_work(work, early).newest() is None, "a fifth of the work of that round"
    honest = [(peer, 40, A) for peer in range(6)]
    assert with_work(work, early, honest).newest() == Attested(40, A, 4000, tuple(range(6)))


def test_only_the_newest_are_remembered_and_what_may_still_be_attested() -> None:
    reported = {r: [(p, r - 1, A) for p in (0, 1)] for r in (3, 5, 7, 9, 11)}
    reported[12] = [(0, 4, B), (0, 12, C)]  # round 4 is forgotten already
    snapshots = fed(12, reported)
    assert [a.round for a in snapshots.attested()] == [6, 8, 10]
    assert len(snapshots.attested()) == KEPT
    assert not snapshots.is_known(4)
    assert snapshots.is_known(12)
    snapshots.committed(commit(13, 3, [(1, 12, C)]))
    assert [a.round for a in snapshots.attested()] == [8, 10, 12]


def is_vouched(reported: Mapping[int, bytes], n_counted: int) -> bool:
    """`reported`: by peers that have worked as much as each other."""
    manifests = list(reported.values())
    if n_counted == 1 and len(set(manifests)) == 1:
        return True
    most = max(map(manifests.count, manifests), default=0)
    return most > 1 and 2 * most > len(manifests) and 4 * most >= n_counted


REPORTS = st.lists(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20), st.sampled_from([A, B])), max_size=6),
    max_size=20,
)


@given(REPORTS, st.integers(1, 3), st.integers(1, 4))
def test_any_history(history: list[list[Reported]], every: int, n_peers: int) -> None:
    """What is attested is what a look at all reports on remembered rounds at once finds."""
    snapshots = Fed(every)
    last: dict[int, dict[int, bytes]] = {}
    for round_, reported in enumerate(history, 1):
        snapshots.committed(commit(round_, n_peers, reported))
        for peer, at, manifest in reported:
            if at % every == 0 and 0 < at <= round_ and peer < n_peers:
                last.setdefault(at, {})[peer] = manifest
        found = snapshots.attested()
        vouched = {at for at, by_peer in last.items() if is_vouched(by_peer, n_peers)}
        assert [a.round for a in found] == sorted(at for at in vouched if snapshots.is_known(at))
        assert len(found) <= KEPT
        assert snapshots.newest() == (found[-1] if found else None)
        for a in found:
            assert {p for p, manifest in last[a.round].items() if manifest == a.manifest} == set(a.peers)
