"""The kernel self-test: passes with every implementation here, and names what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.local_nodes import STRATEGIES as NODES
from tests.support.local_nodes import config_of, swarm_of
from thinwire.compression import fingerprint
from thinwire.compression.errors import Incompatible
from thinwire.compression.numerics import dct, noise, value_formats
from thinwire.compression.registry import COMPRESSORS
from thinwire.node.doctor.known_answers import KNOWN_ANSWERS
from thinwire.node.doctor.self_test import accelerators, backends, failed_kernels, refuse_wrong_arithmetic
from thinwire.node.run_node import check_compressors
from thinwire.node.runner import Runner
from thinwire.optim.parts import adamw, byte_code
from thinwire.optim.registry import STRATEGIES, strategy_class

CPU = torch.device("cpu")


def test_every_implementation_passes(kernels: str) -> None:
    known = {name: hex(path.answer) for name, path in KNOWN_ANSWERS.items()}
    assert {name: hex(path.run(CPU)) for name, path in KNOWN_ANSWERS.items()} == known
    assert failed_kernels(CPU) == []


def test_no_compressor_and_no_strategy_is_passed_over() -> None:
    spelled_out = {"dct_topk", "topk", "dense", "none"}  # in known_answers.py; the last one sends nothing
    assert {name for name, kind in COMPRESSORS.items() if not kind.known_decodings} == spelled_out
    assert all(strategy_class(name).facts.known_updates for name in STRATEGIES)


def test_a_node_does_not_wait_for_what_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(device: torch.device) -> int:
        raise NotImplementedError

    slow = {name: path for name, path in KNOWN_ANSWERS.items() if path.is_slow}
    assert slow
    for name, path in slow.items():
        monkeypatch.setitem(KNOWN_ANSWERS, name, replace(path, run=missing))
    refuse_wrong_arithmetic(CPU)


def broken_for_compressors(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, path in KNOWN_ANSWERS.items():
        if path.of_compressors:
            monkeypatch.setitem(KNOWN_ANSWERS, name, replace(path, answer=path.answer ^ 1))


def test_what_only_compressors_need_is_asked_for_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    broken_for_compressors(monkeypatch)
    refuse_wrong_arithmetic(CPU, of_compressors=False)
    for of_compressors in (True, None):
        with pytest.raises(Incompatible, match="transform decoding") as refused:
            refuse_wrong_arithmetic(CPU, of_compressors)
        assert "noise" not in str(refused.value)


@pytest.mark.parametrize("strategy", ["decoupled", "spsa"])
def test_a_run_with_a_compressor_needs_its_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    broken_for_compressors(monkeypatch)
    with swarm_of(tmp_path, config_of(NODES[strategy], min_peers=1)) as swarm:
        runner = Runner(swarm.link("peer-0"), on_prepared=check_compressors)
        if strategy == "decoupled":
            with pytest.raises(Incompatible, match="transform decoding"):
                runner.run()
        else:
            assert runner.run().rounds == 6


def test_every_backend_of_this_machine_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THINWIRE_KERNELS", "torch")
    found = backends()
    assert "torch on cpu" in map(str, found)
    for backend in found:
        assert failed_kernels(backend.device, backend.kernels) == [], str(backend)
    assert os.environ["THINWIRE_KERNELS"] == "torch", "what was chosen is chosen again"


@pytest.mark.skipif(not accelerators(), reason="there is no device beside the CPU")
def test_an_accelerator_gives_the_answers_of_the_cpu() -> None:
    for device in accelerators():
        assert failed_kernels(device) == []


def test_a_thread_more_or_less_makes_no_difference(kernels: str) -> None:
    before = torch.get_num_threads()
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            assert failed_kernels(CPU) == []
    finally:
        torch.set_num_threads(before)


def _one_bit(table: tuple[float, ...], at: int) -> tuple[float, ...]:
    return (*table[:at], table[at] + 2.0**-20, *table[at + 1 :])


FLAT_TRANSFORMS = {"transform decoding", "transform update"}
BREAKS: dict[str, tuple[object, str, Any, set[str]]] = {
    "normal table": (noise, "NORMAL_256", lambda t: _one_bit(t, 77), {"normal noise", "initial weights"}),
    "transform": (dct, "INVERSE_SCALE", lambda x: x + 2.0**-30, FLAT_TRANSFORMS),
    "rounding": (dct, "TOP_BIT", lambda x: x - 1, FLAT_TRANSFORMS | {"tile decoding"}),
    "rates": (adamw, "power", lambda _: lambda beta, t: beta**t * (1 + 2.0**-20), {"adamw update"}),
    "codes": (byte_code, "MAGNITUDES", lambda t: tuple(x * 1.001 for x in t), {"spsa update"}),
    "hash": (fingerprint, "LAST_SHIFT", lambda x: x + 1, set(KNOWN_ANSWERS) - {"packing"}),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_what_computes_something_else_is_named(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    module, name, change, expected = BREAKS[broken]
    monkeypatch.setenv("THINWIRE_KERNELS", "torch")
    monkeypatch.setattr(module, name, change(getattr(module, name)))
    assert set(failed_kernels(CPU)) == expected


def test_a_level_that_is_off_by_one_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = value_formats.FORMATS[4].levels  # type: ignore[attr-defined]
    changed = levels.copy()
    changed[4] += 2.0**-20
    monkeypatch.setattr(value_formats.FORMATS[4], "levels", changed)
    assert failed_kernels(CPU) == ["4-bit values"]


def test_a_kernel_that_cannot_run_is_named_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(device: torch.device) -> int:
        raise NotImplementedError("no such operation\nand a long story")

    monkeypatch.setitem(
        KNOWN_ANSWERS, "matrix products", replace(KNOWN_ANSWERS["matrix products"], run=missing)
    )
    assert failed_kernels(CPU) == ["matrix products (NotImplementedError: no such operation)"]
    with pytest.raises(Incompatible, match=r"matrix products .* failed the self-test") as refused:
        refuse_wrong_arithmetic(CPU)
    assert refused.value.exit_code == 4
    assert "thinwire doctor" in str(refused.value)


def test_a_machine_that_flushes_denormals_is_found() -> None:
    """In a process of its own: the setting is the thread's, and stays."""
    pytest.importorskip("numba", reason="the numba kernels are an extra")
    program = (
        "import os, torch\n"
        "from thinwire.node.doctor.self_test import failed_kernels\n"
        "assert torch.set_flush_denormal(True)\n"
        "for kernels in ('torch', 'numba'):\n"
        "    os.environ['THINWIRE_KERNELS'] = kernels\n"
        "    print(*failed_kernels(torch.device('cpu')), sep=', ')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    by_kernels = done.stdout.strip().split("\n")
    assert len(by_kernels) == 2
    for failed in by_kernels:
        assert {"denormal numbers", "weighted mean"} <= set(failed.split(", "))


def test_kernels_that_can_be_kept_nowhere_are_no_wrong_arithmetic() -> None:
    """An installation that is read-only, and no cache folder: in a process of its own, numba asks once."""
    pytest.importorskip("numba", reason="the numba kernels are an extra")
    program = (
        "import torch\n"
        "from thinwire.compression.errors import ConfigError\n"
        "from thinwire.node.doctor.compute import _self_test\n"
        "from thinwire.node.doctor.self_test import Backend, refuse_wrong_arithmetic\n"
        "cpu = torch.device('cpu')\n"
        "print(_self_test(Backend('numba', cpu), True, lambda: False))\n"
        "try:\n"
        "    refuse_wrong_arithmetic(cpu)\n"
        "except ConfigError as e:\n"
        "    print(e)\n"
    )
    nowhere = {"NUMBA_CACHE_LOCATOR_CLASSES": "_UserProvidedCacheLocator", "THINWIRE_KERNELS": "auto"}
    environ = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"} | nowhere
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environ
    )
    finding, refusal = done.stdout.strip().split("\n")
    assert "failed" in finding
    for said in (finding, refusal):
        assert "numba finds no folder to keep compiled kernels in (" in said
        assert "NUMBA_CACHE_DIR=DIR" in said
        assert "something else" not in said
