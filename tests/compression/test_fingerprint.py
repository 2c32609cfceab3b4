"""Fingerprints: committed values, shards, sensitivity, both kernels alike."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from thinwire.compression.fingerprint import fingerprint, parameter_sum

MASK = (1 << 64) - 1


def by_hand(patterns: list[int], start: int) -> int:
    """The formula of the module's docstring in Python integers."""
    total = 0
    for i, bits in enumerate(patterns):
        h = ((start + i) * 0x9E3779B97F4A7C15 & MASK) ^ bits
        h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 & MASK
        h = (h ^ h >> 27) * 0x94D049BB133111EB & MASK
        total += h ^ h >> 31
    return total & MASK


def values(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Every kind of float, the same on every machine."""
    bits = torch.arange(n, dtype=torch.int64) * 2654435761 % 2**32
    return (
        bits.to(torch.int32).view(torch.float32)
        if dtype == torch.float32
        else bits.to(torch.int16).view(dtype)
    )


@pytest.mark.parametrize("start", [0, 7, 2**40 + 1])
@pytest.mark.parametrize(("dtype", "mask"), [(torch.float32, 2**32 - 1), (torch.bfloat16, 2**16 - 1)])
def test_formula(kernels: str, start: int, dtype: torch.dtype, mask: int) -> None:
    x = values(1000, dtype)
    patterns = [i * 2654435761 & mask for i in range(1000)]
    assert parameter_sum(x, start) == by_hand(patterns, start)


def test_committed_values(kernels: str, golden: Callable[[dict[str, str]], None]) -> None:
    sums = {
        "float32": parameter_sum(values(300_000)),
        "bfloat16": parameter_sum(values(300_000, torch.bfloat16)),
        "empty": parameter_sum(values(0)),
        "far": parameter_sum(values(10), 2**45),
    }
    golden({name: f"{s:016x}" for name, s in sums.items()} | {"all": fingerprint(sums).hex()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_add_up(kernels: str, dtype: torch.dtype) -> None:
    x = values(700_001, dtype)
    cuts = [0, 1, 4097, 262_144, 262_145, 700_001]
    parts = [parameter_sum(x[a:b], a) for a, b in pairwise(cuts)]
    assert sum(parts) & MASK == parameter_sum(x)


def test_sees_every_change(kernels: str) -> None:
    x = torch.zeros(5000)
    seen = {parameter_sum(x)}
    for i, value in [(0, -0.0), (4999, 1e-45), (17, float("nan")), (18, float("nan"))]:
        y = x.clone()
        y[i] = value
        seen.add(parameter_sum(y))
    swapped = x.clone()
    swapped[0], swapped[1] = 1.0, 2.0
    seen.add(parameter_sum(swapped))
    swapped[0], swapped[1] = 2.0, 1.0
    seen.add(parameter_sum(swapped))
    assert len(seen) == 7


def test_shape_does_not_count(kernels: str) -> None:
    assert parameter_sum(values(600).view(20, 30)) == parameter_sum(values(600))
    assert parameter_sum(values(1).view(())) == parameter_sum(values(1))


def test_names_and_sums_count_and_order_does_not() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    different = [{}, {"a": 1}, {"a": 2}, {"b": 1}, {"a": 1, "b": 2}, {"a": 2, "b": 1}, {"ab": 1}]
    assert len({fingerprint(d) for d in different}) == len(different)
    assert len(fingerprint({})) == 8


def test_refusals() -> None:
    for x in (torch.zeros(4, dtype=torch.float64), torch.zeros(4, 4).T[1:3]):
        with pytest.raises(ValueError, match="contiguous float32 or bfloat16"):
            parameter_sum(x)
