"""Matrices in tiles, and the exact transform in two dimensions, against oracles in Python and float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from thinwire.compression.base import Part, Turn
from thinwire.compression.codecs.dct_topk import DctTopK
from thinwire.compression.codecs.groups import SLAB, Flat
from thinwire.compression.codecs.tiles import Tiles, matrix_of
from thinwire.compression.exact import exact_arithmetic
from thinwire.compression.numerics import dct
from thinwire.compression.numerics.noise import noise

CPU = torch.device("cpu")
TURN = Turn(round=1, shared_seed=2, own_seed=3, lr_factor=1.0)
every_side = pytest.mark.parametrize("n", dct.SIDES)


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [
        ((), (1, 1)),
        ((7,), (1, 7)),
        ((5, 9), (5, 9)),
        ((64, 32, 3, 3), (64, 288)),
        ((8, 512, 256), (512 * 8, 256)),
        ((2, 3, 4, 5, 6), (24, 30)),
        ((0, 5), (0, 5)),
    ],
)
def test_the_squarest_matrix(shape: tuple[int, ...], matrix: tuple[int, int]) -> None:
    assert matrix_of(shape) == matrix


@pytest.mark.parametrize(
    ("rows", "columns", "side"),
    [
        (8, 8, 8),
        (9, 8, 8),
        (8, 9, 8),
        (30, 41, 8),
        (64, 64, 64),
        (65, 191, 64),
        (700, 8, 8),
        (8, 70_000, 8),
        (64, 9000, 64),
    ],
)
def test_tiles_there_and_back(rows: int, columns: int, side: int) -> None:
    """Every element is in one tile, at its place; the tiles of a slab are alike, and few enough."""
    tiles, part = Tiles(rows, columns, side, k=5), Part.whole((rows, columns))
    x = torch.arange(rows * columns, dtype=torch.float32) + 1
    out, n_groups = torch.zeros_like(x), 0
    for slab in tiles.slabs():
        assert slab.first == n_groups
        n_groups = slab.last
        read = tiles.read(x, slab)
        assert read.shape == (slab.n_groups, side * side)
        assert read.numel() <= max(SLAB, side * side)
        assert bool(((read > 0).sum(dim=1) == slab.length).all())
        assert slab.k == -(-5 * slab.length // side**2)
        tiles.write(read, slab, part, out)
    assert n_groups == tiles.n_groups == -(-rows // side) * -(-columns // side)
    assert torch.equal(out, x)
    second = x.view(rows, columns)[:side, side : 2 * side]
    if columns >= 2 * side and rows >= side:
        both = torch.cat([tiles.read(x, s) for s in tiles.slabs() if s.first < 2])
        assert torch.equal(both[1].view(side, side), second)


def test_slabs_of_a_part_cover_it() -> None:
    tiles = Tiles(100, 300, 8, k=1)
    for start, stop in [(0, 1), (299, 301), (2399, 2401), (29_999, 30_000), (5000, 25_000)]:
        first_row, last_row = start // 2400, -(-stop // 2400)
        groups = [g for s in tiles.slabs(start, stop) for g in range(s.first, s.last)]
        assert groups == list(range(first_row * 38, min(last_row, 13) * 38))


def test_flat_groups_of_any_size() -> None:
    for n, size, chunk in [(1000, 100, 64), (1000, 100, 1), (5, 7, 1), (10**6, 65_536, 64), (10**6, 1, 1)]:
        flat, part = Flat(n, size, k=1, chunk=chunk), Part.whole((n,))
        x, out = torch.arange(n, dtype=torch.float32), torch.zeros(n)
        for slab in flat.slabs():
            assert slab.n_coefficients % chunk == 0
            flat.write(flat.read(x, slab), slab, part, out)
        assert torch.equal(out, x)


# ------------------------------------------------------------------------------------------- the transform


def inverse_by_hand(tile: np.ndarray, n: int) -> np.ndarray:
    """One tile with Python's exact scaling and int64 products."""
    basis = dct.integer_basis(CPU, n).numpy().astype(np.int64)

    def integers(values: np.ndarray) -> tuple[np.ndarray, int]:
        exponent = math.frexp(float(np.abs(values).max()))[1] - 1
        scaled = [[round(math.ldexp(float(c), 9 - exponent)) for c in row] for row in values]
        return np.array(scaled, dtype=np.int64), exponent - 9

    if np.abs(tile).max() < 2.0**-100:
        return np.zeros_like(tile)
    coefficients, first = integers(tile)
    half, second = integers(coefficients @ basis)
    x = (half.T @ basis).T
    assert max(np.abs(coefficients).max(), np.abs(half).max()) <= 1024
    assert np.abs(x).max() < 2**24
    scale = np.float32(2 / (n * 127 * 127))
    rounded = (x * 2.0**second).astype(np.float32) * scale * np.float32(2.0) ** np.float32(first)
    return rounded + np.float32(0)


@every_side
@pytest.mark.parametrize("exponent", [-110, -60, 0, 66])
def test_inverse_is_the_integer_product(n: int, exponent: int) -> None:
    c = noise("gauss", 5, 0, 0, 0, 6 * n * n).view(6, n * n)
    c[:, ::3] = 0
    c[1] = 0
    c[2] = 1.0
    c[3] = 1.9999999
    c[4, 1:] = 0
    c = (c.double() * 2.0**exponent).float()
    with exact_arithmetic():
        x = dct.inverse_exact_2d(c, n)
    by_hand = np.stack([inverse_by_hand(tile.reshape(n, n), n).reshape(-1) for tile in c.numpy()])
    assert np.array_equal(x.numpy().view(np.int32), by_hand.view(np.int32))
    assert not bool(((x == 0) & torch.signbit(x)).any())


@every_side
def test_there_and_back(n: int) -> None:
    x = noise("gauss", 6, 0, 0, 0, 50 * n * n).view(50, n * n)
    c = dct.forward_2d(x, n)
    assert torch.allclose(c.norm(dim=1), x.norm(dim=1), rtol=1e-4)
    with exact_arithmetic():
        back = dct.inverse_exact_2d(c, n)
    assert float((back - x).norm() / x.norm()) < 0.007


@every_side
def test_bases(n: int) -> None:
    real = dct.real_basis(CPU, n).double()
    assert torch.allclose(real @ real.T, torch.eye(n, dtype=torch.float64), atol=1e-6)
    assert torch.equal(dct.integer_basis(CPU, n), torch.round(real * 127 * math.sqrt(n / 2)).float())


def test_the_largest_values_stay_finite() -> None:
    c = torch.full((1, 4096), 2.0**99)
    with exact_arithmetic():
        assert bool(dct.inverse_exact_2d(c, 64).isfinite().all())


def test_tiles_find_what_is_smooth_in_two_dimensions() -> None:
    """A wave along both axes is one coefficient of a tile; laid flat it takes one of every row."""
    wave = dct.real_basis(CPU)[3]
    x = torch.outer(wave, dct.real_basis(CPU)[5]).repeat(2, 3)
    part, kept = Part.whole(x.shape), {}
    for layout in ("flat", "tiles"):
        compressor = DctTopK(k=1, bits=8, layout=layout)  # type: ignore[arg-type]
        y = compressor.decode([compressor.pack(x.view(-1), part, TURN)], [1.0], part, TURN)
        kept[layout] = 1 - float(((y - x.view(-1)).norm() / x.norm()) ** 2)
    assert kept["tiles"] > 0.999
    assert kept["flat"] < 0.1


def test_narrow_parameters_are_laid_flat() -> None:
    compressor, flat = DctTopK(layout="tiles"), DctTopK()
    for shape in [(), (5,), (1000,), (63, 999), (9, 3, 3)]:
        assert compressor.pack_layout.groups(shape) == flat.pack_layout.groups(shape)
    assert isinstance(compressor.pack_layout.groups((64, 64)), Tiles)
