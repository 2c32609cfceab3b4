"""What peers are worth to others, from the ledger."""

from __future__ import annotations

from tests.support.records import commit_body
from thinwire.coordinator.protocol.messages import CommitBody, OfferEntry
from thinwire.coordinator.protocol.trust.standing import Standing


def offer(peer: int, n_samples: int) -> OfferEntry:
    return OfferEntry(
        peer=peer, n_samples=n_samples, n_tokens=0, loss=None, n_bytes=0, payload=b"", digest=None
    )


def commit(round_: int, *offers: OfferEntry) -> CommitBody:
    return commit_body(round_, offers=offers)


def test_work_is_what_was_counted_and_had_samples() -> None:
    standing = Standing()
    standing.committed(commit(1, offer(0, 3), offer(1, 0)))
    standing.committed(commit(2, offer(0, 1)))
    assert [standing.work(peer) for peer in range(3)] == [2, 0, 0]
    assert [standing.has_worked(peer) for peer in range(3)] == [True, False, False]
