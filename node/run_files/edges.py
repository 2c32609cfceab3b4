"""The file of a run's graph: read when the run is founded, so that record 0 has its edges and no path."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ...compression.errors import ConfigError
from ...optim.gossip.edges import edges_of_lines

_KEY: Final = "topology_file"
_MAX_BYTES: Final = 2**20


def with_edges(strategy: Mapping[str, Any]) -> dict[str, Any]:
    """A `[strategy]` table with the file's edges in place of its path. Raises ConfigError."""
    found = dict(strategy)
    path = found.pop(_KEY, None)
    if path is None or found.get("name") != "gossip":
        return dict(strategy)
    if "edges" in found:
        raise ConfigError(f"strategy: edges and {_KEY}: one of them")
    return {"topology": "file", **found, "edges": _read(path)}


def _read(path: object) -> list[list[int]]:
    where = f"strategy.{_KEY} = {path!r}"
    if not isinstance(path, str) or not path:
        raise ConfigError(f"{where}: the path of a file is needed")
    try:
        with open(Path(path), encoding="utf-8-sig") as file:
            text = file.read(_MAX_BYTES + 1)
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{where}: cannot be read: {e}") from e
    if len(text) > _MAX_BYTES:
        raise ConfigError(f"{where}: more than {_MAX_BYTES} characters")
    try:
        return edges_of_lines(text.splitlines())
    except ConfigError as e:
        raise ConfigError(f"{where}: {e}") from e
