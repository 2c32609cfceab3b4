"""What benchmarks measure with: times, the bandwidth of a copy, free memory, parameters like a model's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


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


def free_bytes(device: str) -> int:
    """Bytes of memory that nobody uses, of a device: "cpu" or "cuda"."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    import psutil

    return int(psutil.virtual_memory().available)


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
