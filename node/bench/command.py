"""`thinwire bench`: times as ratios to a baseline and to the copy bandwidth, all measured in the same run.

A benchmark is a function (n_params, n_repeats, device) -> results: a file, and a row in `BENCHES`.
Results are plain values: `least_n_bytes` is the least traffic with memory that the work needs,
`fraction_of_copy_bandwidth` that traffic at the bandwidth of a copy, over the time that it took,
`ratio_to_baseline` how many times faster than the baseline we are. Times are medians, with least and most; a
fraction "at best" is that of the least, for machines that have other work to do. Ratios "by CPU time" are of
what all threads together took; other processes have less influence on that.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from ...compression.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Rows name a function: its module is loaded when it is asked for.
BENCHES: Final = {
    "noise": "thinwire.node.bench.noise:bench_noise",
    "decoupled": "thinwire.node.bench.decoupled:bench_decoupled",
    "diloco": "thinwire.node.bench.diloco:bench_diloco",
    "peers": "thinwire.node.bench.peers:bench_peers",
    "round": "thinwire.node.bench.round:bench_round",
    "join": "thinwire.node.bench.join:bench_join",
    "wire": "thinwire.node.bench.wire:bench_wire",
    "memory": "thinwire.node.bench.memory:bench_memory",
    "ray": "thinwire.node.bench.ray:bench_ray",
}

SIZELESS: Final = frozenset(["round", "join", "ray"])
"""Their model is a small one of their own."""

NOT_IN_ALL: Final = frozenset(["ray"])
"""Needs an extra, and a cluster of its own."""

DEVICES: Final = ("cpu", "cuda")

ON_DEVICE: Final = {"noise": 16, "decoupled": 48, "diloco": 64, "peers": 24}
"""Those that measure a device, and how many bytes of memory they take per parameter."""

DEFAULT_N_PARAMS: Final = 28_000_000


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of repeated runs; `cpu_s` is the median of what all threads together took."""

    median_s: float
    min_s: float
    max_s: float
    cpu_s: float
    n_repeats: int

    def to_dict(self) -> dict[str, float]:
        return {"median_s": self.median_s, "min_s": self.min_s, "max_s": self.max_s, "cpu_s": self.cpu_s}


def bench_command(
    name: str,
    sizes: Sequence[int] | None,
    n_repeats: int,
    as_json: bool,
    picture: Path | None = None,
    device: str = "cpu",
    against: Path | None = None,
) -> None:
    """Runs one benchmark, or all, for every size: tables on stdout, or one JSON object; and a PNG."""
    from .against import load, print_compared
    from .view import check_picture, print_bench, save_picture

    names = [each for each in BENCHES if each not in NOT_IN_ALL] if name == "all" else [name]
    if picture is not None:
        check_picture(picture)
    then = None if against is None else load(against)
    results = {each: run_sizes(each, sizes, n_repeats, device) for each in names}
    if as_json:
        printed = {each: _plain(result) for each, result in results.items()}
        print(json.dumps(printed.get(name, printed), indent=1))  # noqa: T201
    else:
        for result in results.values():
            print_bench(result)
    if picture is not None:
        save_picture(picture, list(results.values()))
    if then is not None and against is not None:
        print_compared(against, then, results)


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


def run_sizes(
    name: str, sizes: Sequence[int] | None, n_repeats: int, device: str = "cpu"
) -> list[dict[str, Any]]:
    """A result for each size that the memory has room for; one for a benchmark that no size has an influence
    on."""
    if sizes is None or name in SIZELESS:
        sizes = None if not sizes else sizes[:1]
        return [run_bench(name, None if sizes is None else sizes[0], n_repeats, device)]
    for n_params in sizes:  # all of them, before the first takes its time
        _check_arguments(name, n_params, n_repeats, device)
    fitting = [n for n in sizes if n * ON_DEVICE.get(name, 0) <= free_bytes(device)]
    if len(fitting) < len(sizes):
        left_out = ", ".join(f"{n:.1e}" for n in sizes if n not in fitting)
        words = f"bench {name}: {left_out} parameters do not fit into the free memory"
        if not fitting:
            raise ConfigError(f"{words}: take fewer, with --params")
        print(f"{words}, and are left out", file=sys.stderr)  # noqa: T201
    return [run_bench(name, n_params, n_repeats, device) for n_params in fitting]


def run_bench(name: str, n_params: int | None, n_repeats: int, device: str = "cpu") -> dict[str, Any]:
    """Results of one benchmark, with the machine that it ran on. Raises ConfigError for a wrong argument.

    Those that measure no device run on the CPU, whatever `device` is.
    """
    _check_arguments(name, n_params, n_repeats, device)
    module, _, function = BENCHES[name].partition(":")
    bench = getattr(import_module(module), function)
    device = device if name in ON_DEVICE else "cpu"
    return {
        "bench": name,
        "machine": machine(device),
        **bench(DEFAULT_N_PARAMS if n_params is None else n_params, n_repeats, device),
    }


def _check_arguments(name: str, n_params: int | None, n_repeats: int, device: str) -> None:
    if name not in BENCHES:
        raise ConfigError(f"no benchmark is called {name!r}: one of {', '.join(BENCHES)}, all")
    if n_repeats < 1:
        raise ConfigError(f"{n_repeats} repeats: at least 1")
    if n_params is not None and not 1_000_000 <= n_params <= 10**10:
        raise ConfigError(f"{n_params} parameters: between 1e6 and 1e10")
    if device not in DEVICES:
        raise ConfigError(f"--device {device}: {' or '.join(DEVICES)}")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("--device cuda: torch finds no GPU here; `thinwire doctor` says why")


def free_bytes(device: str) -> int:
    """Memory that nobody uses."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    import psutil

    return int(psutil.virtual_memory().available)


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on, and when and how they were taken."""
    import torch

    from ..tracking.device_metrics import processor_name

    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    kernels = {name: version(name) for name in ("numba", "triton") if find_spec(name) is not None}
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": device,
        **gpu,
        "cpu": processor_name() or platform.processor() or platform.machine(),
        "n_cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        **kernels,
        "python": platform.python_version(),
    }


# ------------------------------------------------------------------------------------------- helpers


def measure(
    work: Callable[[], object], n_repeats: int, device: torch.device | str = "cpu", n_warm_up: int = 1
) -> Timing:
    """Runs `work` a few times; the first ones do not count. On a GPU, until it has done what it was given."""
    for _ in range(n_warm_up):
        work()
    seconds, cpu_seconds = [], []
    for _ in range(n_repeats):
        wait_for(device)
        start_s, cpu_start_s = time.perf_counter(), time.process_time()
        work()
        wait_for(device)
        seconds.append(time.perf_counter() - start_s)
        cpu_seconds.append(time.process_time() - cpu_start_s)
    return Timing(median(seconds), min(seconds), max(seconds), median(cpu_seconds), n_repeats)


def wait_for(device: torch.device | str) -> None:
    """Until nothing is under way there. The CPU's own work is done when a call returns."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(n_params: int, n_repeats: int, device: torch.device | str = "cpu") -> float:
    """Bytes per second of an out-of-place copy of float32 values, at its quickest: 8 bytes move per value. So
    many values that they are in no cache."""
    import torch

    n = max(n_params, 1 << 24)
    source, target = torch.ones(n, device=device), torch.zeros(n, device=device)
    return 8 * n / measure(lambda: target.copy_(source), max(n_repeats, 10), device).min_s


def ratios(baseline: Timing, ours: Timing, times: int = 1) -> dict[str, float]:
    """How many times faster we are, who do the work of so many baselines."""
    return {
        "ratio_to_baseline": times * baseline.median_s / ours.median_s,
        "ratio_to_baseline_by_cpu_time": times * baseline.cpu_s / max(ours.cpu_s, 1e-9),
    }


def transformer(n_params: int, device: torch.device | str = "cpu") -> dict[str, torch.nn.Parameter]:
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
    return {name: torch.nn.Parameter(_normal(shape, generator).to(device)) for name, shape in shapes.items()}


def fill_gradients(parameters: Iterable[Tensor]) -> None:
    """With fixed values."""
    import torch

    generator = torch.Generator().manual_seed(2)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator).to(p.device)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    import torch

    return torch.randn(shape, generator=generator) * 0.02
