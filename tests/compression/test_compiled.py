"""Kernels from the disk, in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from thinwire.node.doctor.compiling import compile_kernels

KERNELS = """
import sys
import numpy as np
from thinwire.compression.compiled import compiled

@compiled
def filled(n, value):
    array = np.empty(n, np.int64)
    for i in range(n):
        array[i] = value
    return array

@compiled
def doubled(n, value):
    return filled(n, value + value)

if __name__ == "__main__":
    print(*(int(kernel(3, 4)[2]) for kernel in (filled, doubled)[:int(sys.argv[1])]))
    print(sum(filled.stats.cache_hits.values()), sum(doubled.stats.cache_misses.values()))
    print("numba.np.linalg" in sys.modules)
"""

ANSWERS = """
import sys, torch
from thinwire.node.doctor.self_test import refuse_wrong_arithmetic
refuse_wrong_arithmetic(torch.device("cpu"))
heavy = {"numba.np.linalg", "numba.np.arraymath", "numba.np.npyimpl", "scipy.linalg"}
print(sorted(heavy & set(sys.modules)))
"""


def output(*args: str) -> str:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=True).stdout.strip()


def test_what_was_loaded_can_be_called_and_compiled_into_others(tmp_path: Path) -> None:
    path = tmp_path / "kernels.py"
    path.write_text(KERNELS)
    assert output(str(path), "1") == "4\n0 0\nTrue"
    assert output(str(path), "1") == "4\n1 0\nFalse"
    assert output(str(path), "2") == "4 8\n1 1\nTrue"


def test_kernels_load_nothing_that_only_compiling_takes() -> None:
    compile_kernels(print)  # where they are not there yet
    assert output("-c", ANSWERS) == "[]"
