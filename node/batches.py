"""Cutting a ledger into batches of commits for `Replica.apply_batch`."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from typing import Final

from ..coordinator.protocol.messages import Commit
from ..optim.base import Strategy

MAX_ROUNDS: Final = 64
"""Of one batch."""


def batches(
    commits: Iterable[Commit], strategy: Strategy, ends: Container[int] = ()
) -> Iterator[list[Commit]]:
    """The same commits in the same order, none of the lists empty.

    A batch ends with a record that changes the run, at a round in `ends` (where fingerprints are to be
    compared), after `MAX_ROUNDS`, or when it has as many bytes of payloads as the strategy takes at once: for
    some that is always a single round.
    """
    max_bytes = strategy.batch_bytes()
    batch: list[Commit] = []
    n_bytes = 0
    for commit in commits:
        batch.append(commit)
        n_bytes += sum(offer.n_bytes for offer in commit.body.offers)
        is_full = n_bytes >= max_bytes or len(batch) == MAX_ROUNDS
        if is_full or commit.body.changes or commit.body.round in ends:
            yield batch
            batch, n_bytes = [], 0
    if batch:
        yield batch
