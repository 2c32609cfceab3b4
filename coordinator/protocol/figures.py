"""Figures that nodes and the coordinator compute alike or tell each other, and how people are told."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from statistics import fmean
from typing import Any, BinaryIO, Final

from .messages import CommitBody

MAX_LOSS = 1e9
MAX_HEADER_BYTES: Final = 2**16
BYTES_PER_TOKEN: Final = "bytes_per_token"
"""Among the notes of a run's held-out data, a safetensors file, where text became tokens."""

FIRST_ROUNDS: Final = 20
"""Each of them has a line of its own in the log."""

TELL_EVERY_S: Final = 10.0


_SHORT: Final = 20
"""Characters of a peer id that is written out."""


def short(peer_id: str) -> str:
    """A peer id where people read of many: its beginning and its end."""
    return peer_id if len(peer_id) <= _SHORT else f"{peer_id[:8]}..{peer_id[-6:]}"


def one_line(text: str, *, heading: bool = True) -> str:
    """Of an error with a list: "cannot reach it: A; B", or without its heading "A; B"."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        items = "; ".join(lines[1:])
        return f"{lines[0]} {items}" if heading else items
    return "; ".join(lines)


def counted(n: int, what: str) -> str:
    """1, "peer" -> "1 peer"; 2, "peer" -> "2 peers"."""
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def held_against(rejected: Mapping[str, int]) -> dict[str, int]:
    """Of what was rejected of a peer: to be late is nothing against it, and counts as missed."""
    return {why: n for why, n in rejected.items() if why != "late_offer"}


def noise_in_words(scale: Mapping[str, Any]) -> str | None:
    """See `RunStatistics.noise_scale`; with `round_samples`, that a round counts now, or None. None: no
    payloads have been looked at."""
    samples, rounds = scale["samples"], scale["rounds"]
    if not rounds:
        return None
    if samples is None:
        return f"critical batch: not known, after {counted(rounds, 'look')} at what payloads share"
    about, now = f"{float(f'{samples:.2g}'):,.0f}", scale["round_samples"]
    peers = counted(max(1, round(scale["peers"])), "peer")
    said = f"beyond about {about} samples a round ({peers}) more peers help little"
    has = "" if now is None else f"; a round has {now:,.0f}"
    return f"critical batch: {said}{has} (by the noise of {scale['of']})"


def human_seconds(seconds: float) -> str:
    """75.3 -> '1 min 15 s', 0.4 -> '0.4 s'."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def figures_in_words(figures: Mapping[str, float]) -> str:
    """Of an evaluation: {"acc": 0.5} -> 'acc 0.5'."""
    return ", ".join(f"{name} {value:.6g}" for name, value in figures.items())


def printable(text: str, most: int = 60) -> str:
    """What others have written, as it may be shown: one line of at most so many characters, and nothing that
    changes how it is read."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())[:most].strip()


class RoundLines:
    """Which rounds get a line in a log: the first ones and slow ones all, of quick ones one every 10 s."""

    def __init__(self) -> None:
        self._told_s = -math.inf
        self._n_told = self._n_quiet = 0

    def due(self, now_s: float, is_last: bool = False) -> int | None:
        """Call it for each round. None: it gets no line; else how many before it had none."""
        if self._n_told >= FIRST_ROUNDS and now_s - self._told_s < TELL_EVERY_S and not is_last:
            self._n_quiet += 1
            return None
        n, self._n_quiet, self._told_s = self._n_quiet, 0, now_s
        self._n_told += 1
        return n


def ddp_bytes(n_peers: float, n_params: int) -> float:
    """What each peer would send in a ring all-reduce of fp32 gradients among so many (on average)."""
    return 2 * (n_peers - 1) / n_peers * 4 * n_params


def mean_loss(body: CommitBody) -> float | None:
    """Of the offers that counted. Whatever a peer says its loss is, sums of means stay finite."""
    losses = [max(-MAX_LOSS, min(MAX_LOSS, o.loss)) for o in body.offers if o.loss is not None]
    return fmean(losses) if losses else None


def finite(x: float | None) -> float | None:
    """NaN and infinity are no figures: they read as None."""
    return x if x is not None and math.isfinite(x) else None


def wall_ms() -> int:
    """Since 1970, by this machine's clock."""
    return time.time_ns() // 10**6


def bytes_per_token(file: BinaryIO) -> float | None:
    """As whoever held out the data counted them; None: they are no tokens of text, or nobody did."""
    try:
        n = int.from_bytes(file.read(8), "little")
        if not 0 < n <= MAX_HEADER_BYTES:
            return None
        value = float(json.loads(file.read(n))["__metadata__"][BYTES_PER_TOKEN])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return value if math.isfinite(value) and 0 < value < 1e6 else None
