"""The formats of `values` inside Triton kernels, and `quantize` as one: local, but for what is read of codes.

Scales are those of `values` but for the order of sums: a scale of 1 or 2 bits may be the next bfloat16.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..numerics.dct import ROUNDER
from ..numerics.value_formats import FORMATS, Format
from .tables_triton import EXACT, on_device

MAX_GROUP: Final = 1 << 13
"""Elements of a group, at most: a program keeps them in registers."""

_ROUNDER: Final = tl.constexpr(ROUNDER)
_LLOYD_STEPS: Final = tl.constexpr(8)
_E3M0: Final = tl.constexpr(3)


def number_of(format_: Format) -> int:
    """By which kernels know a format: its bits, or 3 for e3m0."""
    bits = next(bits for bits, f in FORMATS.items() if f is format_)
    return bits if isinstance(bits, int) else _E3M0.value


def quantize(value_GK: Tensor, format_: Format) -> tuple[Tensor, Tensor]:
    """As `values.quantize`, but with the codes of all groups: bfloat16 (G,) and int32 (G, K), on the device.
    `value_GK`: contiguous float32, K at most `MAX_GROUP`."""
    n_groups, k = value_GK.shape
    scale_G = torch.empty(n_groups, dtype=torch.int16, device=value_GK.device)
    code_GK = torch.empty((n_groups, k), dtype=torch.int32, device=value_GK.device)
    if value_GK.numel():
        with on_device(value_GK):
            _quantize[(n_groups,)](
                value_GK,
                scale_G,
                code_GK,
                k,
                FORMAT=number_of(format_),
                SIZE=max(32, triton.next_power_of_2(k)),
                **EXACT,
            )
    return scale_G.view(torch.bfloat16), code_GK


@triton.jit(do_not_specialize=["k"])
def _quantize(
    values: tl.tensor, scale_G: tl.tensor, codes: tl.tensor, k: tl.tensor, FORMAT: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, SIZE)
    inside = i < k
    x = tl.load(values + group * k + i, mask=inside, other=0.0)
    scale = scale_of(tl.abs(x), inside, k, FORMAT)
    tl.store(scale_G + group, (scale.to(tl.int32, bitcast=True) >> 16).to(tl.int16))
    tl.store(codes + group * k + i, code_of(x, scale, FORMAT), mask=inside)


@triton.jit
def scale_of(magnitude: tl.tensor, counts: tl.tensor, k: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """A bfloat16 value as float32. `magnitude`: of the group's values, 0 where an element does not count;
    `k`: how many do."""
    if FORMAT == 1:
        scale = _nearest(tl.div_rn(tl.sum(magnitude), k.to(tl.float32)))
    elif FORMAT == 2:
        scale = tl.div_rn(tl.sum(magnitude), k.to(tl.float32))
        for _ in range(_LLOYD_STEPS):
            times = tl.where(magnitude > 1.5 * scale, 2.0, 1.0)
            squares = tl.where(counts, times * times, 0.0)
            scale = tl.div_rn(tl.sum(magnitude * times), tl.sum(squares))
        scale = _nearest(scale)
    elif FORMAT == _E3M0:
        scale = _rounded_up(tl.max(magnitude) * 0.75)
    elif FORMAT == 16:
        bits = tl.max(magnitude).to(tl.int32, bitcast=True) & 0x7F800000
        scale = bits.to(tl.float32, bitcast=True)
    else:
        largest = tl.max(magnitude)
        scale = _rounded_up(tl.div_rn(largest, ((1 << FORMAT - 1) - 1) * 1.0))
    return scale


@triton.jit
def code_of(x: tl.tensor, scale: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """int32; anything where the scale is 0."""
    negative = (x < 0).to(tl.int32)
    if FORMAT == 1:
        code = negative
    elif FORMAT == 2:
        code = (tl.abs(x) > 1.5 * scale).to(tl.int32) | negative << 1
    else:
        ratio = tl.div_rn(x, tl.where(scale > 0, scale, 1.0))
        if FORMAT == _E3M0:
            y = tl.abs(ratio)
            code = (y > 0.0078125).to(tl.int32) + (y > 0.0234375).to(tl.int32) + (y > 0.046875).to(tl.int32)
            code += (y > 0.09375).to(tl.int32) + (y > 0.1875).to(tl.int32)
            code += (y > 0.375).to(tl.int32) + (y > 0.75).to(tl.int32)
            code = tl.where(code > 0, code | negative << 3, 0)
        elif FORMAT == 16:
            code = ratio.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
            code = tl.where(code == 0x8000, 0, code)  # no -0
        else:
            most = (1 << FORMAT - 1) - 1
            nearest = (tl.minimum(tl.maximum(ratio, -most), most) + _ROUNDER) - _ROUNDER
            code = nearest.to(tl.int32) & (2 * most + 1)
    return code


@triton.jit
def value_of(code: tl.tensor, scale: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """Exact: what a code says. float32."""
    if FORMAT == 1:
        value = tl.where(code == 0, scale, -scale)
    elif FORMAT == 2:
        level = 1.0 + (code & 1).to(tl.float32)
        value = tl.where(code > 1, -level, level) * scale
    elif FORMAT == _E3M0:
        power = tl.where((code & 7) > 0, ((code & 7) + 120) << 23, 0).to(tl.float32, bitcast=True)
        value = tl.where(code > 7, -power, power) * scale
    elif FORMAT == 16:
        value = code.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * scale
    else:
        most = (1 << FORMAT - 1) - 1
        value = tl.where(code > most, code - (2 * most + 2), code).to(tl.float32) * scale
    return value


@triton.jit
def _nearest(x: tl.tensor) -> tl.tensor:
    """The nearest bfloat16, ties to even, of a float32 that is not negative."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def _rounded_up(x: tl.tensor) -> tl.tensor:
    """The next bfloat16 that is not below a float32 that is not negative."""
    return ((x.to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000).to(tl.float32, bitcast=True)
