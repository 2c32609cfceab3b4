"""Results of `thinwire bench` for people: a table with a column for each size, and a picture."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from thinwire.compression.errors import ConfigError
from thinwire.coordinator.files import write_aside

Result = dict[str, Any]


def print_bench(results: Sequence[Result]) -> None:
    """Results of one benchmark as a table on stdout; nested results get the names of all levels."""
    from rich.console import Console
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
    # A file has no width: what is read later shall not be folded.
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160).print(table)


def check_picture(path: Path) -> None:
    """Raises ConfigError for a picture that cannot be made, before anything is measured."""
    from thinwire.node.charts import has_matplotlib

    if path.suffix.lower() != ".png":
        raise ConfigError(f"-o {path}: the picture is a PNG, name it {path.with_suffix('.png')}")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"-o {path}: nothing can be written there")
    if not has_matplotlib():
        raise ConfigError(f"-o {path}: no picture without matplotlib: pip install 'thinwire[plot]'")


def save_picture(path: Path, benches: Sequence[Sequence[Result]]) -> None:
    from thinwire.node.charts import times_png

    panels = {
        results[0]["bench"]: {
            f"{r['n_params']:.1e} parameters" if "n_params" in r else "": dict(_timings(r)) for r in results
        }
        for results in benches
    }
    panels = {name: sizes for name, sizes in panels.items() if any(sizes.values())}
    if not panels:
        raise ConfigError(f"-o {path}: {benches[0][0]['bench']} measures no times, there is nothing to draw")
    try:
        write_aside(path, times_png("thinwire bench: medians, least and most", panels))
    except OSError as e:
        raise ConfigError(f"-o {path}: {e.strerror}") from e


def _timings(values: Result, prefix: str = "") -> Iterator[tuple[str, tuple[float, float, float]]]:
    """(name, (median, least, most)) of every time, in seconds."""
    for key, value in values.items():
        if isinstance(value, dict) and "median_s" in value:
            yield prefix + key, (value["median_s"], value["min_s"], value["max_s"])
        elif isinstance(value, dict):
            yield from _timings(value, f"{prefix}{key} ")


def _flat(values: Result, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value.keys() >= {"median_s", "min_s", "max_s"}:
            spread = f"{_time(value['median_s'])} ({_time(value['min_s'])} .. {_time(value['max_s'])})"
            yield prefix + key, spread
        elif isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key} ")
        else:
            yield prefix + key, value


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
