"""`thinwire bench ... --against FILE`: figures beside those of an earlier `--json`, and what got worse."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from ...compression.errors import ConfigError
from ..system.output import make_console
from .view import bytes_and_bits, spread, timings

Result = dict[str, Any]

CPU_NOISE: Final = 1.3
"""CPU time varies by less than that from run to run, whatever else the machine does: by 1.27 where six
processes shared a core, and its cache."""

BYTES_NOISE: Final = 1.01


@dataclass(frozen=True, slots=True)
class Compared:
    """A figure then and now, in words."""

    name: str
    then: str
    now: str
    verdict: Literal["worse", "better", ""]


def load(path: Path) -> dict[str, list[Result]]:
    """Benchmark -> its results, one for each size, of a file that `--json` wrote. Raises ConfigError."""
    try:
        return parse(path.read_text())
    except (OSError, ValueError) as e:
        raise ConfigError(f"--against {path}: {e}") from e


def parse(text: str) -> dict[str, list[Result]]:
    """See `load`. Raises ValueError."""
    printed = json.loads(text)
    benches = {printed["bench"]: printed} if isinstance(printed, dict) and "bench" in printed else printed
    if not isinstance(benches, dict) or not all(
        isinstance(r, dict) and "bench" in r for r in benches.values()
    ):
        raise ValueError("not what `thinwire bench --json` prints")
    return {name: list(_sizes(result)) for name, result in benches.items()}


def _sizes(printed: Result) -> Iterator[Result]:
    shared = {key: printed[key] for key in ("bench", "machine")}
    for size in printed.get("sizes", [printed]):
        yield shared | size


def compare(then: Mapping[str, Sequence[Result]], now: Mapping[str, Sequence[Result]]) -> list[Compared]:
    """Every figure that both have, of benchmarks with as many parameters."""
    rows: list[Compared] = []
    for bench, results in now.items():
        for result in results:
            for old in then.get(bench, []):
                if old.get("n_params") == result.get("n_params"):
                    rows += _figures(bench, old, result)
    return rows


def _figures(bench: str, then: Result, now: Result) -> Iterator[Compared]:
    size = f" {now['n_params']:,}" if "n_params" in now else ""
    old_times, old_bytes = dict(timings(then)), dict(bytes_and_bits(then))
    for name, time in timings(now):
        if name in old_times:
            old = old_times[name]
            yield Compared(f"{bench}{size}: {name}", spread(old), spread(time), _verdict(old, time))
    for name, n in bytes_and_bits(now):
        if name in old_bytes:
            m = old_bytes[name]
            verdict: Literal["worse", "better", ""] = (
                "worse" if n > BYTES_NOISE * m else "better" if m > BYTES_NOISE * n else ""
            )
            yield Compared(f"{bench}{size}: {name}", f"{m:,.6g}", f"{n:,.6g}", verdict)


def _verdict(then: Mapping[str, float], now: Mapping[str, float]) -> Literal["worse", "better", ""]:
    """Worse: the quickest run now takes longer than the slowest then, and more CPU time, where that is
    known: a machine that has other work to do makes nothing worse."""
    cpu = (then["cpu_s"], now["cpu_s"]) if "cpu_s" in then and "cpu_s" in now else None
    if now["min_s"] > then["max_s"] and (cpu is None or cpu[1] > CPU_NOISE * cpu[0]):
        return "worse"
    if now["max_s"] < then["min_s"] and (cpu is None or CPU_NOISE * cpu[1] < cpu[0]):
        return "better"
    return ""


def print_compared(
    path: Path, then: Mapping[str, Sequence[Result]], now: Mapping[str, Sequence[Result]]
) -> None:
    """A table on stderr, where stdout may have JSON; what got worse at its end."""
    from rich.table import Table

    console = make_console(stderr=True)
    rows = compare(then, now)
    if not rows:
        console.print(f"{path} has no figure of the same benchmark with as many parameters")
        return
    table = Table(title=f"against {path}")
    for head in ("figure", "then", "now", ""):
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(row.name, row.then, row.now, row.verdict)
    console.print(table)
    machines = [next(iter(results.values()))[0]["machine"] for results in (then, now)]
    keys = ("cpu", "gpu", "n_cores", "torch_threads", "torch", "numba", "triton")
    other = [k for k in keys if machines[0].get(k) != machines[1].get(k)]
    for key in other:
        console.print(f"another machine: {key} was {machines[0].get(key)}, is {machines[1].get(key)}")
    worse = [row.name for row in rows if row.verdict == "worse"]
    console.print(
        f"{len(worse)} of {len(rows)} figures got worse: {'; '.join(worse)}"
        if worse
        else f"none of {len(rows)} figures got worse than its noise"
    )
