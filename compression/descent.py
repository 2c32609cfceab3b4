"""What a mean of payloads does to a replica, or to a momentum, in one pass where there is a kernel for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from thinwire.compression.base import Compressor, Packed, Part, Turn
from thinwire.compression.exact import exact_arithmetic
from thinwire.compression.sparse import Sparse


@dataclass(frozen=True, slots=True)
class Step:
    """target = target * decay - scale * x, or scale * sign(x). Factors are float32 values."""

    scale: float = 1.0
    decay: float = 1.0
    sign: bool = False


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
