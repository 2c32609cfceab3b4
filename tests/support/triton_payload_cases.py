"""Cases of tests/support/triton_cases.py: what becomes of payloads, and what payloads are made of."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from tests.support.updates import Updated, update
from thinwire.compression.base import Change, Packed, Part, Senders, Source, Step, Turn
from thinwire.compression.codecs.dct_topk import DctTopK
from thinwire.compression.codecs.sparse import Sparse
from thinwire.compression.codecs.topk import TopK
from thinwire.compression.exact import to_float32
from thinwire.compression.gpu.pack_triton import Sent
from thinwire.compression.gpu.values_triton import quantize
from thinwire.compression.numerics.bits import pack_bits, unpack_bits
from thinwire.compression.numerics.value_formats import FORMATS, Bits

TURN = Turn(round=1, shared_seed=2, own_seed=3, lr_factor=1.0)
SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1.1e-38, -3e-39, float("inf"), float("-inf"), 3.4028234e38]
BITS: tuple[Bits, ...] = (1, 2, 4, 8, 16, "e3m0")


def n_shapes(device: torch.device) -> int:
    """Drawn per case: the interpreter is slow, and on a GPU every other one is half a second of compiling."""
    return 40 if device.type == "cuda" else 16


def awkward(rng: random.Random, n: int) -> Tensor:
    """float32, every tenth of them awkward; NaN is none of them, for its bits are the device's own."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(rng.getrandbits(32)))
    for i in rng.sample(range(n), n // 10):
        x[i] = rng.choice(SPECIAL)
    return x


def moved(x: Tensor, device: torch.device, by: int) -> Tensor:
    """On the device, `by` elements after where an allocation begins: alignment is not a matter of course."""
    room = torch.empty(x.numel() + by, dtype=x.dtype, device=device)
    room[by:] = x.to(device)
    return room[by:]


def same(found: Tensor, expected: Tensor, what: object) -> None:
    integers = torch.int16 if expected.dtype == torch.bfloat16 else torch.int32
    assert torch.equal(found.cpu().view(integers), expected.view(integers)), what


@contextmanager
def plain() -> Iterator[None]:
    """The reference's kernels meanwhile."""
    before = os.environ["THINWIRE_KERNELS"]
    os.environ["THINWIRE_KERNELS"] = "torch"
    try:
        yield
    finally:
        os.environ["THINWIRE_KERNELS"] = before


def compressor_of(rng: random.Random) -> Sparse:
    bits, indices = rng.choice(BITS), rng.choice(["packed", "rice"])
    if rng.random() < 0.3:
        side = rng.choice([8, 16, 32, 64])
        k = rng.randrange(1, 20)
        return DctTopK(k=k, group_size=side**2, bits=bits, indices=indices, layout="tiles")
    size = rng.choice([1, 40, 64, 100, 256, 1000, 4096, 5000])
    k = rng.randrange(1, min(size, 40) + 1)
    return rng.choice([DctTopK, TopK])(k=k, group_size=size, bits=bits, indices=indices)


def shapes_of(rng: random.Random, compressor: Sparse) -> list[tuple[int, ...]]:
    size = compressor.group_size
    side = int(size**0.5)
    matrix = rng.randrange(side, 2 * side + 9), rng.randrange(side, 2 * side + 9)
    row = (rng.choice([1, size, rng.randrange(1, 2 * size + 2)]),)
    return rng.sample([matrix, row, (rng.randrange(1, 99),), (0,), (3, 5, 4)], rng.randrange(1, 4))


def momentum_of(rng: random.Random, n: int) -> Tensor:
    """Some of its groups count as zero, some are zero, in some many are equal."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(rng.getrandbits(32)))
    x *= rng.choice([1.0, 1.0, 1e-30, 1e-41, 1e16, 0.0])
    if rng.random() < 0.3:
        x[: n // 2] = 0
    return x.sign() * 0.5 if rng.random() < 0.2 else x


# ------------------------------------------------------------------------------------------- cases


def fused_update_case(device: torch.device) -> None:
    """Payloads of several peers with coefficients in common, for whole parameters and parts of them."""
    rng = random.Random("descent")
    for _ in range(n_shapes(device)):
        compressor = compressor_of(rng)
        weights = [rng.choice([1.0, 3.0, 1000.0, 0.7]) for _ in range(rng.randrange(1, 5))]
        targets, expected = [], []
        with plain():
            for shape in shapes_of(rng, compressor):
                whole = Part.whole(shape)
                x = momentum_of(rng, whole.n_global)
                packs = [
                    compressor.pack(x * peer, whole, TURN)
                    for peer in rng.sample([1.0, -0.5, 0.25, 0.0], len(weights))
                ]
                start = rng.randrange(x.numel()) if x.numel() and rng.random() < 0.4 else 0
                part = Part(shape, start, rng.randrange(start, x.numel() + 1) if start else x.numel())
                factors = rng.choice([1.0, 0.003]), rng.choice([1.0, 0.9])
                step = Step(*map(to_float32, factors), sign=rng.random() < 0.5)
                before = awkward(rng, part.n_local)
                targets.append(Updated(moved(before, device, rng.randrange(5)), part, packs, step))
                update(compressor, [Updated(before, part, packs, step)], weights, TURN)
                expected.append(before)
        update(compressor, targets, weights, TURN)
        for target, x in zip(targets, expected, strict=True):
            same(target.x, x, (compressor, target.part, target.step, weights))


def senders_case(device: torch.device) -> None:
    """Means over the senders of a coefficient, of peers that have some in common."""
    rng = random.Random("senders")
    for _ in range(n_shapes(device) // 2):
        compressor, shape = compressor_of(rng), (rng.randrange(1, 9000),)
        whole = Part.whole(shape)
        weights = [to_float32(rng.choice([1.0, 0.3, 1000.0])) for _ in range(rng.randrange(1, 5))]
        senders = Senders([w * rng.choice([1.0, 2.0]) for w in weights], rng.choice([0.5, 1.0, 1500.0]))
        start = rng.choice([0, rng.randrange(whole.n_global)])
        part = Part(shape, start, whole.n_global)
        with plain():
            x = momentum_of(rng, whole.n_global)
            packs = [compressor.pack(x * (i - 0.5) + x.roll(i), whole, TURN) for i in range(len(weights))]
            expected = compressor.decode_senders(torch.device("cpu"), packs, weights, senders, part, TURN)
        found = compressor.decode_senders(device, packs, weights, senders, part, TURN)
        same(found, expected, (compressor, part, weights, senders))


def packing_case(device: torch.device) -> None:
    """The choice, the codes and the bytes of the reference; on a GPU, where sums have an order of their own,
    codes that `check` takes and that say nearly the same."""
    rng = random.Random("packing")
    n_other = n_all = 0
    for _ in range(n_shapes(device)):
        compressor = compressor_of(rng)
        if isinstance(compressor, DctTopK) and compressor.layout == "tiles" and compressor.group_size == 64:
            continue  # has no kernel
        parts = [Part.whole(shape) for shape in shapes_of(rng, compressor)]
        xs = [momentum_of(rng, part.n_global) for part in parts]
        with plain():
            expected = [compressor.pack(x, part, TURN) for x, part in zip(xs, parts, strict=True)]
        sources = [
            Source(part, moved(x, device, rng.randrange(5))) for x, part in zip(xs, parts, strict=True)
        ]
        all_found = Sent(compressor.pack_layout, sources).packs()
        for x, part, found, reference in zip(xs, parts, all_found, expected, strict=True):
            compressor.check(found, part, TURN)
            n_all += 1
            if not is_same_pack(found, reference):
                n_other += 1
                assert compressor.transforms or compressor.bits in (1, 2), (compressor, part)
                assert is_close(compressor, found, reference, x, part), (compressor, part)
    assert n_other <= n_all // (20 if device.type == "cpu" else 2)


def is_same_pack(a: Packed, b: Packed) -> bool:
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True))


def is_close(compressor: Sparse, a: Packed, b: Packed, x: Tensor, part: Part) -> bool:
    """Whether they leave the momentum equally large, but for 1%."""
    left = [(x - compressor.decode([p], [1.0], part, TURN)).double().square().sum() for p in (a, b)]
    return abs(float(left[0] - left[1])) <= 0.01 * float(left[1])


def sending_case(device: torch.device) -> None:
    """A momentum that decays and takes a gradient in, of which what is packed leaves: in one pass what the
    reference does in three. Gradients that do not count have no effect, whatever they are."""
    rng = random.Random("sending")
    for _ in range(n_shapes(device)):
        compressor = compressor_of(rng)
        decay, factor, alpha = (to_float32(rng.choice([0.25, 0.9, 1.0])) for _ in range(3))
        scale = to_float32(rng.choice([0.0, 0.5, 0.3]))
        if isinstance(compressor, DctTopK) and compressor.layout == "tiles" and compressor.group_size == 64:
            continue  # has no kernel
        part = Part.whole(max(shapes_of(rng, compressor), key=len))
        x = momentum_of(rng, part.n_global)
        gradient = torch.full_like(x, float("nan")) if scale == 0 else torch.linspace(-1, 1, x.numel())
        left = moved(x, device, rng.randrange(5))
        source = Source(part, left, moved(gradient, device, 1), factor)
        change = Change(decay, torch.tensor(scale, device=device), alpha)
        (packed,) = Sent(compressor.pack_layout, [source], change).packs()
        expected = x * decay + (gradient * to_float32(factor * scale) if scale else 0.0)
        with plain():
            update(compressor, [Updated(expected, part, [packed], Step(alpha))], [1.0], TURN)
        same(left, expected, (compressor, part, decay, factor, scale, alpha))


def unsendable_case(device: torch.device) -> None:
    """An error, and the groups in question stay as they are."""
    for bad in (float("nan"), 2.0**63):
        for compressor in (TopK(k=3, group_size=100), DctTopK(k=3, group_size=128)):
            x = torch.ones(300, device=device)
            x[150] = bad
            before = x.cpu().clone()
            change = Change(1.0, torch.tensor(1.0, device=device), 1.0)
            with pytest.raises(ValueError, match="not finite, or not below"):
                compressor.fused_send([Source(Part.whole((300,)), x)], change).packs()
            same(x[128:200], before[128:200], bad)
            assert not torch.equal(x[:100].cpu(), before[:100])
            with pytest.raises(ValueError, match="not finite, or not below"):
                compressor.pack(x, Part.whole((300,)), TURN)


def refused_rows_case(device: torch.device) -> None:
    """Rows that are none, of other types and lengths, or, of what is sent together, on several devices."""
    compressor, part = TopK(k=3, group_size=100), Part.whole((200,))
    good = torch.ones(200, device=device)
    with plain():
        packed = compressor.pack(torch.ones(200), part, TURN)
    bad = [good.double(), good.bfloat16(), good[:199], good.view(20, 10), torch.ones(400, device=device)[::2]]
    bad += [torch.ones(200)] if device.type == "cuda" else []
    for x in bad:
        before = x.clone()
        if x.device == good.device:  # targets may be on several devices
            with pytest.raises(ValueError, match="contiguous float32 rows"):
                update(compressor, [Updated(t, part, [packed], Step()) for t in (good, x)], [1.0], TURN)
        change = Change(1.0, torch.tensor(1.0, device=device), 1.0)
        for pair in ((x, None), (good, x)):
            with pytest.raises(ValueError, match="contiguous float32 rows"):
                compressor.fused_send([Source(part, good), Source(part, *pair, 1.0)], change)
        assert torch.equal(x, before)
    with pytest.raises(ValueError, match="another number of packs"):
        update(compressor, [Updated(good, part, [packed], Step())], [1.0, 1.0], TURN)
    with pytest.raises(ValueError, match="whole parameters only"):
        compressor.pack(good[:100], Part((200,), 0, 100), TURN)
    assert bool((good == 1).all())


def unchecked_case(device: torch.device) -> None:
    """Packs that nobody checked: whatever comes out, nothing beside the target is written to."""
    compressor, part = TopK(k=8, group_size=100, indices="packed"), Part.whole((1000,))
    with plain():
        scales, codes = compressor.pack(torch.arange(1000.0), part, TURN)
    whole = torch.zeros(1064, device=device)
    for bad in (torch.full_like(codes, 255), codes[:5], codes[:0]):
        target = Updated(whole[32:1032], part, [(scales, bad)], Step())
        update(compressor, [target], [1.0], TURN)
        assert not bool(whole[:32].any())
        assert not bool(whole[1032:].any())
    rice = TopK(k=8, group_size=100)
    with plain():
        scales, codes = rice.pack(torch.arange(1000.0), part, TURN)
    for bad in (torch.full_like(codes, 255), torch.zeros_like(codes), codes[:5]):
        update(rice, [Updated(whole[32:1032], part, [(scales, bad)], Step())], [1.0], TURN)
        assert not bool(whole[:32].any())
        assert not bool(whole[1032:].any())


def bits_case(device: torch.device) -> None:
    rng = random.Random("bits")
    for width in range(1, 33):
        n = rng.choice([0, 1, 7, 1003, 5000])
        values = torch.tensor([rng.getrandbits(width) for _ in range(n)], dtype=torch.int64)
        with plain():
            expected = pack_bits(values, width)
        packed = pack_bits(values.to(device), width)
        assert torch.equal(packed, expected), (width, n)
        assert torch.equal(unpack_bits(packed.to(device), width, n).cpu(), values), (width, n)
        for bad in (-1, 1 << width):
            with pytest.raises(ValueError, match="do not fit"):
                pack_bits(torch.tensor([0, bad, 1], device=device), width)
        with pytest.raises(ValueError, match="do not hold"):
            unpack_bits(packed.to(device), width, n + 9)


def values_case(device: torch.device) -> None:
    """Scales within one bfloat16 of the reference's, which has another order of sums, and their codes."""
    rng = random.Random("values")
    for bits, format_ in FORMATS.items():
        for k in (1, 31, 100):
            x_GK = torch.stack([momentum_of(rng, k) for _ in range(12)])
            scale_G, code_GK = (t.cpu() for t in quantize(x_GK.to(device), format_))
            expected = format_.scales(x_GK.abs()).view(torch.int16).int()
            apart = (scale_G.view(torch.int16).int() - expected).abs()
            assert int(apart.max()) <= (bits in (1, 2)), (bits, k)
            codes = format_.codes(x_GK, scale_G.float()[:, None])
            live = scale_G > 0
            assert torch.equal(code_GK[live].long(), codes[live]), (bits, k)


PAYLOAD_CASES: dict[str, Callable[[torch.device], None]] = {
    "fused update": fused_update_case,
    "senders": senders_case,
    "packing": packing_case,
    "sending": sending_case,
    "what cannot be sent": unsendable_case,
    "refused rows": refused_rows_case,
    "unchecked packs": unchecked_case,
    "bits": bits_case,
    "values": values_case,
}
