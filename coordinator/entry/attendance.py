"""Whom nobody waits for any more, because it says that it trains and makes no offers. Pure.

A round is unkept by a peer that is awaited in vain: its time is up, and there is no offer of the peer's.
After UNKEPT of them in a row nobody waits for it, until it makes an offer, which counts like any other. An
offer that comes late, while its round is remembered, is one, too: a slow peer is awaited for as long as the
policy says. Coming back is none: only work counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

UNKEPT: Final = 2
"""Rounds in a row."""


class Attendance:
    """Peers by their index."""

    def __init__(self, unkept: Mapping[int, int] | None = None) -> None:
        """`unkept`: what it gave elsewhere."""
        self._unkept: dict[int, int] = dict(unkept or {})

    def unkept(self) -> dict[int, int]:
        """By peer: how many rounds in a row."""
        return dict(self._unkept)

    def offered(self, peer: int) -> None:
        """An offer of the peer's has come, for the open round or one that is remembered."""
        self._unkept.pop(peer, None)

    def missed(self, peers: Iterable[int]) -> None:
        """The time of a round was up, and there was no offer of these, who were awaited until then."""
        for peer in peers:
            self._unkept[peer] = self._unkept.get(peer, 0) + 1

    @property
    def absent(self) -> frozenset[int]:
        """Peers that are not awaited, whatever they say of themselves."""
        return frozenset(peer for peer, n in self._unkept.items() if n >= UNKEPT)
