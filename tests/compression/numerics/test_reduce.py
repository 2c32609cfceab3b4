"""Norms that do not depend on the order of their terms: the same number from every backend."""

from __future__ import annotations

import pytest
import torch

from thinwire.compression.numerics.noise import noise
from thinwire.compression.numerics.reduce import l1_norm

pytest.importorskip("numba", reason="the numba kernels are an extra")


@pytest.mark.parametrize("n", [1, 5, 4096, 3_000_001])
def test_norms(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = noise("gauss", n, 0, 0, 0, n) * 2.0 ** (torch.arange(n) % 40)
    found = []
    for kernels in ("torch", "numba"):
        monkeypatch.setenv("THINWIRE_KERNELS", kernels)
        found.append([l1_norm(v) for v in (x, x[::2], x * 2.0**-149, x * 0, x.double())])
    assert found[0] == found[1]
