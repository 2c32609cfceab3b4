"""How much one peer may say: buckets that fill up again, by peer id, over all of its sessions. Pure.

An honest node sends, of a round, its offer and at most three reports, a heartbeat every so often, and after
a break about a dozen messages more; rounds of the smallest models take some milliseconds. The limits are
several times of that: who is above them has a fault or means ill.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ..protocol.messages import Message, State


@dataclass(frozen=True, slots=True)
class Rate:
    """`per_s` for ever, and `burst` at once."""

    per_s: float
    burst: float


MESSAGES: Final = Rate(2000.0, 20_000.0)
STATES: Final = Rate(8.0, 256.0)
"""Of them, those that say what a node does: one for each of its lives, and for each session."""

MESSAGE_BYTES: Final = Rate(4.0 * 2**20, 64.0 * 2**20)
SESSIONS: Final = Rate(0.5, 60.0)
"""That are opened: a node tries again after a quarter of a second, then less and less often."""

FIRST_SESSIONS: Final = Rate(1 / 600, 4.0)
STRANGE_SESSIONS: Final = Rate(10.0, 256.0)
"""Of who has done no work yet, the first few are its own; all others of all such peers come out of one
bucket. A session costs 2 ms of CPU, libp2p's daemon included, and all members hear of it."""

MAX_PEERS: Final = 4096
"""Whose buckets are remembered; the fullest ones are forgotten first."""


class Bucket:
    """Full at the beginning. `now_s`: monotonic."""

    def __init__(self, rate: Rate, now_s: float) -> None:
        self._rate, self._left, self._at_s = rate, rate.burst, now_s

    def take(self, n: float, now_s: float) -> bool:
        """Whether so much was in it; it is taken out."""
        self._left = self._now(now_s)
        self._at_s = max(self._at_s, now_s)
        if n > self._left:
            return False
        self._left -= n
        return True

    def share(self, now_s: float) -> float:
        """How full it is, from 0 to 1."""
        return self._now(now_s) / self._rate.burst

    def _now(self, now_s: float) -> float:
        return min(self._rate.burst, self._left + max(0.0, now_s - self._at_s) * self._rate.per_s)


class _Buckets:
    def __init__(self, now_s: float) -> None:
        self.messages, self.states = Bucket(MESSAGES, now_s), Bucket(STATES, now_s)
        self.n_bytes, self.sessions = Bucket(MESSAGE_BYTES, now_s), Bucket(SESSIONS, now_s)
        self.first = Bucket(FIRST_SESSIONS, now_s)

    def share(self, now_s: float) -> float:
        """Of the emptiest."""
        all_ = (self.messages, self.states, self.n_bytes, self.sessions, self.first)
        return min(bucket.share(now_s) for bucket in all_)


class PeerRates:
    """Of all peers, by their peer id."""

    def __init__(self) -> None:
        self._peers: dict[str, _Buckets] = {}
        self._strange = Bucket(STRANGE_SESSIONS, 0.0)

    def message(self, peer_id: str, message: Message, n_bytes: int, now_s: float) -> str | None:
        """One has come, of so many bytes. What it is too much of, in words; None: it may."""
        buckets = self._of(peer_id, now_s)
        if isinstance(message, State) and not buckets.states.take(1, now_s):
            return "words about what it does"
        if not buckets.messages.take(1, now_s):
            return "messages"
        return None if buckets.n_bytes.take(n_bytes, now_s) else "bytes of messages"

    def session(self, peer_id: str, now_s: float, *, has_worked: bool = True) -> bool:
        """Whether it may open one more."""
        buckets = self._of(peer_id, now_s)
        if not buckets.sessions.take(1, now_s):
            return False
        return has_worked or buckets.first.take(1, now_s) or self._strange.take(1, now_s)

    def _of(self, peer_id: str, now_s: float) -> _Buckets:
        found = self._peers.get(peer_id)
        if found is None:
            if len(self._peers) >= MAX_PEERS:
                self._forget(now_s)
            found = self._peers[peer_id] = _Buckets(now_s)
        return found

    def _forget(self, now_s: float) -> None:
        """A quarter, at once: of those that are left, none is fuller than any that is forgotten."""
        by_share = sorted(self._peers, key=lambda peer: self._peers[peer].share(now_s))
        self._peers = {peer: self._peers[peer] for peer in by_share[: 3 * MAX_PEERS // 4]}
