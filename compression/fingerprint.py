"""A short digest of the replicated state, independent of sharding, order and device.

Per parameter: the sum modulo 2^64 of a mixed hash of (global element index, bit pattern). Good against
accidents, not against forgers.

numerics/splitmix64.py has the hash.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from blake3 import blake3
from torch import Tensor

from .exact import exact_arithmetic
from .kernels import kernels_for
from .numerics.splitmix64 import GOLDEN, LAST_SHIFT, MIX

_CHUNK: Final = 1 << 18
_MASK: Final = (1 << 64) - 1


def parameter_sum(x: Tensor, start: int = 0) -> int:
    """Unsigned 64-bit sum of the elements [start, start + numel) of a flattened parameter.

    `x`: float32 or bfloat16, contiguous, any shape. Sums of shards add up modulo 2^64.
    """
    bits = _bits(x)
    match kernels_for(bits):
        case "numba":
            from .cpu import fingerprint_cpu

            return fingerprint_cpu.parameter_sum(bits, start)
        case "triton":
            from .gpu import fingerprint_triton

            return fingerprint_triton.parameter_sums([bits], [start])[0]
        case "torch":
            with exact_arithmetic():
                return parameter_sum_torch(bits, start)


def parameter_sums(tensors: Mapping[str, Tensor], starts: Mapping[str, int]) -> dict[str, int]:
    """`parameter_sum` of each: on a GPU in one read of all of them, for which the host waits once."""
    bits = {name: _bits(x) for name, x in tensors.items()}
    on_gpu: dict[torch.device, list[str]] = {}
    found = {}
    for name, row in bits.items():
        if kernels_for(row) == "triton":
            on_gpu.setdefault(row.device, []).append(name)
        else:
            found[name] = parameter_sum(tensors[name], starts[name])
    for names in on_gpu.values():
        from .gpu import fingerprint_triton

        sums = fingerprint_triton.parameter_sums([bits[n] for n in names], [starts[n] for n in names])
        found.update(zip(names, sums, strict=True))
    return {name: found[name] for name in tensors}


def _bits(x: Tensor) -> Tensor:
    """Its bit patterns, flat. Raises ValueError for what no kernel takes."""
    if x.dtype not in (torch.float32, torch.bfloat16) or not x.is_contiguous():
        raise ValueError(f"needs a contiguous float32 or bfloat16 tensor, not {x.dtype}")
    return x.detach().view(-1).view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def fingerprint(sums: Mapping[str, int]) -> bytes:
    """8 bytes from parameter name -> `parameter_sum` of the whole parameter."""
    digest = blake3()
    for name in sorted(sums):
        encoded = name.encode()
        digest.update(len(encoded).to_bytes(4, "little") + encoded + sums[name].to_bytes(8, "little"))
    return digest.digest(8)


def parameter_sum_torch(bits: Tensor, start: int) -> int:
    """The reference: bit patterns as flat int32 or int16. int64 arithmetic wraps around like unsigned."""
    unsigned = (1 << 8 * bits.dtype.itemsize) - 1
    total = 0
    for i, chunk in enumerate(torch.split(bits, _CHUNK)):
        first = start + i * _CHUNK
        index = torch.arange(first, first + chunk.numel(), dtype=torch.int64, device=bits.device)
        h = (index * _signed(GOLDEN)) ^ (chunk.to(torch.int64) & unsigned)
        for shift, factor in MIX:
            h = (h ^ _shifted(h, shift)) * _signed(factor)
        total += int((h ^ _shifted(h, LAST_SHIFT)).sum())
    return total & _MASK


def _shifted(x: Tensor, by: int) -> Tensor:
    """Logical shift to the right: torch's own keeps the sign."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x
