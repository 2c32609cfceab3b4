"""A parameter as a row of float32 to be changed by `apply`, whatever it is kept as."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ...compression.base import Turn
from ...compression.numerics.rounding import round_to_bfloat16
from ..base import Parameter


@contextmanager
def updating(parameter: Parameter, turn: Turn) -> Iterator[Tensor]:
    """What this rank holds of it, to be changed in place: contiguous flat float32, in the order of indices.

    Replicas in bfloat16 are rounded stochastically at the end, with random bits that all peers share; other
    memory formats (channels_last) are copied, and written back.
    """
    theta = parameter.local
    row = theta.reshape(-1)
    if theta.dtype == torch.float32:
        yield row
    else:
        wide = row.float()
        yield wide
        row = torch.empty_like(row) if not theta.is_contiguous() else row
        round_to_bfloat16(wide, row, turn.shared_seed, parameter.index, parameter.part.start)
    if not theta.is_contiguous():
        theta.copy_(row.view(theta.shape))
