"""A benchmark's nested result as tables for people: what is alike stands in rows of one table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..units import human_bytes

MOST_COLUMNS: Final = 6
"""Wider tables are turned: a table for each row."""


@dataclass(frozen=True, slots=True)
class Rows:
    """A table. `columns`: of the cells, the rows' names stand before them; none: a fact in each row, whose
    only cell is under ""."""

    title: str
    columns: tuple[str, ...]
    rows: Mapping[str, Mapping[str, str]]


def tables_of(title: str, values: Mapping[str, Any]) -> Iterator[Rows]:
    """Facts first, then what has several figures each, then what is nested deeper under titles of its own."""
    facts = {_label(k): {"": words(k, v)} for k, v in values.items() if not isinstance(v, dict)}
    if facts:
        yield Rows(title, (), facts)
    inner = {k: v for k, v in values.items() if isinstance(v, dict)}
    rows = {_label(k): _cells(v) for k, v in inner.items() if _is_row(v)}
    columns = tuple(dict.fromkeys(column for cells in rows.values() for column in cells))
    if rows and len(columns) <= MOST_COLUMNS:
        yield Rows(title, columns, rows)
    elif rows:
        for name, cells in rows.items():
            yield Rows(f"{title}: {name}", (), {column: {"": text} for column, text in cells.items()})
    for key, value in inner.items():
        if not _is_row(value):
            yield from tables_of(f"{title}: {_label(key)}", value)


def words(key: str, value: Any) -> str:
    """A figure with its unit, which its key ends in."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if key.endswith("bytes_per_s"):
        return f"{value / 1e9:.2f} GB/s" if value >= 1e8 else f"{human_bytes(value)}/s"
    if key.endswith("_per_s"):
        return f"{value / 1e6:,.0f} M/s"
    if key.endswith("_s"):
        return time_words(value)
    if key.endswith("bytes") and value >= 10_000:
        return human_bytes(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def time_words(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 10 else f"{seconds * 1e3:.4g} ms"


def _is_row(value: Mapping[str, Any]) -> bool:
    """Whether it has figures only, one of them a time with its spread at most."""
    inner = [v for v in value.values() if isinstance(v, dict)]
    return not inner or (len(inner) == 1 and _is_time(inner[0]) and not _is_time(value))


def _is_time(value: Mapping[str, Any]) -> bool:
    return value.keys() >= {"median_s", "min_s", "max_s"}


def _cells(value: Mapping[str, Any]) -> dict[str, str]:
    cells: dict[str, str] = {}
    if _is_time(value):
        cells["median"] = time_words(value["median_s"])
        cells["least .. most"] = f"{time_words(value['min_s'])} .. {time_words(value['max_s'])}"
    for key, inner in value.items():
        if isinstance(inner, dict):
            cells |= _cells(inner)
        elif key not in ("median_s", "min_s", "max_s"):
            cells[_label(key)] = words(key, inner)
    return cells


def _label(key: str) -> str:
    """ "copy_bandwidth_bytes_per_s" -> "copy bandwidth": the unit stands with the figure."""
    if key == "n_params":
        return "parameters"
    plain = key.removesuffix("_bytes_per_s").replace("_per_s", "_per_second").removesuffix("_s")
    return plain.removeprefix("n_").replace("_n_", "_").replace("_", " ")
