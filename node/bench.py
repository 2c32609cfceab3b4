"""`thinwire bench`: times as ratios to a baseline and to the copy bandwidth, all measured in the same run.

A benchmark is a function (n_params, n_repeats) -> results; a new one is one file and one row in `BENCHES`.
Results are plain values: `least_n_bytes` is the least traffic with memory that the work needs,
`fraction_of_copy_bandwidth` that traffic at the bandwidth of a copy, over the time that it took,
`ratio_to_baseline` how many times faster than the baseline we are. Times are medians, with least and most; a
fraction "at best" is that of the least, for machines that have other work to do.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
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
    "diloco": "thinwire.node.bench_diloco:bench_diloco",
    "peers": "thinwire.node.bench_peers:bench_peers",
    "round": "thinwire.node.bench_round:bench_round",
    "join": "thinwire.node.bench_join:bench_join",
    "wire": "thinwire.node.bench_wire:bench_wire",
    "memory": "thinwire.node.bench_memory:bench_memory",
}

SIZELESS: Final = frozenset(["round", "join"])
"""Their model is a small one of their own."""

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


def bench_command(
    name: str, sizes: Sequence[int] | None, n_repeats: int, as_json: bool, picture: Path | None = None
) -> None:
    """Runs one benchmark, or all, for every size: tables on stdout, or one JSON object; and a PNG."""
    from thinwire.node.bench_view import check_picture, print_bench, save_picture

    names = list(BENCHES) if name == "all" else [name]
    if picture is not None:
        check_picture(picture)
    results = {each: run_sizes(each, sizes, n_repeats) for each in names}
    if as_json:
        printed = {each: _plain(result) for each, result in results.items()}
        print(json.dumps(printed.get(name, printed), indent=1))  # noqa: T201
    else:
        for result in results.values():
            print_bench(result)
    if picture is not None:
        save_picture(picture, list(results.values()))


def _plain(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One result as it is; several as the list `sizes`, with what they share beside it."""
    if len(results) == 1:
        return results[0]
    first = results[0]
    shared = {key: first[key] for key in ("bench", "machine")}
    return {**shared, "sizes": [{k: v for k, v in r.items() if k not in shared} for r in results]}


def parse_sizes(text: str) -> list[int]:
    """ "1e6,1e8" -> [1000000, 100000000]. Raises ConfigError."""
    try:
        sizes = [int(float(word)) for word in text.split(",")]
    except (ValueError, OverflowError):
        raise ConfigError(f"--params {text}: numbers with commas between them, e.g. 1e6,1e8") from None
    return sorted(set(sizes))


def run_sizes(name: str, sizes: Sequence[int] | None, n_repeats: int) -> list[dict[str, Any]]:
    """A result for each size; one for a benchmark that no size has an influence on."""
    if sizes is None or name in SIZELESS:
        sizes = None if not sizes else sizes[:1]
        return [run_bench(name, None if sizes is None else sizes[0], n_repeats)]
    for n_params in sizes:  # all of them, before the first takes its time
        _check_arguments(name, n_params, n_repeats)
    return [run_bench(name, n_params, n_repeats) for n_params in sizes]


def run_bench(name: str, n_params: int | None, n_repeats: int) -> dict[str, Any]:
    """Results of one benchmark, with the machine that it ran on. Raises ConfigError for a wrong argument."""
    _check_arguments(name, n_params, n_repeats)
    module, _, function = BENCHES[name].partition(":")
    bench = getattr(import_module(module), function)
    return {
        "bench": name,
        "machine": machine(),
        **bench(DEFAULT_N_PARAMS if n_params is None else n_params, n_repeats),
    }


def _check_arguments(name: str, n_params: int | None, n_repeats: int) -> None:
    if name not in BENCHES:
        raise ConfigError(f"no benchmark is called {name!r}: one of {', '.join(BENCHES)}, all")
    if n_repeats < 1:
        raise ConfigError(f"{n_repeats} repeats: at least 1")
    if n_params is not None and not 1_000_000 <= n_params <= 10**10:
        raise ConfigError(f"{n_params} parameters: between 1e6 and 1e10")


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    import torch

    return {
        "cpu": platform.processor() or platform.machine(),
        "n_cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }


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
    """Bytes per second of an out-of-place copy of float32 values, at its quickest: 8 bytes move per value. So
    many values that they are in no cache."""
    import torch

    n = max(n_params, 1 << 25)
    source, target = torch.ones(n), torch.zeros(n)
    return 8 * n / measure(lambda: target.copy_(source), max(n_repeats, 10)).min_s


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
