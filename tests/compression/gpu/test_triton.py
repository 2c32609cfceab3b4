"""The Triton kernels: the reference's bits through the interpreter, machine code for GPUs that fuses and
approximates nothing, and the reference's bits on CUDA where there is such a device."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.paths import ROOT
from tests.support.updates import Updated, update
from thinwire.compression.base import Part, Step, Turn
from thinwire.compression.codecs.dct_topk import DctTopK
from thinwire.compression.codecs.sparse import Sparse
from thinwire.compression.codecs.topk import TopK
from thinwire.compression.fingerprint import parameter_sum
from thinwire.compression.numerics.noise import update_
from thinwire.compression.numerics.noise_layout import Probe
from thinwire.compression.numerics.rounding import round_to_bfloat16
from thinwire.optim.base import Share
from thinwire.optim.decoupled import Decoupled

TRITON = pytest.importorskip("triton", reason="Triton is not installed: pip install 'thinwire[test]'")

from tests.support.triton_cases import CASES  # noqa: E402 - needs Triton

CANNOT_INTERPRET = TRITON.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0"
NO_CUDA = "there is no CUDA device: Triton's kernels have been interpreted and compiled, but not run"

FUSED = r"\bfma\."
OF_A_PRODUCT = {
    "fused update: _update": 2 * 64 * 32**2 // 256,
    "fused update of tiles: _update": 2 * 64**3 // 256,
    "packing: _select": 4 * 64 * 32**2 // 256,
    "packing of tiles: _select": 4 * 64**3 // 512,
}
"""Fused operations per thread in products of integers, whose sums are exact either way; when packing, also in
the transform itself, which is local work."""

INEXACT = {
    "flushed denormals": r"\.ftz\b",
    "approximations": r"\.approx\b|\bdiv\.full",
    "shorter floats": r"\btf32|\bmma\.|\bwgmma\.",
    "roundings not spelled out": r"\b(add|sub|mul)\.f32",
}


def environment(**more: str) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "THINWIRE_"))}
    return {**inherited, **more}


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[[str], Any]]:
    """Runs a case of triton_cases.py through the interpreter; None, or what went wrong."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.triton_cases"],
        cwd=ROOT,
        env=environment(TRITON_INTERPRET="1", THINWIRE_KERNELS="triton", OMP_NUM_THREADS="1"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        questions, answers = process.stdin, process.stdout
        assert questions
        assert answers

        def ask(case: str) -> Any:
            questions.write(case + "\n")
            questions.flush()
            return json.loads(answers.readline())

        yield ask
        questions.close()


@pytest.mark.skipif(CANNOT_INTERPRET, reason="the interpreter of Triton 3.6 needs numpy 2.3 or older")
@pytest.mark.parametrize("case", CASES)
def test_through_the_interpreter(interpreted: Callable[[str], Any], case: str) -> None:
    failure = interpreted(case)
    assert failure is None, failure


@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CUDA)
@pytest.mark.parametrize("case", CASES)
def test_on_cuda(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setenv("THINWIRE_KERNELS", "triton")
    CASES[case](torch.device("cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CUDA)
def test_more_elements_than_32_bits_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last of 2^31 + 9 elements are those that a small tensor at their place has."""
    n, tail = (1 << 31) + 9, 5000
    if torch.cuda.mem_get_info()[0] < 9 * n:
        pytest.skip("needs 20 GB of free memory on the device")
    theta = torch.zeros(n, device="cuda")
    probes = [Probe(7, 0, 0.5), Probe(8, 1, 0.25)]
    update_(theta, probes, "sign", 1)
    rounded = torch.empty(n, dtype=torch.bfloat16, device="cuda")
    round_to_bfloat16(theta, rounded, 5, 1)
    found = theta[-tail:].cpu(), rounded[-tail:].cpu(), parameter_sum(rounded)
    head = parameter_sum(rounded[:-tail])
    monkeypatch.setenv("THINWIRE_KERNELS", "torch")
    expected = torch.zeros(tail)
    update_(expected, probes, "sign", 1, n - tail)
    assert torch.equal(found[0], expected)
    expected_rounded = torch.empty(tail, dtype=torch.bfloat16)
    round_to_bfloat16(expected, expected_rounded, 5, 1, n - tail)
    assert torch.equal(found[1], expected_rounded)
    assert found[2] == (head + parameter_sum(expected_rounded, n - tail)) % (1 << 64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CUDA)
def test_groups_farther_out_than_32_bits_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the last 4096 + 9 of 2^31 + 9 elements are not zero: they become the pack, and the step, of a
    small tensor that has nothing else."""
    monkeypatch.setenv("THINWIRE_KERNELS", "triton")
    n, tail = (1 << 31) + 9, 4096 + 9
    if torch.cuda.mem_get_info()[0] < 12 * n:
        pytest.skip("needs 26 GB of free memory on the device")
    compressor, turn = TopK(k=4, bits=8, indices="packed"), Turn(1, 2, 3, 1.0)
    momentum, theta = torch.zeros(n, device="cuda"), torch.zeros(n, device="cuda")
    small = torch.linspace(-1, 2, tail, device="cuda")
    momentum[-tail:] = small
    packs = {}
    for x in (momentum, small):
        part = Part.whole(x.shape)
        packs[x.numel()] = compressor.pack(x, part, turn)
        compressor.check(packs[x.numel()], part, turn)
        target = Updated(theta[: x.numel()], part, [packs[x.numel()]], Step(0.5))
        update(compressor, [target], [1.0], turn)
        if x is momentum:
            far, _ = theta[-tail:].clone(), theta.zero_()
    assert torch.equal(packs[n][0][-2:], packs[tail][0])
    assert torch.equal(packs[n][1], packs[tail][1])
    assert torch.equal(far, theta[:tail])
    assert bool(far.any())


@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CUDA)
@pytest.mark.parametrize("compressor", [DctTopK(k=4, group_size=256), TopK(k=4, group_size=256)], ids=str)
def test_a_round_waits_for_nothing_but_its_payload(
    monkeypatch: pytest.MonkeyPatch, compressor: Sparse
) -> None:
    """In the second round: tables of constants are there. torch raises for operations that wait."""
    monkeypatch.setenv("THINWIRE_KERNELS", "triton")
    model = torch.nn.Linear(100, 100, device="cuda")
    x = torch.ones(9, 100, device="cuda")
    strategy = Decoupled(model.named_parameters(), compressor=compressor, accumulate=2, max_grad_norm=1.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype feature")
        torch.cuda.set_sync_debug_mode("warn")  # says that once
    try:
        for round in (1, 2):
            turn = Turn(round, 1, 2, 1.0)
            torch.cuda.set_sync_debug_mode("error" if round == 2 else "default")
            payload = strategy.propose(lambda: lambda: model(x).square().mean(), turn)
            strategy.apply([Share(1, 1, payload)] * 2, turn, "counted")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def lines_with(pattern: str, text: str) -> list[str]:
    return [line for line in text.splitlines() if re.search(pattern, line)]


CAUGHT = [
    "add.rn.ftz.f32 %f1, %f2, %f3;",
    "div.full.f32 %f1, %f2, %f3;",
    "sqrt.approx.f32 %f1, %f2;",
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1}, {%r1}, {%r2}, {%f1};",
    "mul.f32 %f1, %f2, %f3;",
]


def test_the_patterns_catch() -> None:
    for line in CAUGHT:
        assert any(lines_with(pattern, line) for pattern in INEXACT.values()), line


def test_what_is_compiled_rounds_every_operation_once(tmp_path: Path) -> None:
    """The interpreter cannot show it: it computes with numpy, whatever a compiler would do."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests/support/triton_assembly.py"],
        env=environment(TRITON_CACHE_DIR=str(tmp_path), TRITON_DISABLE_LINE_INFO="1"),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assembly = json.loads(done.stdout)
    wrong = {
        f"{kernel}: {why}": lines
        for kernel, text in assembly["exact"].items()
        for why, pattern in INEXACT.items()
        if (lines := lines_with(pattern, text))
    }
    assert wrong == {}
    n_fused = {kernel: len(lines_with(FUSED, text)) for kernel, text in assembly["exact"].items()}
    assert {kernel: n for kernel, n in n_fused.items() if n} == OF_A_PRODUCT
    assert lines_with(r"\bsub\.rn\.f32", assembly["exact"]["sign noise: _combine"])
    for kernel in (
        "noise for all: _combine_all",
        "bfloat16 noise for all: _combine_all",
        "fingerprint: _sum",
    ):
        assert lines_with(r"\bld\.global\S*\.v4", assembly["exact"][kernel]), f"{kernel} reads word by word"
    assert lines_with(FUSED, assembly["fused"]), "a launch that forbids no fusion would not be found"
