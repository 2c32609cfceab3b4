"""`thinwire bench`: times as ratios to a baseline and to the copy bandwidth, all measured in the same run.

A benchmark is a function (n_params, n_repeats) -> results; a new one is one file and one row in `BENCHES`.
Results are plain values: `ratio_to_baseline` is how many times faster than the baseline we are,
`fraction_of_copy_bandwidth` the least traffic with memory that the work needs, at the bandwidth of a copy,
over the time that it took.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from thinwire.compression.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Rows name a function: its module is loaded when it is asked for.
BENCHES: Final = {
    "noise": "thinwire.node.bench_noise:bench_noise",
    "decoupled": "thinwire.node.bench_decoupled:bench_decoupled",
    "round": "thinwire.node.bench_round:bench_round",
    "wire": "thinwire.node.bench_wire:bench_wire",
    "memory": "thinwire.node.bench_memory:bench_memory",
}

DEFAULT_N_PARAMS: Final = 28_000_000


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of repeated runs."""

    median_s: float
    min_s: float
    max_s: float
    n_repeats: int

    def to_dict(self) -> dict[str, float]:
        return {"median_s": self.median_s, "min_s": self.min_s, "max_s": self.max_s}


def bench_command(name: str, n_params: int | None, n_repeats: int, as_json: bool) -> None:
    """Runs one benchmark, or all: tables on stdout, or one JSON object."""
    names = list(BENCHES) if name == "all" else [name]
    results = {each: run_bench(each, n_params, n_repeats) for each in names}
    if as_json:
        print(json.dumps(results.get(name, results), indent=1))  # noqa: T201
    else:
        for result in results.values():
            print_bench(result)


def run_bench(name: str, n_params: int | None, n_repeats: int) -> dict[str, Any]:
    """Results of one benchmark, with the machine that it ran on. Raises ConfigError for a wrong argument."""
    if name not in BENCHES:
        raise ConfigError(f"no benchmark is called {name!r}: one of {', '.join(BENCHES)}, all")
    if n_repeats < 1:
        raise ConfigError(f"{n_repeats} repeats: at least 1")
    if n_params is not None and not 1_000_000 <= n_params <= 10**10:
        raise ConfigError(f"{n_params} parameters: between 1e6 and 1e10")
    module, _, function = BENCHES[name].partition(":")
    bench = getattr(import_module(module), function)
    return {
        "bench": name,
        "machine": machine(),
        **bench(DEFAULT_N_PARAMS if n_params is None else n_params, n_repeats),
    }


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    import torch

    return {
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }


def print_bench(result: dict[str, Any]) -> None:
    """The results as a table on stdout; nested results get the names of all levels."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"bench {result['bench']}", show_header=False)
    for key, value in _flat(result):
        if key != "bench":
            table.add_row(key, _words(key, value))
    Console(file=sys.stdout).print(table)


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        rows += _flat(value, f"{prefix}{key} ") if isinstance(value, dict) else [(prefix + key, value)]
    return rows


def _words(key: str, value: Any) -> str:
    if key.endswith("_bytes_per_s"):
        return f"{value / 1e9:.2f} GB/s"
    if key.endswith("_per_s"):
        return f"{value / 1e6:,.0f} M/s"
    if key.endswith("_s"):
        return f"{value * 1e3:.2f} ms"
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


# ------------------------------------------------------------------------------------------- helpers


def measure(work: Callable[[], object], n_repeats: int, n_warm_up: int = 1) -> Timing:
    """Runs `work` a few times; the first ones do not count."""
    for _ in range(n_warm_up):
        work()
    seconds = []
    for _ in range(n_repeats):
        start_s = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start_s)
    return Timing(median(seconds), min(seconds), max(seconds), n_repeats)


def copy_bandwidth(n_params: int, n_repeats: int) -> float:
    """Bytes per second of an out-of-place copy of float32 values, at its quickest: 8 bytes move per value."""
    import torch

    source, target = torch.ones(n_params), torch.zeros(n_params)
    return 8 * n_params / measure(lambda: target.copy_(source), max(n_repeats, 10)).min_s


def transformer(n_params: int) -> dict[str, torch.nn.Parameter]:
    """About `n_params` parameters in the shapes of a transformer of 8 blocks; fixed values."""
    import torch

    width = 64 * max(1, round((n_params / 107) ** 0.5 / 64))  # 8 blocks of 12 width^2, 11 width rows to embed
    shapes: dict[str, tuple[int, ...]] = {"embed": (11 * width, width)}
    for i in range(8):
        block = {
            "norm": (width,),
            "qkv": (3 * width, width),
            "out": (width, width),
            "up": (4 * width, width),
            "up_bias": (4 * width,),
            "down": (width, 4 * width),
        }
        shapes |= {f"block.{i}.{name}": shape for name, shape in block.items()}
    generator = torch.Generator().manual_seed(1)
    return {name: torch.nn.Parameter(_normal(shape, generator)) for name, shape in shapes.items()}


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    import torch

    return torch.randn(shape, generator=generator) * 0.02
