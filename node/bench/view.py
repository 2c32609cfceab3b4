"""Results of `thinwire bench` for people: tables, those of each size after another, and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.markup import escape

from ...compression.errors import ConfigError
from ...coordinator.protocol.files import write_aside
from ..system.output import make_console
from ..system.places import refuse_file
from .tables import Rows, tables_of, time_words

if TYPE_CHECKING:
    from rich.console import RenderableType

Result = dict[str, Any]

_COUNTED: Final = (
    "payload_n_bytes",
    "sent_bytes_per_peer_and_round",
    "peak_bytes",
    "peak_bytes_per_parameter",
    "resident_bytes",
    "bits_per_coefficient",
    "our_bytes",
)


def print_bench(results: Sequence[Result]) -> None:
    """Results of one benchmark on stdout, those of each size after another."""
    console = make_console()
    for result in results:
        size = f", {result['n_params']:,} parameters" if len(results) > 1 else ""
        told = {key: value for key, value in result.items() if key != "bench"}
        for table in tables_of(f"bench {result['bench']}{size}", told):
            console.print(_drawn(table))


def _drawn(rows: Rows) -> RenderableType:
    from rich.table import Table

    table = Table(title=rows.title, title_justify="left", show_header=bool(rows.columns))
    table.add_column("", overflow="fold")
    for column in rows.columns or ("",):
        table.add_column(column, justify="right" if rows.columns else "left", overflow="fold")
    for name, cells in rows.rows.items():
        table.add_row(escape(name), *(escape(cells.get(column, "-")) for column in rows.columns or ("",)))
    return table


def check_picture(path: Path) -> None:
    """Raises ConfigError for a picture that cannot be made, before anything is measured."""
    from ..compare.charts import has_matplotlib

    if path.suffix.lower() != ".png":
        raise ConfigError(f"-o {path}: the picture is a PNG, name it {path.with_suffix('.png')}")
    refuse_file("-o", path)
    if not has_matplotlib():
        raise ConfigError(f"-o {path}: no picture without matplotlib: pip install 'thinwire[plot]'")


def save_picture(path: Path, benches: Sequence[Sequence[Result]]) -> None:
    """A panel for each benchmark: its times, or else the bytes and bits that it counts; `network` differs."""
    try:
        write_aside(path, _network() if benches[0][0]["bench"] == "network" else _bars(benches))
    except OSError as e:
        raise ConfigError(f"-o {path}: {e.strerror}") from e


def _network() -> bytes:
    """Of rounds of its own: more sizes than the tables have."""
    from .network.curves import by_peers, by_size
    from .network.picture import network_png

    return network_png(by_size(), by_peers())


def _bars(benches: Sequence[Sequence[Result]]) -> bytes:
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
    return bars_png("thinwire bench: medians, least and most", panels)


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


def spread(time: Mapping[str, float]) -> str:
    least, most = time_words(time["min_s"]), time_words(time["max_s"])
    return f"{time_words(time['median_s'])} ({least} .. {most})"
