"""Coefficients of a parameter to a pack and back; what any pack of a sparse compressor must be.

scales   bfloat16, one per group; 0: this group sends nothing
codes    uint8: which coefficients (numerics/index_layout.py) with which values (numerics/value_formats.py)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..base import Entries, Packed
from ..errors import BadPayload
from ..kernels import use_numba
from ..numerics.indices import pack_indices, unpack_indices
from ..numerics.value_formats import Table, check_codes, check_scales
from .sparse_layout import SparseLayout

Array = npt.NDArray[Any]


def write_pack(
    layout: SparseLayout, shape: tuple[int, ...], scales: Tensor, index_E: Tensor, code_E: Tensor
) -> Packed:
    """From the scales of all groups, and rising int64 indices and codes of those whose scale is not 0."""
    groups = layout.of(shape)
    return scales, pack_indices(layout.indices, index_E, code_E, groups.n_sent(scales), groups.most)


def read_pack(layout: SparseLayout, packed: Packed, shape: tuple[int, ...]) -> Entries:
    """What a pack says that was checked."""
    scales, codes = packed
    groups = layout.of(shape)
    n_sent_G = groups.n_sent(scales)
    index_E, code_E = unpack_indices(layout.indices, codes, n_sent_G, groups.most)
    offsets = np.concatenate([[0], n_sent_G.cumsum()])
    if isinstance(layout.format, Table) and use_numba(scales):
        from ..cpu import sparse_cpu

        found = index_E, code_E, offsets, scales.float().numpy(), layout.format.levels
        return Entries(*sparse_cpu.spread(*found, layout.n_coefficients), offsets)
    value_E = layout.format.read(code_E, scales.float().numpy().repeat(n_sent_G))
    return Entries(groups.start_G.repeat(n_sent_G) + index_E, value_E, offsets)


def check_pack(layout: SparseLayout, packed: Packed, shape: tuple[int, ...]) -> None:
    """Raises BadPayload for what `write_pack` never makes."""
    groups = layout.of(shape)
    if [(t.dtype, t.dim()) for t in packed] != [(torch.bfloat16, 1), (torch.uint8, 1)]:
        raise BadPayload("shape", "expected bfloat16 scales and uint8 codes")
    scales, codes = packed
    if scales.numel() != groups.n_groups:
        raise BadPayload("shape", f"{scales.numel()} scales for {groups.n_groups} groups")
    check_scales(scales, layout.format)
    n_sent_G = groups.n_sent(scales)
    index_E, code_E = unpack_indices(layout.indices, codes, n_sent_G, groups.most)
    if bool((index_E >= groups.most.n_G.repeat(n_sent_G)).any()):
        raise BadPayload("index", "past the end of a group")
    position_E = groups.start_G.repeat(n_sent_G) + index_E
    if bool((position_E[1:] <= position_E[:-1]).any()):
        raise BadPayload("index", "repeated or out of order")
    check_codes(code_E, layout.format)


def strongest_groups(layout: SparseLayout, packed: Packed, shape: tuple[int, ...], share: float) -> Packed:
    """Only this share of the groups, one at least: those with the largest sum of magnitudes."""
    scales, codes = packed
    groups = layout.of(shape)
    n_sent_G = groups.n_sent(scales)
    value_E = read_pack(layout, packed, shape).value_E
    group_E = np.arange(groups.n_groups).repeat(n_sent_G)
    magnitude_G = np.bincount(group_E, np.abs(value_E), groups.n_groups)
    n_kept = max(1, int(share * groups.n_groups))
    is_kept_G = np.zeros(groups.n_groups, dtype=bool)
    is_kept_G[np.argsort(-magnitude_G, kind="stable")[:n_kept]] = True
    fewer = torch.where(torch.from_numpy(is_kept_G), scales, torch.zeros_like(scales))
    index_E, code_E = unpack_indices(layout.indices, codes, n_sent_G, groups.most)
    kept_E = is_kept_G.repeat(n_sent_G)
    return write_pack(
        layout, shape, fewer, torch.from_numpy(index_E[kept_E]), torch.from_numpy(code_E[kept_E])
    )
