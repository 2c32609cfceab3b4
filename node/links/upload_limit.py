"""How fast a node may send: `--max-upload RATE`, over any ten seconds and for all of its streams together.

A token bucket that holds half a second's worth. What is asked for first is given first, by urgency: what is
said to the coordinator or answers what comes, then this node's own payloads, then what it serves to others.
"""

from __future__ import annotations

import asyncio
import heapq
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from ...compression.errors import ConfigError

WINDOW_S = 10.0
BURST_S = 0.5

LEAST_BYTES_PER_S = 1000
"""Less than that and a node can hardly say that it lives."""

FRAMING_BYTES, FRAMING_SHARE = 120, 0.05
"""What libp2p, TLS, TCP and IP add to a write: headers of each, and of every further packet."""

ACKNOWLEDGED_SHARE = 0.025
"""What is sent back per received byte: a packet without data for every other full one."""

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "ki": 2.0**10, "mi": 2.0**20, "gi": 2.0**30}
_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?(b|bit|bytes?)(?:/s)?", re.IGNORECASE)


def parse_rate(text: str, option: str = "--max-upload") -> float:
    """Bytes per second of 20kB/s, 1.5MB/s, 8Mbit/s or 10Mbit. Raises ConfigError that names `option`."""
    found = _RATE.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"{option} {text}: write it as 20kB/s, 1.5MB/s or 8Mbit/s")
    number, prefix, unit = found.groups()
    if unit == "b":
        raise ConfigError(f"{option} {text}: write B/s for bytes, bit/s for bits")
    rate = float(number) * _UNITS[(prefix or "").lower()] / (8 if unit.lower() == "bit" else 1)
    if rate < LEAST_BYTES_PER_S:
        least = f"{LEAST_BYTES_PER_S / 1000:g}kB/s"
        raise ConfigError(f"{option} {text}: at least {least} are needed to take part")
    return rate


class UploadLimit:
    """At most `rate_bytes_per_s` on average over every ten seconds. One event loop.

    What a write costs is more than its bytes, by an estimate of the protocols' framing.
    """

    def __init__(self, rate_bytes_per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate_bytes_per_s = rate_bytes_per_s
        self._clock = clock
        self._window_bytes = rate_bytes_per_s * WINDOW_S
        self._most = rate_bytes_per_s * BURST_S
        # A window has what is in the bucket at its start, and what flows in meanwhile.
        self._flow = rate_bytes_per_s * (WINDOW_S - BURST_S) / WINDOW_S
        self._level, self._filled_s = self._most, clock()
        self._waiting: list[_Waiting] = []
        self._numbers = count()
        self._timer: asyncio.TimerHandle | None = None
        self._spent: deque[tuple[float, float]] = deque()
        self.control, self.own, self.served = (Share(self, urgency) for urgency in range(3))

    @property
    def piece_bytes(self) -> int:
        """The most that is written at a time."""
        return int((self._most - FRAMING_BYTES) / (1 + FRAMING_SHARE))

    def used_ratio(self) -> float:
        """The part of the limit that was used in the last ten seconds."""
        since_s = self._clock() - WINDOW_S
        return sum(cost for at_s, cost in list(self._spent) if at_s > since_s) / self._window_bytes

    async def take(self, n_bytes: int, urgency: int) -> None:
        """Returns when so many bytes, at most `piece_bytes`, may be written."""
        granted = asyncio.get_running_loop().create_future()
        cost = n_bytes * (1 + FRAMING_SHARE) + FRAMING_BYTES
        heapq.heappush(self._waiting, _Waiting(urgency, next(self._numbers), cost, granted))
        self._grant()
        try:
            await granted
        except asyncio.CancelledError:
            self._grant()  # those behind need not wait for what this one would have taken
            raise

    def received(self, n_bytes: int) -> None:
        """Acknowledgements are sent without asking; what is sent next waits for it, half a second at most."""
        self._fill()
        cost = n_bytes * ACKNOWLEDGED_SHARE
        self._level = max(self._level - cost, -self._most)
        self._spent.append((self._filled_s, cost))

    def _fill(self) -> None:
        now_s = self._clock()
        self._level = min(self._most, self._level + (now_s - self._filled_s) * self._flow)
        self._filled_s = now_s
        while self._spent and self._spent[0][0] <= now_s - WINDOW_S:
            self._spent.popleft()

    def _grant(self) -> None:
        """To whoever is first as long as there is enough; comes back when there is."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._fill()
        while self._waiting:
            first = self._waiting[0]
            if first.granted.done():  # whoever waited was cancelled
                heapq.heappop(self._waiting)
            elif first.cost <= self._level:
                heapq.heappop(self._waiting)
                self._level -= first.cost
                self._spent.append((self._filled_s, first.cost))
                first.granted.set_result(None)
            else:
                wait_s = (first.cost - self._level) / self._flow
                self._timer = asyncio.get_running_loop().call_later(wait_s + 1e-3, self._grant)
                return


@dataclass(frozen=True, slots=True)
class Share:
    """The limit as one kind of stream sees it: a `Throttle`. The smallest urgency goes first."""

    limit: UploadLimit
    urgency: int

    @property
    def piece_bytes(self) -> int:
        return self.limit.piece_bytes

    async def take(self, n_bytes: int, *, answers: bool) -> None:
        await self.limit.take(n_bytes, 0 if answers else self.urgency)

    def received(self, n_bytes: int) -> None:
        self.limit.received(n_bytes)


@dataclass(frozen=True, slots=True, order=True)
class _Waiting:
    urgency: int
    number: int
    cost: float
    granted: asyncio.Future[None]
