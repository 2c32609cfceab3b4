"""Figures that nodes and the coordinator compute alike, or tell each other."""

from __future__ import annotations

import json
import math
from statistics import fmean
from typing import BinaryIO, Final

from .messages import CommitBody

MAX_LOSS = 1e9
MAX_HEADER_BYTES: Final = 2**16
BYTES_PER_TOKEN: Final = "bytes_per_token"
"""Among the notes of a run's held-out data, a safetensors file, where text became tokens."""


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
