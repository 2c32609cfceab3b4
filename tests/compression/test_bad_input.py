"""Kernels and tensors they were not made for: the right values or a clear error, never silent garbage."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from thinwire.compression.fingerprint import parameter_sum
from thinwire.compression.numerics.noise import noise, perturb, update_
from thinwire.compression.numerics.noise_layout import NoiseKind, Probe
from thinwire.compression.numerics.rounding import round_to_bfloat16

N = 9001
FAR = 2**33 + 4093
"""Of this element neither the index nor the number of the Philox call has 32 bits."""

KINDS: tuple[NoiseKind, ...] = ("sign", "gauss")
PROBES = [Probe(7, 0, 0.5), Probe(8, 1, -0.25)]


def values(n: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(n))


def updated(theta: torch.Tensor, kind: NoiseKind) -> torch.Tensor:
    update_(theta, PROBES, kind, 3, FAR, 0.9)
    return theta


def perturbed(theta: torch.Tensor, kind: NoiseKind) -> torch.Tensor:
    return perturb(theta, 1e-3, kind, 7, 3, 1, FAR)


def rounded(theta: torch.Tensor, kind: NoiseKind) -> torch.Tensor:
    out = torch.empty(theta.numel(), dtype=torch.bfloat16)
    round_to_bfloat16(theta, out, 7, 3, FAR)
    return out


def summed(theta: torch.Tensor, kind: NoiseKind) -> torch.Tensor:
    return torch.tensor(list(parameter_sum(theta, FAR).to_bytes(8, "little")))


KERNELS: dict[str, Callable[[torch.Tensor, NoiseKind], torch.Tensor]] = {
    "update": updated,
    "perturb": perturbed,
    "round": rounded,
    "sum": summed,
}


def bits(x: torch.Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", [1, 2, 3, 4, 7, 60])
def test_views_at_any_byte(kernels: str, kernel: str, kind: NoiseKind, offset: int) -> None:
    """As they come out of files and messages."""
    raw = bytearray(offset) + bytearray(values(N).numpy().tobytes())
    theta = torch.frombuffer(raw, dtype=torch.float32, offset=offset)
    assert theta.data_ptr() % 64 == (torch.frombuffer(raw, dtype=torch.uint8).data_ptr() + offset) % 64
    assert bits(KERNELS[kernel](theta, kind)) == bits(KERNELS[kernel](values(N), kind))
    assert raw[:offset] == bytes(offset)


@pytest.mark.parametrize("kernel", KERNELS)
def test_elements_far_out_are_those_of_the_reference(
    kernel: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in KINDS:
        monkeypatch.setenv("THINWIRE_KERNELS", kernels)
        got = KERNELS[kernel](values(N), kind)
        monkeypatch.setenv("THINWIRE_KERNELS", "torch")
        assert bits(got) == bits(KERNELS[kernel](values(N), kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrap", [2**31, 2**32, 2**33])
def test_far_elements_are_no_copies_of_near_ones(kernels: str, kind: NoiseKind, wrap: int) -> None:
    """An index that lost its high bits would show."""
    near, far = (noise(kind, 7, 3, 0, start, start + N) for start in (0, wrap))
    assert not torch.equal(near, far)
    x, y = (torch.empty(N, dtype=torch.bfloat16) for _ in range(2))
    round_to_bfloat16(values(N), x, 7, 3, 0)
    round_to_bfloat16(values(N), y, 7, 3, wrap)
    assert not torch.equal(x, y)
    assert parameter_sum(values(N), 0) != parameter_sum(values(N), wrap)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_nothing(kernels: str, kind: NoiseKind) -> None:
    for shape in [(0,), (3, 0), (0, 5)]:
        theta = torch.empty(shape)
        update_(theta, PROBES, kind, 3, FAR)
        assert perturb(theta, 1e-3, kind, 7, 3, 1).shape == shape
        assert parameter_sum(theta) == 0
    round_to_bfloat16(torch.empty(0), torch.empty(0, dtype=torch.bfloat16), 7, 3)


@pytest.mark.parametrize(
    "theta",
    [
        values(N)[::2],
        values(90).view(9, 10).T,
        values(90).view(9, 10)[:, 1:],
        torch.zeros(1).expand(9),
        values(9).double(),
        values(9).half(),
        torch.zeros(9, dtype=torch.int32),
        torch.zeros(9, dtype=torch.complex64),
    ],
    ids=["every second", "transposed", "columns", "expanded", "double", "half", "int", "complex"],
)
def test_what_no_kernel_takes(kernels: str, theta: torch.Tensor) -> None:
    before = theta.clone()
    for kind in KINDS:
        with pytest.raises(ValueError, match="contiguous float32"):
            update_(theta, PROBES, kind, 0)
        with pytest.raises(ValueError, match="contiguous float32"):
            perturb(theta, 1e-3, kind, 1, 0, 0)
    with pytest.raises(ValueError, match="contiguous float32"):
        parameter_sum(theta)
    out = torch.zeros(theta.numel(), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="flat contiguous rows"):
        round_to_bfloat16(theta, out, 1, 0)
    assert torch.equal(theta, before)
    assert not out.any()


def test_rows_that_do_not_fit(kernels: str) -> None:
    for x, out in [
        (torch.zeros(9), torch.zeros(8, dtype=torch.bfloat16)),
        (torch.zeros(9), torch.zeros(18, dtype=torch.bfloat16)[::2]),
        (torch.zeros(9), torch.zeros(9)),
        (torch.zeros(3, 3), torch.zeros(9, dtype=torch.bfloat16)),
    ]:
        with pytest.raises(ValueError, match="flat contiguous rows"):
            round_to_bfloat16(x, out, 1, 0)


def test_views_that_end_at_the_end_of_their_memory(kernels: str) -> None:
    """Nothing beyond a view is read or written."""
    for n in (1, 15, 127, 4095, 4097):
        whole = np.full(n + 64, 7.0, np.float32)
        theta = torch.from_numpy(whole[32 : 32 + n])
        update_(theta, PROBES, "sign", 0, 4000)
        assert (whole[:32] == 7).all()
        assert (whole[32 + n :] == 7).all()
        assert (whole[32 : 32 + n] != 7).all()
