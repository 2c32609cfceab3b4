"""What is waited for, in words for people."""

from __future__ import annotations

from collections.abc import Callable

from ..rounds import Rounds

NAMED_PEERS = 8


def awaited(
    rounds: Rounds, min_peers: int, usual_s: float, name: Callable[[int], str], now_s: float
) -> str | None:
    """None: nothing, or not for longer than twice as long as rounds usually take."""
    if rounds.is_over:
        return None
    if rounds.opened_s is None:
        n = len(rounds.training)
        return f"waiting for {min_peers - n} more peers: {n} of {min_peers} are training"
    since_s = now_s - rounds.opened_s
    if since_s < 2 * usual_s:
        return None
    missing = rounds.missing()
    if not missing:
        return f"round {rounds.round}: waiting for anybody's offer since {since_s:.0f} s"
    names = ", ".join(map(name, missing[:NAMED_PEERS]))
    names += ", ..." if len(missing) > NAMED_PEERS else ""
    of = f"{len(missing)} of {len(rounds.expected)} peers ({names})"
    return f"round {rounds.round}: waiting for {of} since {since_s:.0f} s"
