"""The machine below: Python and its packages, cores, memory, limits of the operating system."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

import psutil

from ..units import human_bytes
from .findings import Finding, Stopped, failed, ok, skipped, warning

LOW_MEMORY_BYTES = 2 * 10**9
FEW_OPEN_FILES = 1024
SMALL_SHARED_BYTES = 512 * 2**20

_DEVELOPERS_EXTRAS = {"test", "lint"}
_REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+)\s*>=\s*([0-9.]+)(?:.*extra\s*==\s*[\"'](\w+)[\"'])?")
_UNLIMITED = 1 << 60
_CGROUP = Path("/sys/fs/cgroup")


def check_python(_stopped: Stopped) -> Iterator[Finding]:
    version = platform.python_version()
    yield ok("python", f"{version} on {platform.system()} {platform.machine()}", version=version)
    try:
        needed = _needed()
    except metadata.PackageNotFoundError:
        yield skipped("packages", "thinwire is not installed, only on the path: its requirements are unknown")
        return
    yield _packages(needed.pop("", {}))
    yield _extras(needed)


def _needed() -> dict[str, dict[str, str]]:
    """Extra (or "" for all) -> package -> least version."""
    found: dict[str, dict[str, str]] = {}
    for line in metadata.requires("thinwire") or []:
        if (match := _REQUIREMENT.match(line)) is not None:
            package, least, extra = match.groups()
            found.setdefault(extra or "", {})[package] = least
    return found


def _packages(needed: Mapping[str, str]) -> Finding:
    installed = {package: _version(package) for package in needed}
    figures = {"versions": installed}
    lacking = {p: least for p, least in needed.items() if not _is_enough(installed[p], least)}
    if lacking:
        what = ", ".join(f"{p} {installed[p] or 'is missing'}" for p in lacking)
        wanted = " ".join(f"'{p}>={least}'" for p, least in lacking.items())
        return failed("packages", what, f"pip install {wanted}", **figures)
    tested = _tested()
    other = [f"{p} {v} ({tested[p]})" for p, v in installed.items() if v and _differs(v, tested.get(p))]
    detail = ", ".join(f"{p} {installed[p]}" for p in ("torch", "hivemind", "numpy") if installed.get(p))
    if other:
        detail += f"; others than the tested versions: {', '.join(other)}"
    return ok("packages", detail, **figures)


def _extras(needed: Mapping[str, Mapping[str, str]]) -> Finding:
    there: list[str] = []
    missing: list[str] = []
    for extra in sorted(needed.keys() - _DEVELOPERS_EXTRAS):
        is_there = all(_is_enough(_version(p), least) for p, least in needed[extra].items())
        (there if is_there else missing).append(extra)
    detail = ", ".join(there) or "none"
    if missing:
        names = ",".join(missing)
        detail += f"; not installed: {', '.join(missing)} (if needed: pip install 'thinwire[{names}]')"
    return ok("extras", detail, installed=there, missing=missing)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _is_enough(version: str | None, least: str) -> bool:
    return version is not None and _numbers(version) >= _numbers(least)


def _differs(version: str, tested: str | None) -> bool:
    return tested is not None and _numbers(version) != _numbers(tested)


def _numbers(version: str) -> tuple[int, ...]:
    """'2.13.0+cpu' -> (2, 13, 0)."""
    return tuple(int(n) for n in re.findall(r"\d+", version.partition("+")[0])[:3])


def _tested() -> dict[str, str]:
    """Package -> tested version, where this is a checkout: an installed wheel has no list."""
    path = Path(__file__).parents[2] / "constraints.txt"
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return dict(line.strip().split("==") for line in lines if "==" in line and not line.startswith("#"))


def check_machine(_stopped: Stopped) -> Iterator[Finding]:
    yield _cores()
    yield _memory()
    yield _open_files()
    yield _shared_memory()


def _cores() -> Finding:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads, quota = torch.get_num_threads(), _quota_cores()
    figures = {"cores": cores, "threads": threads, "quota_cores": quota}
    detail = f"{cores} cores, {threads} threads by default"
    if quota is not None and quota < threads:
        remedy = f"join with --threads {max(1, int(quota))}, or give the container more of the machine"
        return warning("cores", f"{detail}, but this container may use {quota:g} cores", remedy, **figures)
    return ok("cores", detail, **figures)


def _quota_cores() -> float | None:
    """What a container may use; None: everything."""
    two = _read(_CGROUP / "cpu.max").split()
    if len(two) == 2 and two[0].isdigit():
        return int(two[0]) / int(two[1])
    quota, period = (_read(_CGROUP / "cpu" / f"cpu.cfs_{each}_us") for each in ("quota", "period"))
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _memory() -> Finding:
    memory, limit_bytes = psutil.virtual_memory(), _memory_limit_bytes()
    total_bytes = min(memory.total, limit_bytes or memory.total)
    free_bytes = available_bytes()
    figures = {
        "total_bytes": total_bytes,
        "available_bytes": free_bytes,
        "container_limit_bytes": limit_bytes,
    }
    detail = f"{human_bytes(free_bytes)} available of {human_bytes(total_bytes)}"
    detail += " (the container's limit)" if limit_bytes is not None and limit_bytes < memory.total else ""
    if free_bytes < LOW_MEMORY_BYTES:
        return warning("memory", detail, "enough for small models only: stop other programs", **figures)
    return ok("memory", detail, **figures)


def available_bytes() -> int:
    """Memory that this process can still get."""
    available = int(psutil.virtual_memory().available)
    limit_bytes = _memory_limit_bytes()
    if limit_bytes is None:
        return available
    used = _read(_CGROUP / "memory.current") or _read(_CGROUP / "memory" / "memory.usage_in_bytes")
    return min(available, max(0, limit_bytes - int(used or 0)))


def _memory_limit_bytes() -> int | None:
    """The container's; None: it has none."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        text = _read(_CGROUP / name)
        if text.isdigit() and int(text) < _UNLIMITED:
            return int(text)
    return None


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    detail = f"{soft} allowed" if soft != resource.RLIM_INFINITY else "no limit"
    figures = {"soft": soft, "hard": hard}
    if soft != resource.RLIM_INFINITY and soft < FEW_OPEN_FILES:
        remedy = f"a coordinator of many peers needs more: ulimit -n {FEW_OPEN_FILES * 4}"
        return warning("open files", detail, remedy, **figures)
    return ok("open files", detail, **figures)


def _shared_memory() -> Finding:
    if not os.path.isdir("/dev/shm"):
        return skipped("shared memory", "this system has no /dev/shm")
    usage = shutil.disk_usage("/dev/shm")
    detail, figures = f"{human_bytes(usage.free)} free in /dev/shm", {"free_bytes": usage.free}
    if usage.free < SMALL_SHARED_BYTES:
        remedy = "nodes of several GPUs and Ray need more: docker run --shm-size=2g (or --ipc=host)"
        return warning("shared memory", detail, remedy, **figures)
    return ok("shared memory", detail, **figures)


def _read(path: Path) -> str:
    try:
        return path.read_text("ascii").strip()
    except OSError:
        return ""
