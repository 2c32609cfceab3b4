"""Formats of values: exact values of every code, errors within the step, and codes that are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from thinwire.compression.errors import BadPayload
from thinwire.compression.numerics.noise import noise
from thinwire.compression.numerics.value_formats import (
    FORMATS,
    check_codes,
    check_scales,
    check_sendable,
    format_of,
)
from thinwire.compression.numerics.values import quantize

BY_HAND: dict[int | str, dict[int, float]] = {
    1: {0: 1.0, 1: -1.0},
    2: {0: 1.0, 1: 2.0, 2: -1.0, 3: -2.0},
    4: {**{q: float(q) for q in range(8)}, **{16 - q: -float(q) for q in range(1, 8)}},
    8: {**{q: float(q) for q in range(128)}, **{256 - q: -float(q) for q in range(1, 128)}},
    "e3m0": {0: 0.0} | {s << 3 | e: (-1.0) ** s * 2.0 ** (e - 7) for s in (0, 1) for e in range(1, 8)},
    16: {0: 0.0, 0x3C00: 1.0, 0xBC00: -1.0, 0x4000: 2.0, 0xC000: -2.0, 0x3555: 0.333251953125, 1: 2.0**-24},
}
# Squared error of Gaussian values over their energy, in groups of 1024.
ERRORS = {1: 0.37, 2: 0.165, 4: 0.025, 8: 1e-4, "e3m0": 0.045, 16: 1e-7}


def decoded(bits: int | str, values_GK: torch.Tensor) -> torch.Tensor:
    """There and back, groups with scale 0 included."""
    format_ = format_of(bits)
    scale_G, code_E = quantize(values_GK, format_)
    check_scales(scale_G, format_)
    check_codes(code_E.numpy(), format_)
    assert int(code_E.max() if code_E.numel() else 0) < 1 << format_.width
    live_G = scale_G > 0
    scale_E = scale_G[live_G].float().numpy().repeat(values_GK.shape[1])
    out = torch.zeros_like(values_GK)
    out[live_G] = torch.from_numpy(format_.read(code_E.numpy(), scale_E)).view(-1, values_GK.shape[1])
    return out


def test_every_format_is_listed_here() -> None:
    assert BY_HAND.keys() == ERRORS.keys() == FORMATS.keys()


@pytest.mark.parametrize("bits", FORMATS)
def test_every_code_is_the_value_of_the_docstring(bits: int | str) -> None:
    format_, by_hand = format_of(bits), BY_HAND[bits]
    assert format_.width == (4 if bits == "e3m0" else bits)
    codes = np.array(list(by_hand), dtype=np.int64)
    for scale in (1.0, 2.0**-90, 3.0 * 2.0**40):
        values = format_.read(codes, np.full(codes.size, scale, dtype=np.float32))
        assert values.dtype == np.float32
        assert values.tolist() == [value * scale for value in by_hand.values()]
    assert format_.refusal(codes) is None
    if bits != 16:
        unknown = set(range(1 << format_.width)) - by_hand.keys()
        assert len(unknown) == (bits in (4, 8, "e3m0"))
    else:
        unknown = {0x8000, 0x7C00, 0xFC00, 0x7E01, 0x4001, 0xC001, 0xFFFF}
    for code in unknown:
        with pytest.raises(BadPayload) as caught:
            check_codes(np.array([0, code], dtype=np.int64), format_)
        assert caught.value.reason == "range"


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("factor", [1.0, 3e-8, 2.0**-80, 2.0**55])
def test_errors_are_small_at_any_size_of_values(bits: int | str, factor: float) -> None:
    x = noise("gauss", 3, 0, 0, 0, 1 << 16).view(-1, 1024) * factor
    y = decoded(bits, x)
    error = float(((x - y) / factor).square().sum() / (x / factor).square().sum())
    assert 0 < error < ERRORS[bits] if bits != 16 else error < ERRORS[16]
    assert torch.equal(decoded(bits, -x), -y)
    assert bool((y * x >= 0).all())


@pytest.mark.parametrize("bits", FORMATS)
def test_a_single_value_and_zeros(bits: int | str) -> None:
    x = torch.tensor([[0.7], [-1e-20], [0.0]])
    y = decoded(bits, x)
    assert torch.allclose(y, x, rtol=0.26)
    assert y[2].item() == 0
    assert not bool(torch.signbit(decoded(bits, torch.tensor([[0.0, -0.0, 1.0]]))[0, :2]).any()) or bits in (
        1,
        2,
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_linear_values_do_not_leave_their_range(bits: int) -> None:
    """The scale is rounded up, so that the largest value needs no code beyond the last one."""
    x = noise("gauss", 4, 0, 0, 0, 1 << 16).view(-1, 16)
    y, (scale_G, _) = decoded(bits, x), quantize(x, format_of(bits))
    assert float(((x - y).abs() / scale_G.float()[:, None]).max()) <= 0.5 + 1e-5


def test_two_bits_are_better_than_one_where_it_matters() -> None:
    """On the largest of each group, most of which are less than twice as large as the smallest of them."""
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(1)).pow(3)
    top = x.gather(1, x.abs().topk(64, dim=1).indices)
    errors = [float((top - decoded(bits, top)).square().sum() / top.square().sum()) for bits in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize(
    ("scale_bits", "reason"),
    [(0x7F80, "nan"), (0x7FC1, "nan"), (0x8000, "range"), (0xBF80, "range"), (0x5D80, "range")],
)
@pytest.mark.parametrize("bits", FORMATS)
def test_scales_that_are_refused(bits: int | str, scale_bits: int, reason: str) -> None:
    scales = torch.tensor([0x3F80, scale_bits], dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    with pytest.raises(BadPayload) as caught:
        check_scales(scales, format_of(bits))
    assert caught.value.reason == reason


def test_fp16_scales_are_powers_of_two() -> None:
    check_scales(torch.tensor([0.0, 2.0**-100, 0.5, 2.0**59], dtype=torch.bfloat16), format_of(16))
    with pytest.raises(BadPayload, match="power of two"):
        check_scales(torch.tensor([1.5], dtype=torch.bfloat16), format_of(16))


@pytest.mark.parametrize("bits", [0, 3, 32, "fp16", True, 1.0, None, [1]])
def test_unknown_formats(bits: Any) -> None:
    with pytest.raises(ValueError, match="one of 1, 2, 4, 8, 16, e3m0"):
        format_of(bits)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -(2.0**59)])
def test_values_that_cannot_be_sent(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        check_sendable(torch.tensor([1.0, bad]))
    check_sendable(torch.tensor([1.0, 2.0**58]))
    check_sendable(torch.empty(0))
