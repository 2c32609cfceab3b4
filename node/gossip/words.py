"""What a status says of gossip, for people and for programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ..units import human_bytes

EDGES_SHOWN: Final = 12


def gossip_in_words(status: Mapping[str, Any]) -> list[str]:
    """How far the peers' models are apart, when they became one, and who exchanges with whom; nothing of
    other strategies."""
    told = status.get("gossip")
    if not told:
        return []
    merged, distance, own = told["merged"], told["distance"], told["own_held_out"]
    apart = [] if distance is None else [f"a peer's model is {distance:.3g} (L2) from its neighbours'"]
    if own:
        spread = f"{min(own):.3f}" if len(own) == 1 else f"{min(own):.3f} to {max(own):.3f}"
        apart.append(f"held-out of the peers' own models {spread}")
    what = (
        f"the reference model is that of round {merged}"
        if merged
        else "the reference model is untrained before the first merge"
    )
    lines = ["gossip: " + "; ".join([what, *apart])]
    edges = edges_of(status)
    if edges:
        shown = [f"{a}-{b} {human_bytes(n)}" for a, b, n in edges[:EDGES_SHOWN]]
        more = f" and {len(edges) - EDGES_SHOWN} more" if len(edges) > EDGES_SHOWN else ""
        lines.append(f"exchanged so far, both ways: {', '.join(shown)}{more}")
    return lines


def edges_of(status: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """Numbers of two peers, and the bytes of messages between them so far, as the one that knows of more
    tells it."""
    found: dict[tuple[int, int], int] = {}
    for peer in status["peers"]:
        for edge in (peer.get("gossip") or {}).get("edges", ()):
            a, b = sorted((int(peer["index"]), int(edge["peer"])))
            both = a, b
            found[both] = max(found.get(both, 0), edge["sent"] + edge["received"])
    return [(a, b, n) for (a, b), n in sorted(found.items())]


def gossip_figures(status: Mapping[str, Any]) -> dict[str, Any] | None:
    """JSON-able: what the status tells of all, and the edges; None of other strategies."""
    told = status.get("gossip")
    return {**told, "edges": [list(edge) for edge in edges_of(status)]} if told else None
