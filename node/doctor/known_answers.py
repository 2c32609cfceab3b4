"""Every exact path with an answer that is known: what a replica needs to be the same on all machines.

Inputs are bit patterns from integer arithmetic, so that nothing but the path itself can be wrong. Answers are
`parameter_sum`s of the results, found with the plain torch kernels on x86-64 and equal with every other
implementation since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...compression.base import Compressor, KnownDecoding, Packed, Part, Step, Target, Turn
from ...compression.codecs.dct_topk import DctTopK
from ...compression.codecs.dense import Dense
from ...compression.codecs.topk import TopK
from ...compression.errors import BadPayload
from ...compression.exact import exact_arithmetic
from ...compression.fingerprint import parameter_sum
from ...compression.numerics.bits import pack_bits
from ...compression.numerics.noise import initial_values, perturb, uniform_words, update_all_
from ...compression.numerics.noise_layout import NoiseKind, Probe, Purpose, Update
from ...compression.numerics.reduce import l1_norm
from ...compression.numerics.value_formats import FORMATS, Format, check_codes, check_scales
from ...compression.numerics.values import quantize
from ...compression.registry import COMPRESSORS, build_compressor
from ...optim.base import Share
from ...optim.facts import KnownUpdate
from ...optim.registry import STRATEGIES, build_strategy, has_compressor, strategy_class

N: Final = 10_007
"""Elements: not a multiple of any block."""

N_DENORMAL: Final = 512
"""The first elements of `values`: a machine that flushes denormals to zero is found by them."""

GOOD: Final = 1
"""The answer of a kernel that looks for itself whether what it did can be used."""

_TURN: Final = Turn(round=3, shared_seed=2**64 - 5, own_seed=11, lr_factor=0.75)


@dataclass(frozen=True, slots=True)
class KnownAnswer:
    """A path and the unsigned 64-bit number that it finds on a machine that can be trusted.

    `cpu_only`: it runs on the CPU wherever the replica is. `is_slow`: it takes about a second.
    `of_compressors`: a strategy without one has no use for it.
    """

    run: Callable[[torch.device], int]
    answer: int
    cpu_only: bool = False
    is_slow: bool = False
    of_compressors: bool = False


# ------------------------------------------------------------------------------------------- inputs


def words(n: int, salt: int = 0) -> npt.NDArray[np.uint32]:
    """uint32, well mixed, from integers alone."""
    h = (np.arange(n, dtype=np.uint64) + np.uint64(salt << 32 | 1)) * np.uint64(0x9E3779B97F4A7C15)
    h ^= h >> np.uint64(29)
    h *= np.uint64(0xBF58476D1CE4E5B9)
    return (h >> np.uint64(32)).astype(np.uint32)


def values(device: torch.device, n: int = N, salt: int = 0) -> Tensor:
    """float32 (n,) with all bits in use: the first ones denormal, the others from 2^-20 to 2^4."""
    h = words(n, salt)
    exponent = np.uint32(107) + (h >> np.uint32(23) & np.uint32(0xFF)) % np.uint32(24)
    exponent[:N_DENORMAL] = 0
    bits = h & np.uint32(0x807FFFFF) | exponent << np.uint32(23)
    return torch.from_numpy(bits.view(np.float32)).to(device)


def _sum_of(tensors: Iterable[Tensor]) -> int:
    """Of float32 or integer tensors, in order."""
    flat = [
        t.reshape(-1).view(torch.int32) if t.dtype == torch.float32 else t.reshape(-1).to(torch.int32)
        for t in tensors
    ]
    return parameter_sum(torch.cat(flat).view(torch.float32))


# ------------------------------------------------------------------------------------------- arithmetic


def _fingerprint(dtype: torch.dtype, device: torch.device) -> int:
    x = values(device)
    halves = x.view(torch.int16)[1::2].contiguous().view(torch.bfloat16)  # the upper half of a float32
    return parameter_sum(x if dtype == torch.float32 else halves, start=(1 << 40) + 3)


def _denormals(device: torch.device) -> int:
    """Sums, products and conversions whose operands or results are below 2^-126."""
    small = values(device)[:N_DENORMAL]
    normal = values(device)[N_DENORMAL : 2 * N_DENORMAL]
    with exact_arithmetic():
        tiny = normal * 2.0**-125
        return _sum_of([small + small.flip(0), small * normal, small - tiny, tiny * normal, small * 2.0**60])


def _elementwise(device: torch.device) -> int:
    """Each operation rounds once: product then sum, quotient, root by way of float64, rounding to even."""
    a, b = values(device)[N_DENORMAL:], values(device, salt=1)[N_DENORMAL:]
    with exact_arithmetic():
        product_sum = a.mul(b).add_(b)
        root = (a * a).double().sqrt_().float()
        rounded = (a * 1024.0).add_(12582912.0).sub_(12582912.0)
        return _sum_of([product_sum, a.div(b), root, rounded, a.clone().sign_()])


def _matrix_products(device: torch.device) -> int:
    """Of integers, as the inverse transform has them: below 2^24 in every order, if nobody rounds (TF32)."""
    shape = (2 * 64, 64)
    a = (words(2 * 64 * 64, 2).astype(np.int64) % 2049 - 1024).astype(np.float32).reshape(shape)
    b = (words(64 * 64, 3).astype(np.int64) % 255 - 127).astype(np.float32).reshape(64, 64)
    with exact_arithmetic():
        return _sum_of([torch.from_numpy(a).to(device) @ torch.from_numpy(b).to(device)])


# ------------------------------------------------------------------------------------------- noise


def _noise(kind: NoiseKind, device: torch.device, n: int = N) -> int:
    """What a step of SPSA does: a perturbed copy, then two updates in one pass, from an odd element on."""
    theta = values(device, n)
    start = 4096 * 3 + 5
    copy = perturb(theta, 2.0**-7, kind, 2**63 + 9, param_index=1, probe=70_000, start=start)
    probes = [Probe(2**63 + 7, 0, 0.0009999999310821295), Probe(5, 3, -0.37), Probe(6, 1, 2.0**-140)]
    updates = [Update.of(probes, 0.9990234375), Update.of(probes[1:])]
    update_all_(theta, updates, kind, param_index=2, start=start)
    return parameter_sum(copy) ^ parameter_sum(theta)


def _many_elements(device: torch.device) -> int:
    """Enough of them that the work is shared among threads."""
    theta = values(device, 1 << 20)
    update_all_(theta, [Update.of([Probe(77, 0, 0.01), Probe(78, 1, -0.02)])], "sign", param_index=0)
    return parameter_sum(theta)


def _random_words(_device: torch.device) -> int:
    found = uniform_words(2**64 - 3, Purpose.DATA, 2**32 - 1, 1003)
    return _sum_of([torch.from_numpy(found.view(np.int32))])


def _initial_weights(_device: torch.device) -> int:
    return _sum_of([initial_values(12345, 7, 4090, 4090 + N, 0.019999999552965164)])


# ------------------------------------------------------------------------------------------- payloads


def _transform(layout: str, device: torch.device) -> int:
    compressor = DctTopK(k=8, group_size=1024, bits=8, layout=layout)  # type: ignore[arg-type]
    return _decoded(compressor, _coefficients(), [1.0, 2.700000047683716], Part.whole((320, 32)))


def _fused_update(device: torch.device) -> int:
    """Steps of the size of the values and of their signs, into a part of the parameter."""
    compressor, part = DctTopK(k=8, group_size=1024, bits=8), Part((320, 32), 100, 100 + 8192)
    target = values(device, part.n_local)
    for step in (Step(3.0, 0.9990234375), Step(0.3700000047683716, sign=True)):
        payloads = [{"": packed} for packed in _coefficients()]
        compressor.fused_update([Target(target, part, "", step)], payloads, [1.0, 2.700000047683716], _TURN)
    return parameter_sum(target)


def _coefficients() -> list[Packed]:
    """10 groups of 8 coefficients each, spelled out: packing itself is local and need not be the same."""
    packs: list[Packed] = []
    for first in (3, 70):
        index_GK = first + 101 * torch.arange(8).expand(10, 8)
        value_GK = (31 * index_GK + 7 * torch.arange(10)[:, None]) % 255 - 127
        codes = (value_GK & 255) << 10 | index_GK  # 8 bits of value, 10 of index
        scales = torch.tensor([2.0 ** -(13 * e) for e in range(10)], dtype=torch.bfloat16)
        packs.append((scales, pack_bits(codes.reshape(-1), 18)))
    return packs


def _decoded(compressor: Compressor, packs: Sequence[Packed], weights: Sequence[float], part: Part) -> int:
    for packed in packs:
        compressor.check(packed, part, _TURN)
    return _sum_of([compressor.decode(packs, weights, part, _TURN)])


def _values(bits: int | str, _device: torch.device) -> int:
    """Quantised, checked and read again: values that no order of summation can round differently."""
    format_ = FORMATS[bits]
    magnitude = [1.0] if bits == 1 else [1.0, 2.0]
    if bits in (4, 8, 16):
        magnitude = [float(1 << i) for i in range({4: 3, 8: 7, 16: 11}[int(bits)])]
    h = words(40 * 64, 4).astype(np.int64).reshape(40, 64)
    x_GK = np.array(magnitude, dtype=np.float32)[h % len(magnitude)] * np.where(h & 4096, -1.0, 1.0)
    up_G1 = torch.tensor([2.0 ** (3 * g - 70) for g in range(40)])[:, None]
    scales, codes = quantize(torch.from_numpy(x_GK.astype(np.float32)) * up_G1, format_)
    check_scales(scales, format_)
    check_codes(codes.numpy(), format_)
    read = format_.read(codes.numpy(), scales.float().numpy().repeat(64))
    every = _codes(format_)
    awkward = (format_.read(every, np.full(every.shape, s, np.float32)) for s in (0.1259765625, 2.0**-130))
    return _sum_of([scales.float(), codes, *map(torch.from_numpy, (read, *awkward))])


def _codes(format_: Format) -> npt.NDArray[np.int64]:
    """All that have a value, or many of them where there are thousands."""
    if format_.width < 16:
        each = np.arange(1 << format_.width, dtype=np.int64)
        return np.array([c for c in each if format_.refusal(np.array([c])) is None], dtype=np.int64)
    h = words(5000, 8).astype(np.int64)
    magnitude = 1 + h % 0x4000  # up to a float16 of 2
    return magnitude | (h >> 8 & 0x8000)


def _rice(device: torch.device) -> int:
    """Rice-coded indices: values are multiples of the scale, so that packing is exact, too."""
    compressor = TopK(k=16, group_size=512, bits=8, indices="rice")
    whole = (words(N, 5).astype(np.int64) % 255 - 127).astype(np.float32) * np.float32(0.25)
    packed = compressor.pack(torch.from_numpy(whole), Part.whole((N,)), _TURN)
    return _decoded(compressor, [packed], [1.0], Part.whole((N,)))


def _decoding(compressor_name: str, case: KnownDecoding, _device: torch.device) -> int:
    """The mean of two packs, of the whole parameter."""
    compressor, part = build_compressor({"name": compressor_name, **case.options}), Part.whole((N,))
    packs = [compressor.known_packed(_filled, salt, part) for salt in (20, 30)]
    return _decoded(compressor, packs, [1.0, 2.700000047683716], part)


def _decodings() -> dict[str, KnownAnswer]:
    """Those of every compressor in the registry."""
    return {
        name: KnownAnswer(
            partial(_decoding, compressor, case), case.answer, cpu_only=True, of_compressors=True
        )
        for compressor, kind in COMPRESSORS.items()
        for name, case in kind.known_decodings.items()
    }


def _weighted_mean(_device: torch.device) -> int:
    cpu = torch.device("cpu")
    packs = [(values(cpu, salt=s),) for s in range(3)]
    weights = [1.0, 0.699999988079071, 4096.0]
    with exact_arithmetic():
        norm = torch.tensor([l1_norm(packs[0][0])], dtype=torch.float64).view(torch.int32)
    mean = Dense().decode(packs, weights, Part.whole((N,)), _TURN)
    return _sum_of([mean, norm])


def _packing(device: torch.device) -> int:
    """Local work may be inexact, but others must be able to use what this machine packs."""
    x, part = values(device, salt=6), Part.whole((N,))
    for compressor in (TopK(k=64, group_size=64, bits=8), DctTopK(k=64, group_size=64, bits=8)):
        packed = compressor.pack(x, part, _TURN)
        try:
            compressor.check(packed, part, _TURN)
        except BadPayload:
            return 0
        error = compressor.decode([packed], [1.0], part, _TURN) - x.cpu()
        if not float(error.norm()) < 0.02 * float(x.cpu().norm()):
            return 0
    return GOOD


# ------------------------------------------------------------------------------------------- strategies


def _update(strategy_name: str, case: KnownUpdate, device: torch.device) -> int:
    """Two rounds of two counted offers, then everything that is replicated."""
    parameters = [
        ("matrix", torch.nn.Parameter(values(device, 4096 + 640).view(74, 64).clone())),
        ("bias", torch.nn.Parameter(values(device, 100, salt=7).clone())),
    ]
    strategy = build_strategy({"name": strategy_name, **case.options}, parameters)
    for round_ in (1, 2):
        turn = Turn(round=round_, shared_seed=round_, own_seed=9, lr_factor=0.5)
        shares = [
            Share(2**63 + s, n_samples=3 + s, payload=strategy.known_payload(_filled, 10 * round_ + s))
            for s in range(2)
        ]
        for share in shares:
            strategy.check(share.payload, turn)
        strategy.apply(shares, turn, None)
    tensors = strategy.replicated_tensors()
    return _sum_of([tensors[name].detach().to(device, torch.float32) for name in sorted(tensors)])


def _filled(dtype: torch.dtype, n: int, salt: int) -> Tensor:
    """See `Fill`."""
    if dtype == torch.uint8:
        return torch.from_numpy(words(n, salt).astype(np.uint8))
    if dtype == torch.float32:
        return values(torch.device("cpu"), n, salt)
    raise NotImplementedError(f"payloads of {dtype}: whoever has them makes its own, see `Fill`")


def _updates() -> dict[str, KnownAnswer]:
    """Those of every strategy in the registry."""
    return {
        name: KnownAnswer(
            partial(_update, strategy, case),
            case.answer,
            is_slow=case.is_slow,
            of_compressors=has_compressor(strategy),
        )
        for strategy in STRATEGIES
        for name, case in strategy_class(strategy).facts.known_updates.items()
    }


def _cpu(run: Callable[..., int], answer: int, *args: Any) -> KnownAnswer:
    return KnownAnswer(partial(run, *args), answer, cpu_only=True)


def _any(run: Callable[..., int], answer: int, *args: Any) -> KnownAnswer:
    return KnownAnswer(partial(run, *args), answer)


def _of_compressors(known: KnownAnswer) -> KnownAnswer:
    return replace(known, of_compressors=True)


KNOWN_ANSWERS: Final[dict[str, KnownAnswer]] = {
    "fingerprint": _any(_fingerprint, 0x0D3C215F5CA8FD6D, torch.float32),
    "bfloat16 fingerprint": _any(_fingerprint, 0x83B99773F54E51CB, torch.bfloat16),
    "denormal numbers": _any(_denormals, 0x0165FF43185513F6),
    "elementwise arithmetic": _any(_elementwise, 0x9662C03EE647B3C4),
    "matrix products": _any(_matrix_products, 0x97B31DBDCC164550),
    "sign noise": _any(_noise, 0x5D1C1CE99D0B1FE9, "sign"),
    "normal noise": _any(_noise, 0xDC253800AE8A6CEC, "gauss"),
    "noise on all threads": _any(_many_elements, 0x2A3F2BE1C77D0D88),
    "random words": _cpu(_random_words, 0xABF20C508135C399),
    "initial weights": _cpu(_initial_weights, 0x3C833D1F1000EEC9),
    "transform decoding": _of_compressors(_cpu(_transform, 0x0A9B53CDC730FD17, "flat")),
    "tile decoding": _of_compressors(_cpu(_transform, 0xB50DB2C647DD947E, "tiles")),
    "transform update": _of_compressors(_any(_fused_update, 0xDE7A6480295F2ADC)),
    "1-bit values": _cpu(_values, 0xA19C0C0AD9992B9B, 1),
    "2-bit values": _cpu(_values, 0x9557178722803B7B, 2),
    "4-bit values": _cpu(_values, 0x1E1CBA9EF26AEA72, 4),
    "8-bit values": _cpu(_values, 0xF33B8A85C6FB5A0E, 8),
    "16-bit values": _cpu(_values, 0x8785A430E0B36D07, 16),
    "e3m0 values": _cpu(_values, 0x2D4C18B9E5CA3157, "e3m0"),
    "rice indices": _of_compressors(_cpu(_rice, 0xBE188F95F3E870EF)),
    "weighted mean": _cpu(_weighted_mean, 0x0858B3352B7F7A17),
    **_decodings(),
    **_updates(),
    "packing": _of_compressors(_any(_packing, GOOD)),
}
"""By the name that people are told."""
