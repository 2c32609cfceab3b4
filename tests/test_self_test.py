"""The kernel self-test: passes with every implementation here, and names what is wrong."""

from __future__ import annotations

import pytest
import torch

from thinwire.compression import noise
from thinwire.node.self_test import failed_kernels


def test_every_implementation_passes(kernels: str) -> None:
    assert failed_kernels(torch.device("cpu")) == []


def test_a_machine_that_computes_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One wrong bit in the table of the normal distribution."""
    monkeypatch.setenv("THINWIRE_KERNELS", "torch")
    table = list(noise.NORMAL_256)
    table[77] += 2.0**-20
    monkeypatch.setattr(noise, "NORMAL_256", tuple(table))
    assert failed_kernels(torch.device("cpu")) == ["normal noise"]
