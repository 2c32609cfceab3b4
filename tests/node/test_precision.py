"""What local work computes in."""

from __future__ import annotations

import pytest
import torch

from thinwire.node.precision import Precision, autocast


@pytest.mark.parametrize("precision", ["auto", "float32", "bf16"])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_a_cpu_computes_in_float32(precision: Precision, needs_grad: bool) -> None:
    with autocast(precision, torch.device("cpu"), needs_grad):
        assert not torch.is_autocast_enabled("cpu")
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.parametrize(("precision", "needs_grad"), [("auto", True), ("auto", False), ("float32", True)])
def test_a_gpu_that_has_bfloat16_uses_it_for_gradients(precision: Precision, needs_grad: bool) -> None:
    if not (torch.cuda.is_available() and torch.cuda.is_bf16_supported()):
        pytest.skip("no GPU with bfloat16")
    ones = torch.ones(2, 2, device="cuda")
    with autocast(precision, ones.device, needs_grad):
        product = ones @ ones
    assert (product.dtype == torch.bfloat16) == (precision == "auto" and needs_grad)
