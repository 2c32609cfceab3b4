"""Counter-based noise: the same element gets the same noise on any device, in any order.

Philox (numerics/philox.py) gives the random bits, numerics/noise_layout.py says which element takes which of
them: one bit for a sign, one byte for a Gaussian value, which is the index into a table of 256 quantiles.

Everything here is the plain torch reference. cpu/noise_cpu.py (numba) and gpu/noise_triton.py give the same
bits; where they are installed they take tensors on the CPU and on CUDA devices (kernels.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..exact import to_float32
from ..kernels import kernels_for
from ..scratch import scratch
from .noise_layout import BLOCK, CALLS, NoiseKind, Piece, Probe, Purpose, Update, Where
from .philox import philox4x32
from .quantiles import NORMAL_256
from .rounding import round_to_bfloat16

_CHUNK: Final[dict[NoiseKind, int]] = {"sign": 64, "gauss": 16}  # blocks at a time: scratch of a few MB
_SMALL: Final = 1 << 18  # elements of a tensor whose call takes longer than its work, about
_MASK: Final = 0xFFFFFFFF
_SIGN_BIT: Final = -(1 << 31)


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
    combine(z, z, [Update.of([Probe(seed, probe, -1.0)])], Where.of(kind, param_index, start))
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
    combine(out, flat, [Update.of([Probe(seed, probe, -eps)])], Where.of(kind, param_index, start))
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
        combine(flat, flat, updates, Where.of(kind, param_index, start))


def update_pieces_(
    pieces: Sequence[Piece], updates: Sequence[Update], kind: NoiseKind, round_seed: int = 0
) -> None:
    """`update_all_` of each, on a GPU in one launch for all float32 ones and one for all bfloat16 ones, on a
    CPU in one call for small float32 ones. Those in bfloat16 are rounded after the last update, as `rounding`
    does with this seed."""
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
        combine(out, out, [Update.of([Probe(seed, 0, -scale)])], where)
    return out


def uniform_words(seed: int, purpose: Purpose, index: int, n: int) -> npt.NDArray[np.uint32]:
    """`n` random 32-bit words; `index` (below 2^32) tells streams of the same seed and purpose apart."""
    calls = torch.arange((n + 3) // 4, dtype=torch.int64)
    lanes = philox4x32((calls & _MASK, calls >> 32, index, int(purpose) << 20), seed)
    return torch.stack(lanes, dim=1).reshape(-1)[:n].numpy().astype(np.uint32)


def combine(out: Tensor, theta: Tensor, updates: Sequence[Update], where: Where) -> None:
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
    """The reference of `combine`, chunk by chunk."""
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


def _chunks(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """[start, stop) cut at the multiples of `size`."""
    while start < stop:
        end = min(stop, (start // size + 1) * size)
        yield start, end
        start = end
