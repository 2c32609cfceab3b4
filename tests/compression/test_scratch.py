"""Scratch memory: used again when nobody has it any more, never before."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from thinwire.compression import scratch as module
from thinwire.compression.numerics.noise import perturb
from thinwire.compression.scratch import SMALLEST, scratch

N = SMALLEST + 5


@pytest.fixture(autouse=True)
def _empty() -> Iterator[None]:
    module._kept.clear()
    yield
    module._kept.clear()


def test_memory_is_used_again() -> None:
    x = scratch(N)
    address = x.data_ptr()
    del x
    y = scratch(N - 3)
    assert y.data_ptr() == address
    assert (y.shape, y.dtype) == ((N - 3,), torch.float32)


def test_what_lives_is_left_alone() -> None:
    x = scratch(N)
    view = x[7:9]
    address = x.data_ptr()
    del x
    y = scratch(N)
    assert y.data_ptr() != address
    view.fill_(1.0)
    y.fill_(2.0)
    assert bool((view == 1).all())
    numbers = view.numpy()
    del view
    assert scratch(N).data_ptr() != address  # a numpy array of it lives
    assert numbers[0] == 1


def test_the_largest_is_kept_and_no_other() -> None:
    small, large = scratch(N), scratch(2 * N)
    address = large.data_ptr()
    del small, large
    assert len(module._kept) == 1
    assert scratch(2 * N).data_ptr() == address
    assert scratch(4 * N).numel() == 4 * N  # larger than what is kept


def test_alignment_is_torchs() -> None:
    for n in (1, 100, SMALLEST - 1, SMALLEST, N):
        x = scratch(n)
        assert x.numel() == n
        assert x.data_ptr() % 64 == 0


def test_perturbations_at_once_have_memory_of_their_own() -> None:
    theta = torch.zeros(N)

    def peer(i: int) -> bool:
        good = True
        for step in range(4):
            moved = perturb(theta, float(1 + i), "sign", i, 0, step)
            good &= bool((moved.abs() == 1 + i).all())
        return good

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(peer, range(4)))


def test_perturbed_tensors_that_are_kept_keep_their_values() -> None:
    theta = torch.zeros(N)
    kept = [perturb(theta, eps, "sign", 1, 0, 0) for eps in (1.0, 2.0, 3.0)]
    assert [float(x.abs().max()) for x in kept] == [1.0, 2.0, 3.0]
    assert len({x.data_ptr() for x in kept}) == 3
