"""Whether this machine computes what all others do: known answers of the exact kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch

from thinwire.compression.base import Packed, Part, Turn
from thinwire.compression.bits import pack_bits
from thinwire.compression.dct_topk import DctTopK
from thinwire.compression.fingerprint import parameter_sum
from thinwire.compression.noise import NoiseKind, Probe, update_

N = 10_007
"""Elements: not a multiple of any block."""


def failed_kernels(device: torch.device) -> list[str]:
    """Names of the kernels whose result is not the known one; empty on a machine that can be trusted."""
    return [name for name, (kernel, known) in _KERNELS.items() if kernel(device) != known]


def _values(device: torch.device) -> torch.Tensor:
    """Shape (N,), float32: multiples of 1/64, the same everywhere."""
    return (torch.arange(N, device=device) % 2003 - 1001).to(torch.float32) * 0.015625


def _noise(kind: NoiseKind) -> Callable[[torch.device], int]:
    def kernel(device: torch.device) -> int:
        theta = _values(device)
        probes = [Probe(2**63 + 7, 0, 0.001), Probe(5, 3, -0.37)]
        update_(theta, probes, kind, param_index=2, start=4096 * 3 + 5, decay=0.9990234375)
        return parameter_sum(theta)

    return kernel


def _decode(device: torch.device) -> int:
    compressor = DctTopK(k=8, group_size=1024, bits=8)
    part, turn = Part.whole((10, 1024)), Turn(round=1, shared_seed=1, own_seed=2, lr_factor=1.0)
    packs = [_packed(compressor, part, turn, first) for first in (3, 70)]
    return parameter_sum(compressor.decode(packs, [1.0, 1.0], part, turn).to(device))


def _packed(compressor: DctTopK, part: Part, turn: Turn, first: int) -> Packed:
    """10 groups of 8 coefficients each, spelled out: packing itself is local and need not be the same."""
    index_GK = first + 101 * torch.arange(8).expand(10, 8)
    value_GK = (31 * index_GK + 7 * torch.arange(10)[:, None]) % 255 - 127
    codes = (value_GK & 255) << 10 | index_GK  # 8 bits of value, 10 of index
    scales = torch.tensor([2.0**-e for e in range(10)], dtype=torch.bfloat16)
    packed = scales, pack_bits(codes.reshape(-1), 18)
    compressor.check(packed, part, turn)
    return packed


def _fingerprint(device: torch.device) -> int:
    return parameter_sum(_values(device))


_KERNELS: dict[str, tuple[Callable[[torch.device], int], int]] = {
    "fingerprint": (_fingerprint, 0xCB1F5474A6C19B8D),
    "sign noise": (_noise("sign"), 0x87BB8C9CE4A26078),
    "normal noise": (_noise("gauss"), 0x61ADB7CB0694347C),
    "transform decoding": (_decode, 0x362DA8FF52671BD4),
}
