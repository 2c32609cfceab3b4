"""One round's neighbours of one peer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from ...compression.base import Turn
from .topology import (
    Edge,
    Spectrum,
    Topology,
    edges_of,
    matching_of,
    matching_spectrum,
    mixing_weight,
    union_of,
)

UNKNOWN: Final = Spectrum(1.0, 1.0)


@dataclass(frozen=True, slots=True)
class Meeting:
    """Whom a peer exchanges with in a round, and with what weight each; nobody, if it does not train with the
    others yet. `spectrum`: of matchings, where they are drawn; a peer that is left over has one, too.
    `edges`: of all peers, by their places among `names`."""

    turn: Turn
    me: str = ""
    weights: Mapping[str, float] = field(default_factory=dict)
    spectrum: Spectrum = UNKNOWN
    names: Sequence[str] = ()
    edges: Sequence[Edge] = ()


def meeting(
    topology: Topology,
    peers: Mapping[str, int],
    me: str,
    turn: Turn,
    *,
    in_pairs: bool,
    degree: int = 1,
    of_file: Sequence[Sequence[int]] = (),
) -> Meeting:
    """`peers`: that train now, with the number of each; `in_pairs`: one partner at most, half of the way
    each; `of_file`: pairs of numbers, of topology "file"."""
    if me not in peers:
        return Meeting(turn, me)
    names = sorted(peers)
    n, own = len(names), names.index(me)
    fixed = _between(of_file, [peers[name] for name in names]) if topology == "file" else None
    if in_pairs:
        union = tuple(union_of(topology, n) if fixed is None else fixed)
        edges = matching_of(union, turn.shared_seed)
        weights = {names[j]: 0.5 for j in _partners(edges, own)}
        return Meeting(turn, me, weights, matching_spectrum(union, n), names, edges)
    edges = edges_of(topology, n, turn.round, turn.shared_seed, degree) if fixed is None else fixed
    weights = {names[j]: mixing_weight(edges, own, j) for j in _partners(edges, own)}
    return Meeting(turn, me, weights, UNKNOWN, names, edges)


def _between(pairs: Sequence[Sequence[int]], numbers: Sequence[int]) -> list[Edge]:
    """Those of which both train, as places in `numbers`."""
    at = {number: place for place, number in enumerate(numbers)}
    found = [(at[a], at[b]) for a, b in pairs if a in at and b in at]
    return sorted((min(edge), max(edge)) for edge in found)


def _partners(edges: Sequence[tuple[int, int]], own: int) -> list[int]:
    return sorted(i + j - own for i, j in edges if own in (i, j))
