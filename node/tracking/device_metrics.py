"""Memory and use of the devices that a node trains on, read when somebody scrapes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

_FRESH_S = 1.0
"""The use of a CPU is that between two readings; two scrapers must not make it that of a millisecond."""


@dataclass(frozen=True, slots=True)
class Reading:
    """`used_bytes`: by this node's processes on a CPU, by everybody on a GPU; None: cannot be read."""

    used_bytes: float | None
    total_bytes: float | None
    busy_ratio: float | None


class DeviceCollector(Collector):
    """`devices`: cpu, cuda:0, ... ; a label, so a node names its own only."""

    def __init__(self, devices: Sequence[str]) -> None:
        self._devices = tuple(devices)
        self._cpu = _Cpu()
        self._lock = threading.Lock()
        self._readings: dict[str, Reading] = {}
        self._read_s = float("-inf")

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        used = GaugeMetricFamily(
            "thinwire_device_memory_used_bytes",
            "Memory in use: of a CPU by this node's processes, of a GPU by everybody",
            labels=["device"],
        )
        total = GaugeMetricFamily("thinwire_device_memory_bytes", "Memory of the device", labels=["device"])
        busy = GaugeMetricFamily(
            "thinwire_device_utilization_ratio",
            "Of a CPU the part of all cores that was busy since the last reading; a GPU's as its driver says",
            labels=["device"],
        )
        for device, reading in self._read().items():
            for family, value in (
                (used, reading.used_bytes),
                (total, reading.total_bytes),
                (busy, reading.busy_ratio),
            ):
                if value is not None:
                    family.add_metric([device], value)
        return [used, total, busy]

    def _read(self) -> dict[str, Reading]:
        with self._lock:
            if time.monotonic() >= self._read_s + _FRESH_S:
                self._readings = {
                    device: _gpu(device) if device.startswith("cuda") else self._cpu.read()
                    for device in self._devices
                }
                self._read_s = time.monotonic()
            return self._readings


def in_words(devices: Sequence[str]) -> str:
    """For people: 2 x NVIDIA H200, or AMD EPYC 7B13 (4 threads)."""
    import torch

    if not devices[0].startswith("cuda"):
        n = torch.get_num_threads()
        return f"{processor_name() or 'CPU'} ({n} thread{'s' if n != 1 else ''})"[:100]
    names = [torch.cuda.get_device_name(device) for device in devices]
    counts = {name: names.count(name) for name in names}
    return ", ".join(name if n == 1 else f"{n} x {name}" for name, n in counts.items())[:100]


def processor_name() -> str:
    """The CPU's, as it says itself; empty if it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


class _Cpu:
    """The machine's processor; memory is that of this process and of the other ranks of its node."""

    def __init__(self) -> None:
        self._busy_s, self._all_s = _cpu_times()

    def read(self) -> Reading:
        busy_s, all_s = _cpu_times()
        busy, passed = busy_s - self._busy_s, all_s - self._all_s
        self._busy_s, self._all_s = busy_s, all_s
        used = sum(_resident(process) for process in _processes())
        return Reading(used, psutil.virtual_memory().total, min(1.0, busy / passed) if passed > 0 else None)


def _cpu_times() -> tuple[float, float]:
    """Busy seconds and all seconds of all cores since the machine was started."""
    times = psutil.cpu_times()
    everything = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return everything - times.idle - getattr(times, "iowait", 0.0), everything


def _processes() -> list[psutil.Process]:
    """This one, and its siblings if it is a rank of several."""
    me = psutil.Process()
    if "thinwire.node.ranks.process" not in me.cmdline():
        return [me]  # to look for siblings is to look at every process of the machine
    try:
        siblings = psutil.Process(os.getppid()).children()
        return [
            me,
            *(p for p in siblings if p.pid != me.pid and "thinwire.node.ranks.process" in p.cmdline()),
        ]
    except psutil.Error:
        return [me]


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:  # it has ended meanwhile
        return 0


def _gpu(device: str) -> Reading:
    """By the driver's own counters (NVML): they make no context on a GPU that is another rank's."""
    import torch

    n_bytes: float | None = None
    total = used = busy = n_bytes
    try:
        total = float(torch.cuda.get_device_properties(device).total_memory)
        used = float(torch.cuda.memory_reserved(device))  # of this process, if the driver tells nothing
        used = float(torch.cuda.device_memory_used(device))
        busy = torch.cuda.utilization(device) / 100
    except Exception:  # noqa: BLE001 - NVML fails in many ways (containers, partitioned GPUs): what is known stays
        return Reading(used, total, busy)
    return Reading(used, total, busy)
