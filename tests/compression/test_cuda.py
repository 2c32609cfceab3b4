"""Replicas on a GPU and on a CPU are the same to the last bit, and so is every kernel that changes them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.local_nodes import STRATEGIES, config_of, run_all, swarm_of
from tests.support.updates import Updated
from tests.support.updates import update as update_by
from thinwire.compression.base import Part, Step, Turn
from thinwire.compression.codecs.dct_topk import DctTopK
from thinwire.compression.codecs.topk import TopK
from thinwire.compression.exact import to_float32
from thinwire.compression.fingerprint import parameter_sums
from thinwire.compression.numerics.noise import perturb, update_pieces_
from thinwire.compression.numerics.noise_layout import MAX_PROBES, Piece, Probe, Update
from thinwire.compression.numerics.rounding import round_to_bfloat16
from thinwire.node.runner import Runner

TURN = Turn(round=1, shared_seed=2, own_seed=3, lr_factor=1.0)

DILOCO: Mapping[str, Any] = {"name": "diloco", "lr": 3e-3, "inner_steps": 2, "compressor": {"name": "topk"}}
SPSA_GAUSS: Mapping[str, Any] = {**STRATEGIES["spsa"], "noise": "gauss"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: no replica has been on a GPU")
@pytest.mark.parametrize(
    "strategy", [*STRATEGIES.values(), SPSA_GAUSS, DILOCO], ids=[*STRATEGIES, "spsa-gauss", "diloco"]
)
def test_a_gpu_and_a_cpu_have_the_same_replica(tmp_path: Path, strategy: Mapping[str, Any]) -> None:
    compare_devices(tmp_path, strategy, ("cpu", "cuda"), rounds=100)


def test_the_comparison_itself(tmp_path: Path) -> None:
    """What the test above does, where there is no GPU."""
    compare_devices(tmp_path, DILOCO, ("cpu", "cpu"), rounds=4)


def compare_devices(folder: Path, strategy: Mapping[str, Any], devices: tuple[str, str], rounds: int) -> None:
    config = config_of(strategy, min_peers=2, rounds=rounds, eval_every=rounds)
    with swarm_of(folder, config) as swarm:
        runners = [Runner(swarm.link(f"peer-{i}"), device=device) for i, device in enumerate(devices)]
        results = run_all(runners)
        assert swarm.call(lambda service, now_s: service.status(now_s))["mismatches"] == 0
    assert {r.rounds for r in results} == {rounds}
    assert len({r.fingerprint for r in results}) == 1


# ------------------------------------------------------------------------------------------- kernels

Run = Callable[[torch.device], list[Tensor]]
"""An operation on inputs that are drawn: what it gives on a device."""


def drawn_place(rng: random.Random) -> tuple[int, int]:
    """A number of elements and the global index of the first one."""
    n = rng.choice([0, 1, 128, 4096, *(rng.randrange(1, m) for m in (40, 300, 9000, 30_000))])
    return n, rng.choice([0, 0, 1, 16, 4095, 4096, (1 << 31) - 5, rng.randrange(1 << 45)])


def drawn(rng: random.Random, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    return torch.empty(n).uniform_(-1, 1, generator=generator) * 2.0 ** rng.choice([0, 0, -20, -126, 40])


def placed(x: Tensor, device: torch.device, skipped: int) -> Tensor:
    """A copy, `skipped` elements after where an allocation begins."""
    room = torch.empty(x.numel() + skipped, dtype=x.dtype, device=device)
    room[skipped:] = x.to(device)
    return room[skipped:]


def update(rng: random.Random) -> Run:
    """Of several tensors, both types, by several probes and rounds."""
    updates = []
    for _ in range(rng.randrange(1, 4)):
        probes = [
            Probe(rng.getrandbits(64), rng.randrange(MAX_PROBES), to_float32(rng.gauss(0, 1)))
            for _ in range(rng.randrange(5))
        ]
        updates.append(Update.of(probes, rng.choice([1.0, to_float32(rng.random())])))
    rows = [
        (drawn(rng, n).to(rng.choice([torch.float32, torch.bfloat16])), start, rng.choice([0, 0, 1, 8]))
        for n, start in (drawn_place(rng) for _ in range(rng.randrange(1, 4)))
    ]
    kind, seed = rng.choice(["sign", "gauss"]), rng.getrandbits(64)

    def run(device: torch.device) -> list[Tensor]:
        pieces = [Piece(placed(x, device, skip), i, start) for i, (x, start, skip) in enumerate(rows)]
        update_pieces_(pieces, updates, kind, seed)  # type: ignore[arg-type]
        return [p.theta for p in pieces]

    return run


def perturbation(rng: random.Random) -> Run:
    n, start = drawn_place(rng)
    x, seed, eps, skip = drawn(rng, n), rng.getrandbits(64), to_float32(rng.gauss(0, 1)), rng.randrange(5)
    kind, index = rng.choice(["sign", "gauss"]), rng.getrandbits(32)
    return lambda device: [perturb(placed(x, device, skip), eps, kind, seed, index, 7, start)]  # type: ignore[arg-type]


def sums(rng: random.Random) -> Run:
    places = {str(i): drawn_place(rng) for i in range(rng.randrange(1, 4))}
    rows = {
        name: drawn(rng, n).to(rng.choice([torch.float32, torch.bfloat16])) for name, (n, _) in places.items()
    }
    starts, skip = {name: start for name, (_, start) in places.items()}, rng.randrange(3)

    def run(device: torch.device) -> list[Tensor]:
        found = parameter_sums({name: placed(x, device, skip) for name, x in rows.items()}, starts)
        return [torch.tensor(list(found[name].to_bytes(8, "little"))) for name in rows]

    return run


def rounding(rng: random.Random) -> Run:
    n, start = drawn_place(rng)
    x, seed, index = drawn(rng, n), rng.getrandbits(64), rng.getrandbits(32)

    def run(device: torch.device) -> list[Tensor]:
        out = torch.zeros(n, dtype=torch.bfloat16, device=device)
        round_to_bfloat16(placed(x, device, 1), out, seed, index, start)
        return [out]

    return run


def fused_update(rng: random.Random) -> Run:
    """Of several parameters and peers, in any format; whole ones and parts."""
    size = rng.choice([64, 100, 256, 1024, 4096])
    how: dict[str, Any] = {"k": rng.randrange(1, 40), "group_size": size}
    how |= {"bits": rng.choice([1, 2, 4, 8, 16, "e3m0"]), "indices": rng.choice(["packed", "rice"])}
    layout = rng.choice(["flat", "tiles"]) if size != 100 else "flat"
    compressor = rng.choice([TopK(**how), DctTopK(**how, layout=layout)])  # type: ignore[arg-type]
    weights = [rng.choice([1.0, 3.0, 0.7]) for _ in range(rng.randrange(1, 5))]
    rows = []
    for shape in rng.sample([(rng.randrange(9000),), (130, 67), (64, 200), (3, 5, 7)], rng.randrange(1, 4)):
        whole = Part.whole(shape)
        packs = [compressor.pack(drawn(rng, whole.n_global), whole, TURN) for _ in weights]
        start = rng.randrange(whole.n_global + 1) if rng.random() < 0.4 else 0
        part = Part(shape, start, rng.randrange(start, whole.n_global + 1) if start else whole.n_global)
        step = Step(to_float32(rng.random()), rng.choice([1.0, 0.875]), rng.random() < 0.5)
        rows.append((drawn(rng, part.n_local), part, packs, step))

    def run(device: torch.device) -> list[Tensor]:
        targets = [Updated(placed(x, device, 1), *rest) for x, *rest in rows]
        update_by(compressor, targets, weights, TURN)
        return [t.x for t in targets]

    return run


OPERATIONS: dict[str, Callable[[random.Random], Run]] = {
    "update": update,
    "perturbation": perturbation,
    "sums": sums,
    "rounding": rounding,
    "fused update": fused_update,
}


@contextmanager
def kernels(name: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("THINWIRE_KERNELS", name)
        yield


def compare_kernels(operation: str, backends: list[tuple[str, str]], n_shapes: int) -> None:
    """`backends`: implementation and device, the first one is the reference."""
    rng = random.Random(operation)
    for number in range(n_shapes):
        with kernels("torch"):
            run = OPERATIONS[operation](rng)
        found = []
        for name, device in backends:
            with kernels(name):
                found.append([t.cpu().contiguous().view(torch.uint8) for t in run(torch.device(device))])
        for backend, result in zip(backends[1:], found[1:], strict=True):
            assert all(map(torch.equal, result, found[0])), (operation, number, backend)


CPU = [("torch", "cpu")] + [("numba", "cpu")] * (find_spec("numba") is not None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: no kernel has been run on a GPU")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_cuda_numba_and_torch_give_the_same_bits(operation: str) -> None:
    on_gpu = [("torch", "cuda")] + [("triton", "cuda")] * (find_spec("triton") is not None)
    compare_kernels(operation, CPU + on_gpu, n_shapes=100)


@pytest.mark.skipif(len(CPU) == 1, reason="the numba kernels are an extra")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_numba_and_torch_give_the_same_bits(operation: str) -> None:
    compare_kernels(operation, CPU, n_shapes=8)
