"""One round's neighbours of one peer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from ...compression.base import Turn
from .topology import Spectrum, Topology, edges_of, matching_of, matching_spectrum, mixing_weight

UNKNOWN: Final = Spectrum(1.0, 1.0)


@dataclass(frozen=True, slots=True)
class Meeting:
    """Whom a peer exchanges with in a round, and with what weight each; nobody, if it does not train with the
    others yet. `spectrum`: of matchings, where they are drawn; a peer that is left over has one, too."""

    turn: Turn
    me: str = ""
    weights: Mapping[str, float] = field(default_factory=dict)
    spectrum: Spectrum = UNKNOWN


def meeting(
    topology: Topology, peers: Sequence[str], me: str, turn: Turn, *, in_pairs: bool, degree: int = 1
) -> Meeting:
    """`peers`: that train now, in any order; `in_pairs`: one partner at most, half of the way each."""
    if me not in peers:
        return Meeting(turn, me)
    names = sorted(peers)
    n, own = len(names), names.index(me)
    if in_pairs:
        edges = matching_of(topology, n, turn.round, turn.shared_seed)
        weights = {names[j]: 0.5 for j in _partners(edges, own)}
        return Meeting(turn, me, weights, matching_spectrum(topology, n))
    edges = edges_of(topology, n, turn.round, turn.shared_seed, degree)
    return Meeting(turn, me, {names[j]: mixing_weight(edges, own, j) for j in _partners(edges, own)})


def _partners(edges: Sequence[tuple[int, int]], own: int) -> list[int]:
    return sorted(i + j - own for i, j in edges if own in (i, j))
