"""Copies of a round's payloads in modelled time: when every peer has them all, and who has sent how many.

A line serves what waits for it in the order in which it came, and whoever gets something from it has that
when all is served: no round is shorter than it would be. A relay begins when the coordinator has sent all its
copies of that payload. What a holder has not sent when it leaves, and what nobody was named for, is asked of
the coordinator, after the commit and the shortest patience, and comes behind all else. What is not through
when a round closes goes on, and the next round's copies wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...links.payloads import SHORT_WAIT_S

Array = npt.NDArray[np.float64]
Holders = npt.NDArray[np.int64]

COORDINATOR, OWN, NOBODY = range(3)
"""From whom a peer gets a payload, behind the last peer: it has made it itself; nobody was named."""


@dataclass(frozen=True, slots=True)
class Free:
    """From when lines have nothing to do for earlier rounds: `up_H`, the coordinator's last, and `down_N`."""

    up_H: Array
    down_N: Array


@dataclass(frozen=True, slots=True)
class Lines:
    """Of N peers: bytes per second, round trips in seconds, when each leaves. `own`: the coordinator's."""

    up_N: Array
    down_N: Array
    rtt_N: Array
    until_N: Array
    own: float
    free: Free


@dataclass(frozen=True, slots=True)
class Copies:
    """`done_N`: when each peer has all payloads; `sent_H`: copies that each holder sends, the coordinator
    last; `n_beside`: those that makers send of payloads that are not followed; `n_again`: what the
    coordinator sends because nobody else did; `free`: when all of it is through."""

    done_N: Array
    sent_H: Array
    n_beside: float
    n_again: float
    free: Free


def give(
    holders_PN: Holders,
    origins: Sequence[int],
    released_P: Array,
    committed_s: float,
    n_bytes: int,
    each: float,
    lines: Lines,
) -> Copies:
    """P payloads of `n_bytes`, in the order in which they were released. `each` stands for so many, whose
    makers have lines of their own; of those that the coordinator sends again everybody gets some then."""
    n_peers, own = len(lines.up_N), (np.arange(len(origins)), np.array(origins))
    named_PH = np.array([np.bincount(row, minlength=n_peers + 3) for row in holders_PN], dtype=np.float64)
    copies_PH, n_again = named_PH[:, : n_peers + 1] * each, named_PH[:, n_peers + NOBODY].sum() * each
    copies_PH[own] /= each
    served_PH = _served_by_all(copies_PH, own, released_P, n_bytes, each, lines)
    until_H = np.append(lines.until_N, np.inf)
    lost_PH = (served_PH > until_H) & (copies_PH > 0)
    n_again += copies_PH[lost_PH].sum() + copies_PH[own][lost_PH[own]].sum() * (each - 1)
    copies_PH[lost_PH] = 0.0
    served_H = np.where(copies_PH > 0, served_PH, 0.0).max(axis=0)
    asked_s = SHORT_WAIT_S + max([committed_s, *until_H[lost_PH.any(axis=0)]])
    up_H = np.maximum(served_H, lines.free.up_H)
    again_s = max(up_H[-1], asked_s) + n_again * n_bytes / lines.own
    got_PH = np.hstack([np.where(lost_PH, again_s, served_H), np.tile([0.0, again_s], (len(origins), 1))])
    got_N = np.take_along_axis(got_PH, holders_PN, axis=1).max(axis=0)
    if n_again:
        up_H[-1] = again_s
        got_N = np.maximum(got_N, again_s) if each > 1 else got_N
    n_behind_P = np.arange(len(origins), 0, -1) * each
    begun_PN = np.maximum(released_P[:, None], lines.free.down_N)
    down_N = (begun_PN + n_behind_P[:, None] * n_bytes / lines.down_N).max(axis=0)
    sent_H, n_beside = copies_PH.sum(axis=0), copies_PH[own].sum() * (each - 1)
    sent_H[-1] += n_again
    done_N = np.maximum(got_N, down_N) + lines.rtt_N
    return Copies(done_N, sent_H, float(n_beside), float(n_again), Free(up_H, down_N))


def _served_by_all(
    copies_PH: Array,
    own: tuple[Holders, Holders],
    released_P: Array,
    n_bytes: int,
    each: float,
    lines: Lines,
) -> Array:
    """When each holder has sent all its copies of each payload. `own`: where a maker is the holder."""
    busy_PH = copies_PH * n_bytes / np.append(lines.up_N, lines.own)
    begun_PH = np.tile(released_P[:, None], (1, len(lines.up_N) + 1))
    by_coordinator_P1 = _served(np.maximum(begun_PH[:, -1:], lines.free.up_H[-1]), busy_PH[:, -1:])
    begun_PH[:, :-1] = by_coordinator_P1 + lines.rtt_N / 2 + each * n_bytes / lines.down_N
    begun_PH[own] = released_P
    return _served(np.maximum(begun_PH, lines.free.up_H), busy_PH)


def _served(begun_PH: Array, busy_PH: Array) -> Array:
    """When each line is through with each payload, which it can begin with then and is busy with for so long:
    first come, first served."""
    order = np.argsort(begun_PH, axis=0, kind="stable")
    busy = np.take_along_axis(busy_PH, order, axis=0)
    through = np.cumsum(busy, axis=0)
    waits = np.maximum.accumulate(np.take_along_axis(begun_PH, order, axis=0) - (through - busy), axis=0)
    served_PH = np.empty_like(busy_PH)
    np.put_along_axis(served_PH, order, through + waits, axis=0)
    return served_PH
