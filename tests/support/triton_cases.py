"""What the Triton kernels are held to, case by case, for tests/compression/gpu/test_triton.py.

python -m tests.triton_cases: reads names of cases, a line each, and answers with a line of JSON: null, or
what went wrong. Triton decides at import whether it interprets, so the interpreter has a process of its own.
"""

from __future__ import annotations

import json
import os
import random
import sys
import traceback
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.support.triton_payload_cases import PAYLOAD_CASES, awkward, moved, n_shapes, same
from tests.support.triton_round_cases import ROUND_CASES
from tests.support.updates import Updated, update
from thinwire.compression.base import Part, Source, Step, Turn
from thinwire.compression.codecs.topk import TopK
from thinwire.compression.exact import to_float32
from thinwire.compression.fingerprint import parameter_sum, parameter_sum_torch, parameter_sums
from thinwire.compression.gpu.pack_triton import Sent
from thinwire.compression.numerics.noise import combine_torch, perturb, update_, update_all_, update_pieces_
from thinwire.compression.numerics.noise_layout import MAX_PROBES, NoiseKind, Piece, Probe, Update, Where
from thinwire.compression.numerics.rounding import round_to_bfloat16, round_torch
from thinwire.node.doctor.known_answers import KNOWN_ANSWERS
from thinwire.node.doctor.self_test import failed_kernels

INTERPRETED = [
    "fingerprint",
    "bfloat16 fingerprint",
    "sign noise",
    "normal noise",
    "spsa update",
    "transform update",
]
"""Known answers that the interpreter finds in a second or two."""


def patterns(rng: random.Random, n: int) -> Tensor:
    """int32, all bits alike."""
    g = torch.Generator().manual_seed(rng.getrandbits(32))
    return torch.randint(-(1 << 31), 1 << 31, (n,), generator=g).to(torch.int32)


def shape(rng: random.Random) -> tuple[int, int]:
    """A number of elements and the global index of the first one: inside a block, across some, far away."""
    n = rng.choice([1, 2, 128, 4096, *(rng.randrange(1, m) for m in (40, 300, 2000, 9000))])
    start = rng.choice([0, 1, 16, 4095, 4096, rng.randrange(1 << 20), (1 << 31) - 5, rng.randrange(1 << 45)])
    return n, start


def updates_of(rng: random.Random) -> list[Update]:
    updates = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        factors = [
            rng.choice([rng.gauss(0, 1), rng.gauss(0, 1), 0.0, -0.0, 1e-40]) for _ in range(rng.randrange(4))
        ]
        coefficients = map(to_float32, factors)
        probes = [Probe(rng.getrandbits(64), rng.randrange(MAX_PROBES), c) for c in coefficients]
        updates.append(Update.of(probes, rng.choice([1.0, 0.99, 0.5, to_float32(rng.random())])))
    return updates


# ------------------------------------------------------------------------------------------- cases


def noise_case(kind: NoiseKind, device: torch.device) -> None:
    rng = random.Random(kind)
    for _ in range(n_shapes(device)):
        n, start = shape(rng)
        x, updates, index = awkward(rng, n), updates_of(rng), rng.choice([0, 1, 16, rng.getrandbits(32)])
        expected = torch.empty_like(x)
        combine_torch(expected, x, updates, Where.of(kind, index, start))
        found = moved(x, device, rng.randrange(5))
        update_all_(found, updates, kind, index, start)
        same(found, expected, (n, start, index, updates))


def pieces_case(device: torch.device) -> None:
    """Several tensors of both types at once: blocks that are whole, and all other ones."""
    rng = random.Random("pieces")
    for kind in ("sign", "gauss"):
        for _ in range(n_shapes(device) // 5):
            pieces, expected = [], []
            updates, seed = updates_of(rng), rng.getrandbits(64)
            for index in range(rng.randrange(1, 5)):
                n, start = rng.choice([0, 1, 4096, 8200, 13_000]), rng.choice([0, 0, 16, 4096, 4097, 1 << 40])
                x = awkward(rng, n).to(rng.choice([torch.float32, torch.bfloat16]))
                pieces.append(Piece(moved(x, device, rng.choice([0, 0, 8, 1])), index, start))
                wide = x.float()
                combine_torch(wide, wide, updates, Where.of(kind, index, start))
                if x.dtype == torch.bfloat16:
                    round_torch(wide, x, seed, index, start)
                expected.append(wide if x.dtype == torch.float32 else x)
            update_pieces_(pieces, updates, kind, seed)
            for piece, x in zip(pieces, expected, strict=True):
                same(piece.theta, x, (kind, piece.param_index, piece.start, x.dtype, updates))


def perturb_case(device: torch.device) -> None:
    """A scratch tensor of the parameter's shape; the parameter stays as it was."""
    rng = random.Random("perturb")
    for size in [(), (5,), (3, 1500), (2, 3, 5, 7)]:
        x = awkward(rng, torch.Size(size).numel()).view(size)
        for kind in ("sign", "gauss"):
            theta = x.to(device)
            found = perturb(theta, 1e-3, kind, 7, 3, 9, start=4000)
            expected = torch.empty(x.numel())
            update = Update.of([Probe(7, 9, -1e-3)])
            combine_torch(expected, x.view(-1), [update], Where.of(kind, 3, 4000))
            assert found.shape == x.shape
            same(found, expected.view(size), (kind, size))
            same(theta, x, (kind, size))


def fingerprint_case(device: torch.device) -> None:
    """One by one, and of several tensors of both types at once."""
    rng = random.Random("fingerprint")
    rows, starts, expected = {}, {}, {}
    for i in range(n_shapes(device)):
        n, start = shape(rng)
        n *= rng.choice([0, 1, 1, 4, 9])  # up to five programs
        bits = patterns(rng, n)
        dtype = rng.choice([torch.float32, torch.bfloat16])
        bits = bits if dtype == torch.float32 else bits.to(torch.int16)
        name = f"{i}"
        rows[name] = moved(bits, device, 0 if i < 9 else rng.randrange(5)).view(dtype)
        starts[name], expected[name] = start, parameter_sum_torch(bits, start)
        if i % 4 == 0:
            assert parameter_sum(rows[name], start) == expected[name], (n, start, dtype)
    aligned = [name for name in rows if int(name) < 9]
    assert parameter_sums({n: rows[n] for n in aligned}, starts) == {n: expected[n] for n in aligned}
    assert parameter_sums(rows, starts) == expected


def rounding_case(device: torch.device) -> None:
    rng = random.Random("rounding")
    for i in range(n_shapes(device)):
        n, start = shape(rng)
        # Every kind of NaN becomes the same one: here they are welcome.
        x = patterns(rng, n).view(torch.float32) if i % 2 else awkward(rng, n)
        seed, index = rng.choice([0, 5, rng.getrandbits(64)]), rng.choice([0, 1, rng.getrandbits(32)])
        expected = torch.empty(n, dtype=torch.bfloat16)
        round_torch(x, expected, seed, index, start)
        found = moved(torch.zeros(n, dtype=torch.bfloat16), device, rng.randrange(9))
        round_to_bfloat16(moved(x, device, rng.randrange(5)), found, seed, index, start)
        same(found, expected, (n, start, seed, index))


def nothing_case(device: torch.device) -> None:
    """Empty tensors are no error."""
    empty = torch.empty(0, 3, device=device)
    update_(empty, [Probe(1, 0, 1.0)], "sign", 0, start=77)
    update_pieces_([Piece(empty, 0, 77)], [Update.of([Probe(1, 0, 1.0)])], "sign")
    assert perturb(empty, 1.0, "gauss", 1, 0, 0).shape == (0, 3)
    assert parameter_sum(empty) == 0
    assert parameter_sums({"a": empty, "b": empty.bfloat16()}, {"a": 5, "b": 6}) == {"a": 0, "b": 0}
    round_to_bfloat16(empty.view(-1), empty.view(-1).bfloat16(), 1, 0)


def refusals_case(device: torch.device) -> None:
    """What no kernel takes is refused before anything is written."""
    ones = torch.ones(24, device=device)
    for x in (
        ones.view(4, 6).T,
        ones[::2],
        ones[:1].expand(9),
        ones.view(4, 6)[:, 1:],
        ones.double(),
        ones.half(),
        ones.int(),
        ones.to(torch.complex64),
    ):
        before, update = x.clone(), Update.of([Probe(1, 0, 1.0)])
        for kind in ("sign", "gauss"):
            with pytest.raises(ValueError, match="contiguous float32"):
                update_(x, [Probe(1, 0, 1.0)], kind, 0)
            with pytest.raises(ValueError, match="contiguous float32"):
                update_pieces_([Piece(ones, 0, 0), Piece(x, 0, 0)], [update], kind)
            with pytest.raises(ValueError, match="contiguous float32"):
                perturb(x, 1.0, kind, 1, 0, 0)
        with pytest.raises(ValueError, match="contiguous float32"):
            parameter_sum(x)
        with pytest.raises(ValueError, match="contiguous float32"):
            parameter_sums({"a": ones, "b": x}, {"a": 0, "b": 0})
        with pytest.raises(ValueError, match="flat contiguous rows"):
            round_to_bfloat16(x, torch.empty(x.numel(), dtype=torch.bfloat16, device=device), 1, 0)
        assert torch.equal(x, before)
        assert bool((ones == 1).all())


def views_case(device: torch.device) -> None:
    """Nothing beyond a view is read or written; as they come out of files, views begin at any element."""
    for n in (1, 127, 4097, 8300):
        whole = torch.full((n + 64,), 7.0, device=device)
        theta = whole[33 : 33 + n]
        update_(theta, [Probe(1, 0, 0.5)], "sign", 0, 4000)
        update_pieces_([Piece(theta, 0, 4000)], [Update.of([Probe(2, 0, 0.25)])], "gauss")
        compressor = TopK(k=5, group_size=2000)
        (packed,) = Sent(compressor.pack_layout, [Source(Part.whole((n,)), theta)]).packs()
        target = Updated(theta, Part.whole((n,)), [packed], Step(0.5, 0.5))
        update(compressor, [target], [1.0], Turn(1, 2, 3, 1.0))
        assert bool((whole[:33] == 7).all())
        assert bool((whole[33 + n :] == 7).all())
        assert bool((theta != 7).all())


def known_answers_case(device: torch.device) -> None:
    names = KNOWN_ANSWERS if device.type != "cpu" else INTERPRETED
    assert failed_kernels(device, "triton", names) == []


CASES: dict[str, Callable[[torch.device], None]] = {
    "sign noise": partial(noise_case, "sign"),
    "normal noise": partial(noise_case, "gauss"),
    "pieces": pieces_case,
    "perturbed": perturb_case,
    "fingerprints": fingerprint_case,
    "rounding": rounding_case,
    **PAYLOAD_CASES,
    **ROUND_CASES,
    "nothing": nothing_case,
    "refusals": refusals_case,
    "views": views_case,
    "known answers": known_answers_case,
}


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        try:
            CASES[line.strip()](torch.device("cpu"))
            answer = None
        except (Exception, pytest.fail.Exception):  # noqa: BLE001 - the one who asked reports it
            answer = traceback.format_exc()
        print(json.dumps(answer), flush=True)  # noqa: T201


if __name__ == "__main__":
    assert os.environ["TRITON_INTERPRET"] == "1"
    assert os.environ["THINWIRE_KERNELS"] == "triton"
    main()
