"""How a run went, in a bounded number of points: sums over equally many rounds each, for the page's charts.

A point holds the rounds i * width to i * width + width - 1. The width doubles when there are too many points,
so it depends on the newest round alone: what is rebuilt from the ledger is what was there before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median_high
from typing import Any, Final

from ..protocol.figures import MAX_LOSS, ddp_bytes, mean_loss
from ..protocol.messages import PHASES, CommitBody

MAX_POINTS: Final = 512

_LEDGER: Final = ("rounds", "loss", "losses", "held_out", "held_outs", "offers", "payload", "gap_s", "gaps")
"""Sums and counts that the ledger gives back. `gap_s`: from commit to commit, also while nobody served."""

MEASURED: Final = ("round_s", "timed", "compute", "pack", "exchange", "apply", "phased", "sent", "beaten")
"""Those that it does not: round durations, nodes' phases (in seconds of `phased` rounds of nodes), and what
nodes have sent in all (in `beaten` rounds of theirs)."""

FIELDS: Final = _LEDGER + MEASURED
_AT: Final = {name: i for i, name in enumerate(FIELDS)}
SPREAD_POINTS: Final = 64
"""What is heard at once about many rounds is spread over this many points at most."""

USUAL_POINTS: Final = 9


class Trend:
    """`stamp` grows with every change: who has seen all up to one asks for what came after it."""

    def __init__(self, n_params: int, max_points: int = MAX_POINTS) -> None:
        self._n_params, self._max_points = n_params, max_points
        self.width = 1
        self.stamp = 0
        self.head = 0
        self._rows: list[list[float]] = []
        self._stamps: list[int] = []
        self._last_ms: int | None = None

    def committed(self, body: CommitBody) -> None:
        """The next commit, live or from the ledger."""
        self.head = body.round
        n_offers, n_bytes = len(body.offers), sum(o.n_bytes for o in body.offers)
        self._add(body.round, rounds=bool(n_offers), offers=n_offers, payload=n_bytes)
        if (loss := mean_loss(body)) is not None:
            self._add(body.round, loss=loss, losses=1)
        if self._last_ms is not None and body.time_ms >= self._last_ms:
            self._add(body.round, gap_s=(body.time_ms - self._last_ms) / 1000, gaps=1)
        self._last_ms = body.time_ms

    def held_out(self, round_: int, loss: float) -> None:
        """A held-out loss in nats, after this round."""
        self._add(round_, held_out=max(-MAX_LOSS, min(MAX_LOSS, loss)), held_outs=1)

    def closed(self, round_: int, duration_s: float) -> None:
        """How long the round was open."""
        self._add(round_, round_s=duration_s, timed=1)

    def spread(self, last: int, n_rounds: int, **sums: float) -> None:
        """Measured sums over `n_rounds` rounds, of which `last` is the newest; the oldest may be left out."""
        last = min(last, self.head)
        first = max(1, last - n_rounds + 1, last - SPREAD_POINTS * self.width + 1)
        while first <= last:
            end = min(last, first - first % self.width + self.width - 1)
            part = (end - first + 1) / n_rounds
            self._add(first, **{name: amount * part for name, amount in sums.items()})
            first = end + 1

    def points(self, since: int = 0) -> dict[str, Any]:
        """JSON-able: the points that changed after the stamp `since`, by columns; `index` is their place.

        None where nothing is known. `round`: the newest one of a point; bytes are of a peer in a round.
        """
        chosen = [i for i, stamp in enumerate(self._stamps) if stamp > since]
        rows = [_Row(self._rows[i]) for i in chosen]
        return {
            "width": self.width,
            "index": chosen,
            "round": [min(self.head, (i + 1) * self.width - 1) for i in chosen],
            "loss": [row.mean("loss", "losses") for row in rows],
            "held_out": [row.mean("held_out", "held_outs") for row in rows],
            "payload": [row.mean("payload", "offers") for row in rows],
            "sent": [row.mean("sent", "beaten") for row in rows],
            "ddp": [
                None if n_peers is None else _short(ddp_bytes(n_peers, self._n_params))
                for n_peers in map(self._usual_peers, chosen)
            ],
            "round_s": [row.mean("round_s", "timed") or row.mean("gap_s", "gaps") for row in rows],
            **{phase: [row.mean(phase, "phased") for row in rows] for phase in PHASES},
        }

    def _usual_peers(self, at: int) -> float | None:
        """Offers of a round, the median of this point and those before it: data-parallel training has no
        rounds that close without somebody."""
        nearest = map(_Row, self._rows[max(0, at - USUAL_POINTS + 1) : at + 1])
        known = [n for n in (row.mean("offers", "rounds") for row in nearest) if n is not None]
        return median_high(known) if known else None

    def saved(self) -> dict[str, Any]:
        """JSON-able: what the ledger does not give back, by columns."""
        columns = {name: [_short(row[_AT[name]]) for row in self._rows] for name in MEASURED}
        return {"width": self.width, **columns}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Takes back what `saved` gave, in the place of what was measured here, once the ledger was read; of
        rounds that the ledger lacks, nothing.

        Raises KeyError, TypeError or ValueError for what is nothing of the kind.
        """
        width, columns = saved["width"], [saved[name] for name in MEASURED]
        rows = list(zip(*columns, strict=True))
        if not isinstance(width, int) or width < 1 or len(rows) > self._max_points:
            raise ValueError("a width and columns are expected")
        for row in rows:
            if not all(isinstance(x, int | float) and 0 <= x < math.inf for x in row):
                raise ValueError("numbers are expected")
        for known in self._rows:
            known[_AT[MEASURED[0]] :] = [0] * len(MEASURED)
        for i, row in enumerate(rows):
            if i * width <= self.head and any(row):
                self._add(i * width, **dict(zip(MEASURED, row, strict=True)))

    def _add(self, round_: int, **sums: float) -> None:
        while round_ // self.width >= self._max_points:
            self._halve()
        at = round_ // self.width
        while len(self._rows) <= at:
            self._rows.append([0] * len(FIELDS))
            self._stamps.append(0)
        for name, amount in sums.items():
            self._rows[at][_AT[name]] += amount
        self.stamp += 1
        self._stamps[at] = self.stamp

    def _halve(self) -> None:
        self._rows = [[sum(pair) for pair in zip(*rows, strict=True)] for rows in _pairs(self._rows)]
        self.stamp += 1  # a point is another one now, for whoever has seen it
        self._stamps = [self.stamp if any(stamps) else 0 for stamps in _pairs(self._stamps)]
        self.width *= 2


class _Row:
    def __init__(self, sums: Sequence[float]) -> None:
        self._sums = sums

    def mean(self, total: str, count: str) -> float | None:
        n = self._sums[_AT[count]]
        return _short(self._sums[_AT[total]] / n) if n else None


def _pairs(items: list[Any]) -> Iterator[list[Any]]:
    for i in range(0, len(items), 2):
        yield items[i : i + 2]


def _short(x: float | None) -> float | None:
    """As many digits as a chart shows."""
    return None if x is None else float(f"{x:.5g}")
