"""Figures that nodes and the coordinator compute alike from a commit."""

from __future__ import annotations

import math
from statistics import fmean

from .messages import CommitBody

MAX_LOSS = 1e9


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
