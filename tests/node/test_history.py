"""What a node reads out of the ledger: who is who, which snapshots count, what the way to the head costs."""

from __future__ import annotations

from collections.abc import Sequence

from thinwire.coordinator.protocol.messages import (
    Admission,
    Commit,
    CommitBody,
    OfferEntry,
    ReportEntry,
    SnapshotEntry,
    encode_record,
)
from thinwire.node.history import History

RUN = b"r" * 32
EVERY = 4
ROUND_COST = 1000
BLOB = 500


def offers(n_peers: int, n_bytes: int) -> tuple[OfferEntry, ...]:
    payload, digest = (b"x", None) if n_bytes == 1 else (None, b"d" * 32)
    return tuple(
        OfferEntry(
            peer=i, n_samples=1, n_tokens=1, loss=None, n_bytes=n_bytes, payload=payload, digest=digest
        )
        for i in range(n_peers)
    )


def commit(
    round_: int,
    n_bytes: int = BLOB,
    snapshots: Sequence[SnapshotEntry] = (),
    reports: Sequence[ReportEntry] = (),
    n_peers: int = 2,
) -> Commit:
    body = CommitBody(
        round=round_,
        parent=RUN,
        offers=offers(n_peers, n_bytes),
        admitted=tuple(Admission(index=i, peer_id=f"peer-{i}") for i in range(2)) if round_ == 1 else (),
        lr_factor_bits=0,
        reports=tuple(reports),
        snapshots=tuple(snapshots),
        evaluator=None,
        time_ms=0,
    )
    return Commit(record=encode_record(body), signature=bytes(64))


def snapshot(round_: int, *peers: int, manifest: bytes = b"m" * 32, n_bytes: int = 9) -> list[SnapshotEntry]:
    return [SnapshotEntry(peer=p, round=round_, manifest=manifest, n_bytes=n_bytes) for p in peers]


def history(*commits: Commit) -> History:
    found = History(RUN, EVERY, ROUND_COST)
    for c in commits:
        found.add(c)
    return found


def test_commits_are_known_once_and_by_their_digest() -> None:
    first, second = commit(1), commit(2)
    found = history(first, second, first)
    assert found.round == 2
    assert found.peers == {0: "peer-0", 1: "peer-1"}
    assert [found.digest_at(r) for r in (0, 1, 2, 3)] == [RUN, first.digest, second.digest, None]


def test_a_round_costs_its_bytes_and_the_work_unless_the_ledger_holds_all_of_it() -> None:
    found = history(commit(1, n_bytes=1), commit(2), commit(3, n_bytes=1), commit(4))
    cost = 2 * BLOB + ROUND_COST
    assert [found.cost_bytes(after) for after in range(5)] == [2 * cost, 2 * cost, cost, cost, 0]
    assert [found.first_blob(after) for after in range(5)] == [2, 2, 4, 4, None]


def test_payloads_are_counted_on_since_the_second_newest_attested_snapshot() -> None:
    rounds = [
        commit(r, snapshots=snapshot(r - 1, 0, 1) if r % EVERY == 1 and r > 1 else ()) for r in range(1, 14)
    ]
    assert history(*rounds[:8]).kept_from() == 1
    assert history(*rounds[:9]).kept_from() == 5
    assert history(*rounds).kept_from() == 9
    assert [a.round for a in history(*rounds).attested()] == [4, 8, 12]


def test_one_peer_s_word_is_none_while_replicas_differ_or_once_it_was_taken_back() -> None:
    alone = [commit(r, n_peers=1) for r in range(1, 5)]
    said = commit(5, snapshots=snapshot(4, 0), n_peers=1)
    assert [a.round for a in history(*alone, said).attested()] == [4]
    differ = [ReportEntry(peer=p, round=4, fingerprint=bytes([p]) * 8, checked=False) for p in range(2)]
    assert history(*alone, said, commit(6, reports=differ)).attested() == []
    shared = commit(6, snapshots=snapshot(4, 1), reports=differ)
    assert [a.peers for a in history(*alone, said, shared).attested()] == [(0, 1)]
    back = commit(6, snapshots=snapshot(4, 0, n_bytes=0))
    assert history(*alone, said, back).attested() == []


def test_an_index_is_a_peer_s_own_once_a_commit_admits_it() -> None:
    found = History(RUN, EVERY, ROUND_COST)
    assert found.index_of("peer-1") is None, "another coordinator may give it to another peer"
    found.add(commit(1))
    assert (found.index_of("peer-1"), found.index_of("peer-2")) == (1, None)
