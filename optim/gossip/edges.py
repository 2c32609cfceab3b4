"""A graph of peers by their numbers, as a run file gives it: checked. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from ...compression.errors import ConfigError

MOST: Final = 4096
"""Edges."""

_NUMBERS: Final = 2**16
"""Numbers that a peer may have."""


def check_edges(edges: object) -> None:
    """Raises ConfigError that names the first bad one."""
    if not isinstance(edges, list | tuple) or not edges:
        raise ConfigError('topology = "file" needs edges: pairs of peers, e.g. [[0, 1], [1, 2]]')
    if len(edges) > MOST:
        raise ConfigError(f"edges: {len(edges)} of them, at most {MOST}")
    seen = set[tuple[int, int]]()
    for edge in edges:
        if not isinstance(edge, list | tuple) or len(edge) != 2 or not all(map(_is_number, edge)):
            raise ConfigError(f"edges: {edge!r} is no pair of two peers' numbers, which begin at 0")
        both = min(edge), max(edge)
        if both[0] == both[1] or both in seen:
            why = "joins a peer to itself" if both[0] == both[1] else "is there twice"
            raise ConfigError(f"edges: {both[0]} {both[1]} {why}")
        seen.add(both)


def edges_of_lines(lines: Iterable[str]) -> list[list[int]]:
    """An edge a line, two numbers; what follows a # is left out. Raises ConfigError that names the line."""
    found = list[list[int]]()
    for n, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not all(w.isascii() and w.isdigit() for w in words):
            raise ConfigError(f"line {n}: {line.strip()[:60]!r}, but an edge is two peers' numbers, e.g. 0 1")
        if len(found) == MOST:
            raise ConfigError(f"line {n}: more than {MOST} edges")
        found.append([int(w[:9]) for w in words])
    check_edges(found)
    return found


def _is_number(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and 0 <= x < _NUMBERS
