"""What a status says of gossip, for people."""

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
    if edges := told["edges"]:
        shown = [f"{a}-{b} {human_bytes(n)}{_by_others(relayed)}" for a, b, n, relayed in edges[:EDGES_SHOWN]]
        more = f" and {len(edges) - EDGES_SHOWN} more" if len(edges) > EDGES_SHOWN else ""
        lines.append(f"exchanged so far, both ways: {', '.join(shown)}{more}")
    return lines


def _by_others(relayed: int) -> str:
    return f" ({human_bytes(relayed)} by way of others)" if relayed else ""
