"""How much a node does in a round: it measures its own work and link, and chooses what fits.

The run says how long a round should take (`[work] round_s`), its strategy how much work it has at most. Pure:
measurements in, a decision out. Nothing here changes what receivers expect: fewer batches make a smaller
sample count, a smaller share of a payload leaves the rest for the next one.
"""

from __future__ import annotations

from collections import deque
from statistics import median

from ..optim.base import Allotment

MARGIN = 0.9
"""The part of a round that is planned for: what takes a little longer than usual still fits."""

UPLOAD_PART = 0.5
"""No more than this part of the plan is spent on sending, as long as sending less is possible."""

LEAST_SHARE = 1 / 64
_REMEMBERED = 5


class Workload:
    """`round_s`: how long a round should take; `most_batches`: of work, in a round."""

    def __init__(self, round_s: float, most_batches: int) -> None:
        self._plan_s = MARGIN * round_s
        self._most = most_batches
        self._batch_s: deque[float] = deque(maxlen=_REMEMBERED)
        self._before_s: deque[float] = deque(maxlen=_REMEMBERED)
        self._sent_bytes, self._sent_share = 0, 1.0
        self._bytes_per_s: float | None = None

    def began(self, after_s: float) -> None:
        """Own work began so long after the round's opening was heard of."""
        self._before_s.append(after_s)

    def worked(self, n_batches: int, seconds: float) -> None:
        """Own work on so many batches took that long, packing included; none says nothing."""
        if n_batches > 0:
            self._batch_s.append(seconds / n_batches)

    def sent(self, n_bytes: int, share: float, bytes_per_s: float | None) -> None:
        """A payload of which `share` was allotted; `bytes_per_s`: how fast they go out, None: not known."""
        self._sent_bytes, self._sent_share = n_bytes, share
        self._bytes_per_s = bytes_per_s

    def allotment(self) -> Allotment:
        """For the next round. One batch is always done; the first round has no more, to be measured by."""
        share = self._share()
        if not self._batch_s:
            return Allotment(1, share)
        # A payload has parts that are always sent: of less, no more than the wish is known.
        left_s = self._left_s() - self._upload_s(max(share, self._sent_share))
        n_batches = int(max(0.0, left_s) / max(median(self._batch_s), 1e-9))
        return Allotment(max(1, min(n_batches, self._most)), share)

    def _left_s(self) -> float:
        """Of the plan when own work begins."""
        return self._plan_s - (median(self._before_s) if self._before_s else 0.0)

    def _upload_s(self, share: float) -> float:
        """Of a payload with this share, as if it were in proportion."""
        if not self._bytes_per_s:
            return 0.0
        return self._sent_bytes * share / self._sent_share / self._bytes_per_s

    def _share(self) -> float:
        upload_s = self._upload_s(1.0)
        if upload_s <= 0:
            return 1.0
        return min(1.0, max(LEAST_SHARE, UPLOAD_PART * self._left_s() / upload_s))
