"""DiLoCo's compiled outer step against the formula."""

from __future__ import annotations

import pytest
import torch

from thinwire.compression.exact import to_float32
from thinwire.compression.numerics.noise import noise

pytest.importorskip("numba", reason="the numba kernels are an extra")
from thinwire.optim.parts.outer_cpu import outer_step


@pytest.mark.parametrize("nesterov", [False, True])
def test_an_outer_step_of_diloco(nesterov: bool) -> None:
    """One rounding per operation: a fused multiply-add would differ."""
    theta, momentum, step = (noise("gauss", 5, i, 0, 0, 200_003) for i in range(3))
    mu, lr = to_float32(0.9), to_float32(0.7)
    expected_momentum = momentum * mu + step
    moved = step + expected_momentum * mu if nesterov else expected_momentum
    expected = theta - moved * lr
    outer_step(theta, momentum, step, mu, lr, nesterov)
    assert torch.equal(momentum.view(torch.int32), expected_momentum.view(torch.int32))
    assert torch.equal(theta.view(torch.int32), expected.view(torch.int32))
