"""What computes here: devices and their number formats, compilers of kernels, and whether results are right.

The lines of accelerators are plain torch calls; they have been run with CPU builds of torch only.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ...compression.errors import first_line
from ...compression.kernels import kernels_for
from ...coordinator.protocol.figures import counted
from ..tracking.device_metrics import processor_name
from ..units import human_bytes
from .findings import Finding, Stopped, failed, ok, skipped, warning
from .kernel_cache import KERNELS
from .known_answers import KNOWN_ANSWERS
from .machine import available_bytes
from .self_test import (
    NUMBA_CACHE_HINT,
    Backend,
    accelerators,
    backends,
    failed_kernels,
    no_cache,
    runs_on,
)

REPEAT_S = 1.0
"""The self-test of the kernels in use is repeated for this long: memory that fails now and then shows so."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NVIDIA_DEVICES = (Path("/dev/nvidia0"), Path("/proc/driver/nvidia/version"))


def check_devices(_stopped: Stopped) -> Iterator[Finding]:
    cpu = torch.device("cpu")
    yield _device(cpu, _processor(), available_bytes(), None)
    for device in accelerators():
        yield _accelerator(device)
    if not torch.cuda.is_available() and any(path.exists() for path in _NVIDIA_DEVICES):
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch cannot use it"
        yield warning(
            "device cuda",
            f"there is an NVIDIA GPU, but {why}: the node would train on the CPU",
            "install torch for CUDA (https://pytorch.org/get-started), or look at the driver with nvidia-smi",
        )


def _accelerator(device: torch.device) -> Finding:
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        p = torch.cuda.get_device_properties(device)
        name = f"{p.name} (compute capability {p.major}.{p.minor})"
        return _device(device, name, free_bytes, total_bytes)
    return _device(device, device.type, None, None)


def _device(device: torch.device, what: str, free_bytes: int | None, total_bytes: int | None) -> Finding:
    able = [str(dtype).removeprefix("torch.") for dtype in DTYPES if _multiplies(dtype, device)]
    keeps, exact = (
        not failed_kernels(device, "torch", [name]) for name in ("denormal numbers", "matrix products")
    )
    parts = [what, *([f"{human_bytes(free_bytes)} free"] if free_bytes is not None else []), " ".join(able)]
    figures: dict[str, Any] = {
        "device": str(device),
        "dtypes": able,
        "keeps_denormals": keeps,
        "exact_matrix_products": exact,
        "free_bytes": free_bytes,
        "total_bytes": total_bytes,
    }
    line = f"device {device}"
    if not (keeps and exact and "float32" in able):
        lacks = [
            *([] if keeps else ["flushes denormal numbers to zero"]),
            *([] if exact else ["rounds matrix products of integers"]),
            *([] if "float32" in able else ["has no float32 products"]),
        ]
        return _severity(device)(
            line,
            f"{', '.join(parts)}; {' and '.join(lacks)}: no replica may live there",
            "train on another device (--device cpu)" if device.type != "cpu" else "see the self-test below",
            **figures,
        )
    return ok(line, ", ".join(parts), **figures)


def _severity(device: torch.device) -> Callable[..., Finding]:
    """Some devices never were exact (Apple's flush denormals): a machine with one can join on its CPU."""
    return failed if device.type in ("cpu", "cuda") else warning


def _multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of small integers, exact in every format, come out right."""
    try:
        a = (torch.arange(64, device=device).view(8, 8) % 5).to(dtype)
        found = (a @ a.T).float().cpu()
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    whole = torch.arange(64).view(8, 8) % 5
    return bool((found == (whole @ whole.T).float()).all())


def _processor() -> str:
    """The CPU's name and the instructions that torch uses of it."""
    return f"{processor_name() or 'CPU'} ({torch.backends.cpu.get_cpu_capability()})"


def check_compilers(_stopped: Stopped) -> Iterator[Finding]:
    try:
        kernels_for(torch.empty(0))
    except ValueError as e:
        yield failed("kernels", str(e), f"unset {KERNELS}: nothing can be computed with it")
    yield _numba()
    yield _triton()


def _numba() -> Finding:
    chosen = os.environ.get(KERNELS, "auto")
    if find_spec("numba") is None:
        return (failed if chosen == "numba" else warning)(
            "numba",
            "not installed: exact paths run as plain torch on the CPU, some ten times slower",
            "pip install 'thinwire[cpu]'",
        )
    version = metadata.version("numba")
    begun_s = time.perf_counter()
    try:
        from ...compression.cpu import fingerprint_cpu
    except RuntimeError as e:  # numba's word for a cache that can be kept nowhere
        return failed(
            "numba",
            f"{version}: {first_line(e)}",
            "NUMBA_CACHE_DIR=DIR for a folder that can be written, or THINWIRE_KERNELS=torch",
            version=version,
        )
    fingerprint_cpu.parameter_sum(torch.zeros(8, dtype=torch.int32), 0)
    load_s = time.perf_counter() - begun_s
    folder = str(fingerprint_cpu._sum.stats.cache_path)
    figures = {"version": version, "cache": folder, "load_s": round(load_s, 3)}
    if not os.access(folder, os.W_OK):
        return warning(
            "numba",
            f"{version}; its cache {folder} cannot be written: every start compiles anew",
            "NUMBA_CACHE_DIR=DIR for a folder that can be written",
            **figures,
        )
    unused = f"; not in use ({KERNELS}={chosen})" if chosen == "torch" else ""
    return ok("numba", f"{version}, kernels ready after {load_s:.1f} s{unused}", **figures)


def _triton() -> Finding:
    if find_spec("triton") is None:
        if not torch.cuda.is_available():
            return skipped("triton", "not installed, and without a CUDA device not needed")
        return warning(
            "triton",
            "not installed: exact paths run as plain torch on CUDA devices, in many passes over the memory",
            "pip install triton, in the version that your torch asks for",
        )
    version = metadata.version("triton")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    where = "interpreter" if interpreted else "CUDA" if torch.cuda.is_available() else "no device for it"
    return ok("triton", f"{version} ({where})", version=version, interpreted=interpreted)


def check_kernels(stopped: Stopped) -> Iterator[Finding]:
    """Every backend once, then the one in use again and again until the time is over."""
    tested = backends()
    passed: list[Backend] = []
    for backend in tested:
        in_use = _in_use(backend)
        finding = _self_test(backend, in_use, stopped)
        if stopped():
            return
        if finding.status == "ok" and in_use:
            passed.append(backend)
        yield finding
    if passed:
        yield _repeated(passed, stopped)


def _in_use(backend: Backend) -> bool:
    try:
        return backend.kernels == kernels_for(torch.empty(0, device=backend.device))
    except ValueError:  # `check_compilers` says which choices there are
        return False


def _repeated(passed: Sequence[Backend], stopped: Stopped) -> Finding:
    n_runs, until_s = 0, time.monotonic() + REPEAT_S
    while not n_runs or (time.monotonic() < until_s and not stopped()):
        for backend in passed:
            n_runs += 1
            wrong = failed_kernels(backend.device, backend.kernels, stopped=stopped)
            if wrong:
                return failed(
                    "self-test repeated",
                    f"{', '.join(wrong)} ({backend}): wrong in repetition {n_runs}, right before",
                    "this machine computes wrongly now and then: test its memory, undo overclocking",
                    failed=wrong,
                )
    return ok("self-test repeated", f"{counted(n_runs, 'more run')}, always the same", repetitions=n_runs)


def _self_test(backend: Backend, in_use: bool, stopped: Stopped) -> Finding:
    if backend.kernels == "numba" and (why := no_cache()) is not None:
        say = failed if in_use else warning
        return say(f"self-test {backend}", f"not run: {why}", NUMBA_CACHE_HINT, failed=[], in_use=in_use)
    begun_s = time.perf_counter()
    wrong = failed_kernels(backend.device, backend.kernels, stopped=stopped)
    took_s = time.perf_counter() - begun_s
    line, figures = f"self-test {backend}", {"failed": wrong, "seconds": round(took_s, 3), "in_use": in_use}
    if not wrong:
        n = sum(runs_on(name, backend.device) for name in KNOWN_ANSWERS)
        use = "in use" if in_use else "not in use"
        return ok(line, f"{n} exact paths give the known results ({took_s:.2f} s, {use})", **figures)
    detail = f"computes something else than other machines: {', '.join(wrong)}"
    if backend.kernels != "torch":
        remedy = f"{KERNELS}=torch, if that passes above, or another version of {backend.kernels}"
        return failed(line, detail, remedy, **figures) if in_use else warning(line, detail, remedy, **figures)
    if backend.device.type != "cpu":
        remedy = "train on another device (--device cpu), or update its driver"
        return _severity(backend.device)(line, detail, remedy, **figures)
    # Updates and decoding are plain torch, whatever the kernels in use.
    remedy = "look for what flushes denormals or sets fast math; another version of torch; test the memory"
    return failed(line, detail, remedy, **figures)
