"""Results of `thinwire bench` for people: a table with a column for each size, and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from ...compression.errors import ConfigError
from ...coordinator.protocol.files import write_aside
from ..system.output import make_console
from ..system.places import refuse_file

Result = dict[str, Any]

_COUNTED: Final = (
    "payload_n_bytes",
    "sent_bytes_per_peer_and_round",
    "peak_bytes",
    "bits_per_coefficient",
    "our_bytes",
)


def print_bench(results: Sequence[Result]) -> None:
    """Results of one benchmark as a table on stdout; nested results get the names of all levels."""
    from rich.table import Table

    several = len(results) > 1
    columns = [dict(_flat(result)) for result in results]
    table = Table(title=f"bench {results[0]['bench']}", show_header=several)
    table.add_column("parameters" if several else "", overflow="fold")
    for result in results:
        table.add_column(f"{result['n_params']:,}" if several else "", justify="right" if several else "left")
    for key in columns[0]:
        if key != "bench" and not (several and key == "n_params"):
            table.add_row(key, *(_words(key, c[key]) if key in c else "" for c in columns))
    make_console().print(table)


def check_picture(path: Path) -> None:
    """Raises ConfigError for a picture that cannot be made, before anything is measured."""
    from ..compare.charts import has_matplotlib

    if path.suffix.lower() != ".png":
        raise ConfigError(f"-o {path}: the picture is a PNG, name it {path.with_suffix('.png')}")
    refuse_file("-o", path)
    if not has_matplotlib():
        raise ConfigError(f"-o {path}: no picture without matplotlib: pip install 'thinwire[plot]'")


def save_picture(path: Path, benches: Sequence[Sequence[Result]]) -> None:
    """A panel for each benchmark: its times, or else the bytes and bits that it counts."""
    from ..compare.charts import Panel, bars_png

    panels = {}
    for results in benches:
        sizes = {f"{r['n_params']:.1e} parameters" if "n_params" in r else "": r for r in results}
        times = {
            size: {what: (t["median_s"] * 1e3, t["min_s"] * 1e3, t["max_s"] * 1e3) for what, t in timings(r)}
            for size, r in sizes.items()
        }
        counts = {size: {what: (n, n, n) for what, n in bytes_and_bits(r)} for size, r in sizes.items()}
        is_timed = any(times.values())
        panels[results[0]["bench"]] = Panel(
            "ms" if is_timed else "bytes or bits", times if is_timed else counts
        )
    try:
        write_aside(path, bars_png("thinwire bench: medians, least and most", panels))
    except OSError as e:
        raise ConfigError(f"-o {path}: {e.strerror}") from e


def timings(values: Result, prefix: str = "") -> Iterator[tuple[str, dict[str, float]]]:
    """(name, the time) of everything that was timed, in seconds."""
    for key, value in values.items():
        if isinstance(value, dict) and "median_s" in value:
            yield prefix + key, value
        elif isinstance(value, dict):
            yield from timings(value, f"{prefix}{key} ")


def bytes_and_bits(values: Result, prefix: str = "") -> Iterator[tuple[str, float]]:
    """(name, how many) of what is sent and of the memory that is taken."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from bytes_and_bits(value, f"{prefix}{key} ")
        elif key in _COUNTED:
            yield prefix + key, value


def _flat(values: Result, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value.keys() >= {"median_s", "min_s", "max_s"}:
            cpu = f", CPU {_time(value['cpu_s'])}" if "cpu_s" in value else ""
            yield prefix + key, f"{spread(value)}{cpu}"
            yield from _flat({k: v for k, v in value.items() if not k.endswith("_s")}, f"{prefix}{key} ")
        elif isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key} ")
        else:
            yield prefix + key, value


def spread(time: Mapping[str, float]) -> str:
    return f"{_time(time['median_s'])} ({_time(time['min_s'])} .. {_time(time['max_s'])})"


def _words(key: str, value: Any) -> str:
    if key.endswith("_bytes_per_s"):
        return f"{value / 1e9:.2f} GB/s"
    if key.endswith("_per_s"):
        return f"{value / 1e6:,.0f} M/s"
    if key.endswith("_s") and isinstance(value, float):
        return _time(value)
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 10 else f"{seconds * 1e3:.4g} ms"
