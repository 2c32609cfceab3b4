"""Whose replica is wrong: pure, from the fingerprint reports in the ledger (ARCHITECTURE.md, "Healing").

Reports on a round that differ split the peers into groups. The groups check in turn, smallest first (tie:
lowest index): a peer that checks replays the ledger up to that round and reports what came out. Who was wrong
joins the right group by that; who was right stays, and the next group's turn comes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..coordinator.protocol.messages import CommitBody, ReportEntry

WAIT_ROUNDS = 2
"""Commits after a reported round until it is judged: the reports of the others are on their way."""

TURN_ROUNDS = 100
"""A group that says nothing for so many commits is passed over: its peers are gone."""

_KEPT = 64
"""Reported rounds that are remembered."""


@dataclass(slots=True)
class _Reported:
    by_peer: dict[int, ReportEntry] = field(default_factory=dict)
    changed_at: int = 0
    """The commit that brought the last news."""


class Verdicts:
    """Every node that was fed the same commits says the same."""

    def __init__(self) -> None:
        self._rounds: dict[int, _Reported] = {}
        self._head = 0

    def committed(self, body: CommitBody) -> None:
        """The next commit."""
        self._head = body.round
        for entry in body.reports:
            reported = self._rounds.setdefault(entry.round, _Reported())
            reported.by_peer[entry.peer] = entry
            reported.changed_at = body.round
        for old in sorted(self._rounds)[:-_KEPT]:
            del self._rounds[old]

    def differs(self, round_: int) -> bool:
        """Whether peers reported different fingerprints of this round."""
        return len(self._groups(round_)) > 1

    def open_from(self) -> int | None:
        """The first remembered round whose fingerprints differ."""
        return next((r for r in sorted(self._rounds) if self.differs(r)), None)

    def to_check(self, peer: int, oldest: int) -> list[int]:
        """The rounds, from `oldest` on, that it is this peer's turn to check, in order."""
        newest = self._head - WAIT_ROUNDS
        return [r for r in sorted(self._rounds) if oldest <= r <= newest and peer in self._turn(r)]

    def fingerprint(self, peer: int, round_: int) -> bytes | None:
        """The last one that the peer reported of this round."""
        reported = self._rounds.get(round_)
        entry = None if reported is None else reported.by_peer.get(peer)
        return None if entry is None else entry.fingerprint

    def undecided(self, oldest: int) -> int | None:
        """A round, from `oldest` on, that every group has confirmed although they differ."""
        for round_ in sorted(self._rounds):
            groups = self._groups(round_)
            if round_ >= oldest and len(groups) > 1 and not _unconfirmed(groups):
                return round_
        return None

    def smallest_group(self, round_: int) -> frozenset[int]:
        """The peers that are the first to doubt their own machine."""
        return min(map(frozenset, self._groups(round_).values()), key=_size_and_lowest, default=frozenset())

    def _turn(self, round_: int) -> frozenset[int]:
        """Who has to check this round now: a group, less those of its peers that have done it."""
        groups = self._groups(round_)
        waiting = sorted(_unconfirmed(groups), key=_size_and_lowest)
        if len(groups) < 2 or not waiting:
            return frozenset()
        passed_over = (self._head - self._rounds[round_].changed_at) // TURN_ROUNDS
        return waiting[min(passed_over, len(waiting) - 1)]

    def _groups(self, round_: int) -> dict[bytes, dict[int, ReportEntry]]:
        groups: dict[bytes, dict[int, ReportEntry]] = {}
        reported = self._rounds.get(round_)
        for peer, entry in ({} if reported is None else reported.by_peer).items():
            groups.setdefault(entry.fingerprint, {})[peer] = entry
        return groups


def _unconfirmed(groups: Mapping[bytes, Mapping[int, ReportEntry]]) -> list[frozenset[int]]:
    """Groups of which nobody has checked."""
    return [frozenset(g) for g in groups.values() if not any(entry.checked for entry in g.values())]


def _size_and_lowest(group: frozenset[int]) -> tuple[int, int]:
    return len(group), min(group)
