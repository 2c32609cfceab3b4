"""Counter-based noise: the same element gets the same noise on any device, in any order (design: section 6).

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"):

    key     = (seed low, seed high)
    counter = (call low, call high, parameter index, probe + (purpose << 20))

The flattened *global* parameter is cut into blocks of 4096 elements.

- sign: 32 calls per block, call c of block b has number 32 b + c and its lane l gives word 32 l + c of 128.
  Element e of the block takes bit e // 128 of word e % 128; a set bit means -1.
- gauss: 256 calls per block, number 256 b + c, lane l gives word 256 l + c of 1024. Element e takes byte
  e // 1024 (byte 0 is the lowest) of word e % 1024: the index into `NORMAL_256`.
- words: call c has number c, lane l gives word 4 c + l.

Everything here is the plain torch reference. `noise_cpu` (numba) and `noise_triton` give the same bits; where
they are installed they take tensors on the CPU and on CUDA devices. THINWIRE_KERNELS=torch, numba or triton
forces one of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from importlib.util import find_spec
from typing import Final, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..exact import to_float32
from ..scratch import scratch
from .quantiles import NORMAL_256

NoiseKind = Literal["sign", "gauss"]
Kernels = Literal["torch", "numba", "triton"]

BLOCK: Final = 4096
"""Elements per block of noise."""

MAX_PROBES: Final = 1 << 20
"""Probe numbers are below this: the purpose stands above them in the counter."""

CALLS: Final[dict[NoiseKind, int]] = {"sign": 32, "gauss": 256}
"""Philox calls per block."""

_CHUNK: Final[dict[NoiseKind, int]] = {"sign": 64, "gauss": 16}  # blocks at a time: scratch of a few MB
_SMALL: Final = 1 << 18  # elements of a tensor whose call takes longer than its work, about
_CHOICES: Final = ("auto", *get_args(Kernels))
_MASK: Final = 0xFFFFFFFF
_SIGN_BIT: Final = -(1 << 31)


class Purpose(IntEnum):
    """What random words are for: different purposes never share a counter."""

    SIGN = 0
    GAUSS = 1
    CODE = 2  # stochastic rounding of SPSA's codes
    INIT = 3  # exact initial weights
    ROUND = 4  # stochastic rounding to bfloat16
    DATA = 5  # batches


_PURPOSE: Final[dict[NoiseKind, Purpose]] = {"sign": Purpose.SIGN, "gauss": Purpose.GAUSS}


@dataclass(frozen=True, slots=True)
class Probe:
    """One term of an update: `coefficient` (a float32 value) times the noise of (seed, probe)."""

    seed: int
    probe: int
    coefficient: float


@dataclass(frozen=True, slots=True)
class Update:
    """theta = theta * decay - acc; acc = sum of coefficient * z over the probes in order.

    Every product and sum is rounded once to float32; acc starts with the first term; without a probe nothing
    is subtracted. `seeds`: uint64, `numbers` of the probes: int64, `coefficients`: float32; all (n probes,).
    """

    seeds: npt.NDArray[np.uint64]
    numbers: npt.NDArray[np.int64]
    coefficients: npt.NDArray[np.float32]
    decay: float = 1.0

    def __post_init__(self) -> None:
        for number in self.numbers[(self.numbers < 0) | (self.numbers >= MAX_PROBES)]:
            raise ValueError(f"probe {number} is not in [0, {MAX_PROBES})")

    @classmethod
    def of(cls, probes: Sequence[Probe], decay: float = 1.0) -> Update:
        return cls(
            np.array([p.seed & (1 << 64) - 1 for p in probes], dtype=np.uint64),
            np.array([p.probe for p in probes], dtype=np.int64),
            np.array([p.coefficient for p in probes], dtype=np.float32),
            decay,
        )


@dataclass(frozen=True, slots=True)
class Where:
    """The noise of which purpose, for the elements from `start` on of which parameter."""

    kind: NoiseKind
    purpose: Purpose
    param_index: int
    start: int

    @classmethod
    def of(cls, kind: NoiseKind, param_index: int, start: int) -> Where:
        return cls(kind, _PURPOSE[kind], param_index, start)

    def last_word(self, probe: int) -> int:
        """The fourth word of the counter."""
        return probe + (int(self.purpose) << 20)


# ------------------------------------------------------------------------------------------- public


def noise(
    kind: NoiseKind,
    seed: int,
    param_index: int,
    probe: int,
    start: int,
    stop: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """float32 noise of the global elements [start, stop) of a flattened parameter."""
    z = torch.zeros(stop - start, dtype=torch.float32, device=device)
    # 0 - (-1) z is z, exactly: no value of the noise is zero.
    _combine(z, z, [Update.of([Probe(seed, probe, -1.0)])], Where.of(kind, param_index, start))
    return z


def perturb(
    theta: Tensor, eps: float, kind: NoiseKind, seed: int, param_index: int, probe: int, start: int = 0
) -> Tensor:
    """A new tensor theta + eps z: one rounding for the product, one for the sum.

    `theta`: contiguous float32 of any shape, the elements from `start` on of the flattened parameter.
    """
    flat = _flat(theta)
    out = scratch(flat.numel()) if flat.device.type == "cpu" else torch.empty_like(flat)
    # theta - (-eps) z has the same bits as theta + eps z.
    _combine(out, flat, [Update.of([Probe(seed, probe, -eps)])], Where.of(kind, param_index, start))
    return out.view(theta.shape)


def update_(
    theta: Tensor,
    probes: Sequence[Probe],
    kind: NoiseKind,
    param_index: int,
    start: int = 0,
    decay: float = 1.0,
) -> None:
    """One `Update`, in place: `update_all_` of one."""
    update_all_(theta, [Update.of(probes, decay)], kind, param_index, start)


def update_all_(
    theta: Tensor, updates: Sequence[Update], kind: NoiseKind, param_index: int, start: int = 0
) -> None:
    """All updates in order, in one pass over memory; the bits are those of one after the other.

    `theta`: contiguous float32 of any shape, elements from `start` on of the flattened parameter.
    """
    flat = _flat(theta)
    if updates:
        _combine(flat, flat, updates, Where.of(kind, param_index, start))


@dataclass(frozen=True, slots=True)
class Piece:
    """What takes an update: elements from `start` on of a flattened parameter, contiguous, of any shape."""

    theta: Tensor
    param_index: int
    start: int


def update_pieces_(
    pieces: Sequence[Piece], updates: Sequence[Update], kind: NoiseKind, round_seed: int = 0
) -> None:
    """`update_all_` of each, on a GPU in one launch for all float32 ones and one for all bfloat16 ones, on a
    CPU in one call for small float32 ones. Those in bfloat16 are rounded after the last update, as `rounding`
    does with this seed."""
    from .rounding import round_to_bfloat16

    if not updates:
        return
    small: list[Piece] = []
    together: dict[tuple[torch.device, torch.dtype], list[Piece]] = {}
    for p in pieces:
        if p.theta.dtype not in (torch.float32, torch.bfloat16) or not p.theta.is_contiguous():
            raise ValueError(f"needs a contiguous float32 or bfloat16 tensor, not {p.theta.dtype}")
        theta = p.theta.detach().view(-1)
        piece, kernels = Piece(theta, p.param_index, p.start), kernels_for(theta)
        if kernels == "triton":
            together.setdefault((theta.device, theta.dtype), []).append(piece)
        elif theta.dtype == torch.float32 and kernels == "numba" and theta.numel() <= _SMALL:
            small.append(piece)
        elif theta.dtype == torch.float32:
            update_all_(theta, updates, kind, p.param_index, p.start)
        else:
            wide = theta.float()
            update_all_(wide, updates, kind, p.param_index, p.start)
            round_to_bfloat16(wide, theta, round_seed, p.param_index, p.start)
    for alike in together.values():
        from ..gpu import noise_triton

        noise_triton.combine_all(alike, updates, kind, round_seed)
    if small:
        from ..cpu import noise_cpu

        noise_cpu.combine_all(small, updates, kind)


def initial_values(seed: int, param_index: int, start: int, stop: int, scale: float) -> Tensor:
    """scale * gauss for an exact initialisation: elements [start, stop) of a flattened parameter."""
    out = torch.zeros(stop - start, dtype=torch.float32)
    if scale != 0.0:
        where = Where("gauss", Purpose.INIT, param_index, start)
        _combine(out, out, [Update.of([Probe(seed, 0, -scale)])], where)
    return out


def uniform_words(seed: int, purpose: Purpose, index: int, n: int) -> npt.NDArray[np.uint32]:
    """`n` random 32-bit words; `index` (below 2^32) tells streams of the same seed and purpose apart."""
    calls = torch.arange((n + 3) // 4, dtype=torch.int64)
    lanes = philox4x32((calls & _MASK, calls >> 32, index, int(purpose) << 20), seed)
    return torch.stack(lanes, dim=1).reshape(-1)[:n].numpy().astype(np.uint32)


# ------------------------------------------------------------------------------------------- dispatch


def kernels_for(*tensors: Tensor) -> Kernels:
    """Which kernels take these tensors. THINWIRE_KERNELS: auto (default), torch, numba or triton.

    `numba` and `triton` insist: they fail where they are missing. Tensors that are not on a device of theirs
    always take the torch path. Triton's interpreter (TRITON_INTERPRET=1) makes the CPU a device of its own.
    """
    choice = os.environ.get("THINWIRE_KERNELS", "auto")
    if choice not in _CHOICES:
        raise ValueError(f"THINWIRE_KERNELS={choice!r}: {', '.join(_CHOICES)}")
    devices = {t.device.type for t in tensors}
    if devices == {"cpu"}:
        if choice == "numba" or (choice == "auto" and _has("numba")):
            return "numba"
        if choice == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
            return "triton"
    elif devices == {"cuda"} and (choice == "triton" or (choice == "auto" and _has("triton"))):
        return "triton"
    return "torch"


def use_numba(*tensors: Tensor) -> bool:
    """Whether the numba kernels take these tensors."""
    return kernels_for(*tensors) == "numba"


@cache
def _has(package: str) -> bool:
    return find_spec(package) is not None


def _combine(out: Tensor, theta: Tensor, updates: Sequence[Update], where: Where) -> None:
    """out = theta after the updates, of which there is one at least; flat float32, `out` may be `theta`."""
    match kernels_for(out, theta):
        case "numba":
            from ..cpu import noise_cpu

            noise_cpu.combine(out, theta, updates, where)
        case "triton":
            from ..gpu import noise_triton

            noise_triton.combine(out, theta, updates, where)
        case "torch":
            combine_torch(out, theta, updates, where)


def _flat(theta: Tensor) -> Tensor:
    if theta.dtype != torch.float32 or not theta.is_contiguous():
        raise ValueError(
            f"needs a contiguous float32 tensor, not {theta.dtype} with strides {theta.stride()}"
        )
    return theta.detach().view(-1)


# ------------------------------------------------------------------------------------------- reference


@torch.no_grad()
def combine_torch(out: Tensor, theta: Tensor, updates: Sequence[Update], where: Where) -> None:
    """The reference of `_combine`, chunk by chunk."""
    start = where.start
    for first, last in _chunks(start, start + theta.numel(), _CHUNK[where.kind] * BLOCK):
        here = slice(first - start, last - start)
        value = theta[here]
        for update in updates:
            value = _updated(value, update, where, first, last)
        out[here] = value


def _updated(value: Tensor, update: Update, where: Where, first: int, last: int) -> Tensor:
    """One update of the global elements [first, last), as a new tensor or `value` itself."""
    acc: Tensor | None = None
    for seed, number, coefficient in zip(
        update.seeds.tolist(), update.numbers.tolist(), update.coefficients.tolist(), strict=True
    ):
        term = _term(Probe(seed, number, coefficient), where, first, last, value.device)
        acc = term if acc is None else acc.add_(term)
    decay = to_float32(update.decay)
    value = value if decay == 1.0 else value * decay
    return value if acc is None else value - acc


def _term(p: Probe, where: Where, first: int, last: int, device: torch.device) -> Tensor:
    """coefficient * z of the global elements [first, last)."""
    b0 = first // BLOCK
    words = _block_words(p, where, b0, -(-last // BLOCK), device)
    coefficient = torch.tensor(p.coefficient, dtype=torch.float32, device=device)
    if where.kind == "sign":
        up = torch.arange(31, -1, -1, dtype=torch.int32, device=device)  # bit 0 moves up by 31
        masks = (words.to(torch.int32)[:, None, :] << up[:, None]) & _SIGN_BIT
        term = (masks ^ coefficient.view(torch.int32)).view(torch.float32)
    else:
        down = torch.arange(0, 32, 8, device=device)
        table = torch.tensor(NORMAL_256, dtype=torch.float32, device=device)
        term = table[(words[:, None, :] >> down[:, None]) & 255] * coefficient
    return term.view(-1)[first - b0 * BLOCK : last - b0 * BLOCK]


def _block_words(p: Probe, where: Where, b0: int, b1: int, device: torch.device) -> Tensor:
    """int64 words of the blocks [b0, b1), shape (blocks, words of a block)."""
    n_calls = CALLS[where.kind]
    calls = torch.arange(b0 * n_calls, b1 * n_calls, dtype=torch.int64, device=device).view(-1, n_calls)
    counter = (calls & _MASK, calls >> 32, where.param_index, where.last_word(p.probe))
    return torch.stack(philox4x32(counter, p.seed), dim=1).view(b1 - b0, 4 * n_calls)


def philox4x32(counter: tuple[Tensor, Tensor, int, int], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds. Counter words are below 2^32, the tensors int64 of one shape; so are the results."""
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    x0, x1 = counter[0], counter[1]
    x2, x3 = torch.full_like(x0, counter[2]), torch.full_like(x0, counter[3])
    for _ in range(10):
        # int64 products wrap around: their 64 bits are those of the unsigned product.
        p0, p1 = x0 * 0xD2511F53, x2 * 0xCD9E8D57
        x0, x1 = ((p1 >> 32) & _MASK) ^ x1 ^ k0, p1 & _MASK
        x2, x3 = ((p0 >> 32) & _MASK) ^ x3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return x0, x1, x2, x3


def _chunks(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """[start, stop) cut at the multiples of `size`."""
    while start < stop:
        end = min(stop, (start // size + 1) * size)
        yield start, end
        start = end
