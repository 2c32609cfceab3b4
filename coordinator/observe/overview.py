"""A run at a glance, for its page: bounded, however many peers there are and whatever they say."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from typing import Any, Final, Literal

from ..ledger import Ledger
from ..membership import Membership, PeerState
from ..protocol.figures import figures_in_words, held_against, printable
from ..protocol.settings import RunSection
from ..rounds import Rounds
from .page_history import Pace, PageHistory
from .peer_trust import PeerTrust
from .run_statistics import RunStatistics

MAX_PEERS_SHOWN: Final = 256
ENTRIES_SHOWN: Final = 12
HAPPENINGS_SHOWN: Final = 24
EVALUATIONS_SHOWN: Final = 8
NOW_MS: Final = 5000
"""Who was heard of within this time is heard of now."""

RunState = Literal["waiting", "training", "paused", "finished"]


def overview(
    run: RunSection,
    ledger: Ledger,
    rounds: Rounds,
    members: Membership,
    statistics: RunStatistics,
    page_history: PageHistory,
    trust: PeerTrust,
    peers: dict[int, str],
    *,
    now_s: float,
    now_ms: int,
) -> dict[str, Any]:
    """JSON-able. Times are those of the coordinator's clock, in ms; nothing in it changes by time alone.

    `peers`: those that are shown."""
    state = run_state(rounds)
    states = Counter(str(members.state(index)) for index in peers)
    return {
        "run": printable(run.name, 100),
        "run_id": ledger.run_id.hex()[:16],
        "strategy": _strategy(ledger.genesis.config),
        "n_params": statistics.n_params,
        "round": rounds.head,
        "rounds": run.rounds,
        "state": state,
        "left_s": left_s(rounds, statistics),
        "waits_for": waits_for(rounds, run.min_peers),
        "missing": len(rounds.missing()),
        "loss": statistics.loss,
        "round_s": statistics.round_s,
        "payload_bytes": statistics.payload_bytes_per_offer,
        "sent_bytes": statistics.sent_bytes_per_peer_round,
        "ddp_bytes": statistics.ddp_bytes_per_peer_round,
        "last_commit_ms": statistics.last_commit_ms,
        "mismatches": statistics.mismatches,
        "peers": _peers(peers, members, statistics, page_history, trust, now_s, now_ms),
        "evaluations": evaluations(ledger),
        "n_peers": {str(state): states[str(state)] for state in PeerState},
        "entries": [asdict(entry) for entry in list(page_history.entries)[: -ENTRIES_SHOWN - 1 : -1]],
        "happenings": [asdict(h) for h in list(page_history.happenings)[: -HAPPENINGS_SHOWN - 1 : -1]],
    }


def run_state(rounds: Rounds) -> RunState:
    """Waiting: for the peers that the first round begins with."""
    if rounds.is_over:
        return "finished"
    if rounds.is_paused:
        return "paused"
    return "waiting" if rounds.opened_s is None else "training"


def waits_for(rounds: Rounds, min_peers: int) -> int:
    """How many more peers the first round needs before it begins."""
    return max(0, min_peers - len(rounds.training)) if run_state(rounds) == "waiting" else 0


def left_s(rounds: Rounds, statistics: RunStatistics) -> float | None:
    """Seconds until the last round is over, at the pace of the recent ones; None: not known."""
    if run_state(rounds) != "training" or statistics.round_s is None:
        return None
    return round((rounds.n_rounds - rounds.head) * statistics.round_s, 1)


def _peers(
    peers: dict[int, str],
    members: Membership,
    statistics: RunStatistics,
    page_history: PageHistory,
    trust: PeerTrust,
    now_s: float,
    now_ms: int,
) -> list[dict[str, Any]]:
    """Those that are there by their index, then those that are gone, the last one first."""
    paces = page_history.paces()

    def seen_ms(index: int) -> int | None:
        seen_s = members.seen_s(index)
        if seen_s is None:
            return page_history.offered_ms.get(index)
        return now_ms - round(max(0.0, now_s - seen_s) * 1000)

    def order(index: int) -> tuple[bool, int]:
        is_gone = members.state(index) is PeerState.GONE
        return is_gone, -(seen_ms(index) or 0) if is_gone else index

    shown = sorted(peers, key=order)[:MAX_PEERS_SHOWN]
    return [
        {
            "index": index,
            "id": printable(peers[index])[-6:],
            "state": str(members.state(index)),
            "device": page_history.devices.get(index, ""),
            **_work(index, statistics, paces.get(index)),
            "trust": _trust(trust.of(index, now_s)),
            "seen_ms": _not_now(seen_ms(index), now_ms),
        }
        for index in shown
    ]


def evaluations(ledger: Ledger) -> list[tuple[int, str]]:
    """The newest ones, the last one first: round, and its figures in words."""
    found = ledger.evaluations(EVALUATIONS_SHOWN)[::-1]
    return [(round_, printable(figures_in_words(figures), 300)) for round_, figures in found]


def _trust(told: dict[str, Any]) -> dict[str, Any]:
    """Of what `PeerTrust.of` tells that which is not usual, and the size; few bytes for most peers."""
    size, clipped = told["size"], told["clipped"]
    few = {
        "size": None if size is None else float(f"{size:.2g}"),
        "clipped": clipped,
        "passed": told["audits_passed"],
        "failed": told["audits_failed"],
        "until": told["condemned_until"],
        "rejected": held_against(told["rejected"]),
    }
    return {name: value for name, value in few.items() if value}


def _work(index: int, statistics: RunStatistics, pace: Pace | None) -> dict[str, Any]:
    """How fast a peer works, and what became of its work."""
    figures = statistics.peers.get(index)
    return {
        "speed": _speed(pace),
        "share": None if pace is None else round(pace.share, 3),
        "counted": 0 if figures is None else figures.offers_counted,
        "missed": 0 if figures is None else figures.offers_missed,
        "empty": 0 if figures is None else figures.offers_empty,
        "agreement": None if figures is None else statistics.agreement(index),
        "fingerprint_round": None if figures is None else figures.fingerprint_round,
    }


def _not_now(seen_ms: int | None, now_ms: int) -> int | None:
    """None also for a moment ago: the page would change all the time."""
    return None if seen_ms is not None and now_ms - seen_ms < NOW_MS else seen_ms


def _speed(pace: Pace | None) -> tuple[float, str] | None:
    if pace is None:
        return None
    if pace.tokens_per_s is not None:
        return float(f"{pace.tokens_per_s:.3g}"), "tokens"
    return None if pace.samples_per_s is None else (float(f"{pace.samples_per_s:.3g}"), "samples")


def _strategy(config: str) -> str:
    """The coordinator need not understand it, and shows its name."""
    strategy = json.loads(config).get("strategy")
    return printable(str(strategy.get("name", ""))) if isinstance(strategy, dict) else ""
