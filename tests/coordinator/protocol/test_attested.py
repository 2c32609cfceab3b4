"""Which snapshots the ledger vouches for: told by a script of commits, and by any history at all."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from thinwire.coordinator.protocol.attested import KEPT, Attested, Snapshots
from thinwire.coordinator.protocol.messages import CommitBody, OfferEntry, SnapshotEntry

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


def fed(n_rounds: int, reported: dict[int, list[Reported]], every: int = 2, n_peers: int = 3) -> Snapshots:
    snapshots = Snapshots(every)
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
    doubtful = fed(4, {3: [(0, 2, A)], 4: [(1, 2, B)]}, n_peers=1)
    assert doubtful.newest() is None


def test_the_same_manifest_with_another_size_is_another_one() -> None:
    snapshots = Snapshots(2)
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


def test_of_two_that_are_attested_more_peers_decide_then_the_digest() -> None:
    said = [(peer, 2, manifest) for peer, manifest in enumerate((C, C, B, B, A, A, A))]
    assert fed(3, {3: said}, n_peers=7).attested() == [Attested(2, A, 200, (4, 5, 6))]
    assert fed(3, {3: said[:4]}, n_peers=7).attested() == [Attested(2, B, 200, (2, 3))]


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


def is_vouched(manifests: list[bytes], n_counted: int) -> bool:
    is_undisputed = n_counted == 1 and len(set(manifests)) == 1
    return is_undisputed or any(manifests.count(manifest) > 1 for manifest in manifests)


REPORTS = st.lists(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20), st.sampled_from([A, B])), max_size=6),
    max_size=20,
)


@given(REPORTS, st.integers(1, 3), st.integers(1, 4))
def test_any_history(history: list[list[Reported]], every: int, n_peers: int) -> None:
    """What is attested is what a look at all reports on remembered rounds at once finds."""
    snapshots = Snapshots(every)
    last: dict[int, dict[int, bytes]] = {}
    for round_, reported in enumerate(history, 1):
        snapshots.committed(commit(round_, n_peers, reported))
        for peer, at, manifest in reported:
            if at % every == 0 and 0 < at <= round_:
                last.setdefault(at, {})[peer] = manifest
        found = snapshots.attested()
        vouched = {at for at, by_peer in last.items() if is_vouched(list(by_peer.values()), n_peers)}
        assert [a.round for a in found] == sorted(at for at in vouched if snapshots.is_known(at))
        assert len(found) <= KEPT
        assert snapshots.newest() == (found[-1] if found else None)
        for a in found:
            assert {p for p, manifest in last[a.round].items() if manifest == a.manifest} == set(a.peers)
