"""What a coordinator knows again after a restart: all of it comes from the ledger."""

from __future__ import annotations

from dataclasses import dataclass

from ..compression.errors import ConfigError
from .blobs import BlobStore
from .ledger import Ledger
from .observe.page_history import PageHistory
from .observe.run_statistics import RunStatistics
from .reports import Reports
from .retention import PayloadRetention

RECALLED_COMMITS = 3
"""The peers of this many last commits stay expected for a while."""


@dataclass(frozen=True, slots=True)
class Recalled:
    """`training`: peers of the last commits; `evaluator`: the last one named; `resting`: the head's."""

    training: frozenset[int]
    evaluator: int | None
    resting: int | None


def recall(
    ledger: Ledger,
    blobs: BlobStore,
    statistics: RunStatistics,
    retention: PayloadRetention,
    reports: Reports,
    page_history: PageHistory,
) -> Recalled:
    """Reads the whole ledger once. Raises ConfigError if a blob of the run's own is not in the store."""
    training: set[int] = set()
    evaluator = resting = None
    for commit in ledger.all_commits():
        body = commit.body
        statistics.committed(body)
        page_history.committed(commit)
        reports.recall(body)
        if body.round > ledger.head_round - RECALLED_COMMITS:
            training.update(offer.peer for offer in body.offers)
        retention.recall(body)
        resting = body.evaluator
        evaluator = evaluator if resting is None else resting
    for round_, loss in ledger.held_out():
        page_history.trend.held_out(round_, loss)
    for ref in (ledger.genesis.base, ledger.genesis.held_out, ledger.genesis.corpus):
        if ref is None:
            continue
        if ref.digest not in blobs:
            raise ConfigError(f"blob {ref.digest.hex()} of the run is missing: put it into the blob store")
        blobs.pin(ref.digest)
    retention.recalled(ledger.head_round)
    return Recalled(frozenset(training), evaluator, resting)
