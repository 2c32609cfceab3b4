"""The mean over those that sent a coefficient, as DeMo's program takes it: exact.

For compressors that let each peer select its own coefficients; others' are sent by all or by none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...compression.base import Packed, Part
from ...compression.codecs.sparse import Sparse
from ...compression.exact import exact_arithmetic


def decode_senders(compressor: Sparse, packs: Sequence[Packed], part: Part) -> Tensor:
    """Per coefficient the sum over the packs in order, divided by how many have it; then the inverse.

    The packs were checked. float32, 1-d, `part.n_local` long, on the CPU.
    """
    out = torch.zeros(part.n_local, dtype=torch.float32)
    shares = [compressor.entries(p, part) for p in packs]
    groups = compressor.groups(part.shape)
    with exact_arithmetic():
        for slab in groups.slabs(part.start, part.stop):
            sum_C = np.zeros(slab.n_groups * slab.n_coefficients, dtype=np.float32)
            n_C = np.zeros_like(sum_C)
            for share in shares:
                here = slice(share.offsets[slab.first], share.offsets[slab.last])
                position_E = share.position_E[here] - slab.first * compressor.n_coefficients
                # A share has no position twice: reading, adding and writing back has one order only.
                sum_C[position_E] = sum_C[position_E] + share.value_E[here]
                n_C[position_E] += 1
            mean_C = torch.from_numpy(sum_C) / torch.from_numpy(np.maximum(n_C, 1))
            mean_GC = mean_C.view(slab.n_groups, slab.n_coefficients)
            groups.write(compressor.inverse(mean_GC, part.shape), slab, part, out)
    return out
