"""What neighbours have sent: bounded, and only from those that may send. Pure; one thread at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Final, Literal

Rejection = Literal[
    "stranger", "round", "size", "digest", "full", "cut", "signature", "again", "busy", "cut_off"
]

MOST_SENDERS: Final = 64
"""Whose messages are kept at the same time."""

_ROUNDS: Final = 2
"""Of one sender, the newest: this node may be at the end of a round when a neighbour is at the end of the
next one."""


class Inbox:
    """`rejected`: by reason. What messages hold is not looked at."""

    def __init__(self) -> None:
        self.rejected: Counter[Rejection] = Counter()
        self.max_bytes = 0
        """Of a message."""
        self.round = 0
        """Of this node's last exchange."""
        self._named: tuple[str, ...] = ()
        self._messages: dict[str, dict[int, bytes]] = {}

    def began(self, round_: int, named: Sequence[str]) -> None:
        """This node's exchange of that round begins, with these."""
        self.round, self._named = round_, tuple(named)
        for sender in list(self._messages):
            kept = {r: data for r, data in self._messages[sender].items() if r >= round_}
            self._messages[sender] = kept
            if not kept:
                del self._messages[sender]

    def refusal(self, sender: str, is_member: bool, round_: int, n_bytes: int) -> Rejection | None:
        """Why a message will not be taken, before its bytes have come; None: it will."""
        if not is_member:
            return "stranger"
        if round_ < self.round:
            return "round"
        if not 0 < n_bytes <= self.max_bytes:
            return "size"
        is_new = sender not in self._messages and sender not in self._named
        return "full" if is_new and len(self._messages) >= MOST_SENDERS else None

    def put(self, sender: str, round_: int, data: bytes) -> None:
        """The newest rounds of a sender stay."""
        messages = self._messages.setdefault(sender, {})
        messages[round_] = data
        for old in sorted(messages)[:-_ROUNDS]:
            del messages[old]

    def of(self, round_: int) -> list[tuple[str, bytes]]:
        """What those named have sent for it, in their order."""
        found = [(peer, self._messages.get(peer, {}).get(round_)) for peer in self._named]
        return [(peer, data) for peer, data in found if data is not None]

    def missing(self, round_: int, awaited: Collection[str]) -> list[str]:
        """Those named, and awaited, that have sent nothing for it."""
        named = [peer for peer in self._named if peer in awaited]
        return [peer for peer in named if round_ not in self._messages.get(peer, {})]
