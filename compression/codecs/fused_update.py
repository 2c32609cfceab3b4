"""What a mean of payloads does to a replica, or to a momentum, in one pass where there is a kernel for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base import Compressor, Packed, Part, Turn
from ..exact import exact_arithmetic
from ..kernels import kernels_for
from .sparse import Sparse


@dataclass(frozen=True, slots=True)
class Step:
    """target = target * decay - scale * x, or scale * sign(x). Factors are float32 values."""

    scale: float = 1.0
    decay: float = 1.0
    sign: bool = False


@dataclass(frozen=True, slots=True)
class Target:
    """What takes a step, contiguous flat float32, the part of its parameter that it is, and everybody's packs
    of that parameter."""

    x: Tensor
    part: Part
    packs: Sequence[Packed]
    step: Step


def descend_all(
    compressor: Compressor, targets: Sequence[Target], weights: Sequence[float], turn: Turn
) -> None:
    """`descend` of each: on a GPU in one launch for all, on a CPU in one call for small ones."""
    together: dict[torch.device, list[Target]] = {}
    small: list[Target] = []
    for t in targets:
        kernels = kernels_for(t.x)
        if isinstance(compressor, Sparse) and kernels == "triton":
            together.setdefault(t.x.device, []).append(t)
        elif kernels == "numba" and _is_small(compressor, t):
            small.append(t)
        else:
            descend(compressor, t.x, t.packs, weights, t.part, turn, t.step)
    for some in together.values():
        from ..gpu import sparse_triton

        assert isinstance(compressor, Sparse)
        sparse_triton.descend(compressor, some, weights)
    if small:
        from ..cpu import batched_cpu

        assert isinstance(compressor, Sparse)
        batched_cpu.descend(compressor, small, weights)


def decoded_on(
    device: torch.device,
    compressor: Compressor,
    packs: Sequence[Packed],
    weights: Sequence[float],
    part: Part,
    turn: Turn,
) -> Tensor:
    """`compressor.decode` for whom the values are on a device: there, where it has kernels."""
    if isinstance(compressor, Sparse) and kernels_for(torch.empty(0, device=device)) == "triton":
        out = torch.zeros(part.n_local, dtype=torch.float32, device=device)
        compressor.descend(out, packs, weights, part, Step(scale=-1.0))  # 0 - (-1) x is x, and never -0
        return out
    return compressor.decode(packs, weights, part, turn).to(device)


def _is_small(compressor: Compressor, target: Target) -> bool:
    from ..cpu import batched_cpu

    return batched_cpu.takes(compressor, target.part.shape)


def descend(
    compressor: Compressor,
    target: Tensor,
    packs: Sequence[Packed],
    weights: Sequence[float],
    part: Part,
    turn: Turn,
    step: Step,
) -> None:
    """Exact: takes the step in place, where x is `compressor.decode(packs, weights, part, turn)`.

    `target`: contiguous flat float32, `part.n_local` elements. One rounding per operation: no fused forms.
    """
    if isinstance(compressor, Sparse) and compressor.has_kernel(target):
        compressor.descend(target, packs, weights, part, step)
        return
    with exact_arithmetic():
        x = compressor.decode(packs, weights, part, turn).to(target.device)
        if step.sign:
            x.sign_()
        x.mul_(step.scale)
        if step.decay != 1.0:
            target.mul_(step.decay)
        target.sub_(x)
