"""Which replicas differ, and whose turn it is to check: pure, from the fingerprint reports in the ledger
(ARCHITECTURE.md, "Healing").

Reports on a round that differ split the peers into groups; only peers with counted work are in one. A group
weighs what its peers have worked. All but the heaviest check at once (tie: the one with the lowest index is
lighter): each of their peers replays the ledger up to that round and compares. The heaviest checks when
somebody who says otherwise has checked, or has said nothing for long. What others say is a reason to check
one's own replica, never proof of anything: nobody is stopped or changed by it, and nobody's check stands for
another's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..coordinator.protocol.messages import CommitBody, ReportEntry
from ..coordinator.protocol.trust.standing import Standing

WAIT_ROUNDS = 2
"""Commits after a reported round until it is judged: the reports of the others are on their way."""

TURN_ROUNDS = 100
"""When nobody has said anything new of a round for so many commits, the heaviest group checks, too."""

_KEPT = 64
"""Reported rounds that are remembered."""


@dataclass(slots=True)
class _Reported:
    by_peer: dict[int, ReportEntry] = field(default_factory=dict)
    changed_at: int = 0
    """The commit that brought the last news."""


class Verdicts:
    """Every node that was fed the same commits says the same, but for what its own replays have `disproved`.

    `standing`: of the peers; its owner feeds it."""

    def __init__(self, standing: Standing) -> None:
        self._standing = standing
        self._rounds: dict[int, _Reported] = {}
        self._disproved: dict[int, int] = {}
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

    def disproved(self, peer: int, before: int) -> None:
        """A replay of this node's own has contradicted the peer: what it says of rounds before that one is no
        reason to check any more."""
        self._disproved[peer] = max(before, self._disproved.get(peer, 0))

    def differs(self, round_: int) -> bool:
        """Whether peers reported different fingerprints of this round."""
        return len(self._groups(round_)) > 1

    def open_from(self) -> int | None:
        """The first remembered round whose fingerprints differ."""
        return next((r for r in sorted(self._rounds) if self.differs(r)), None)

    def is_shared(self, peer: int, round_: int, fingerprint: bytes) -> bool:
        """Whether somebody else reported this fingerprint of the round, and nobody another one."""
        groups = self._groups(round_)
        return len(groups) == 1 and bool(groups.get(fingerprint, frozenset()) - {peer})

    def to_check(self, peer: int) -> list[int]:
        """The remembered rounds that it is this peer's turn to check, in order."""
        newest = self._head - WAIT_ROUNDS
        return [r for r in sorted(self._rounds) if r <= newest and self._is_due(peer, r)]

    def fingerprint(self, peer: int, round_: int) -> bytes | None:
        """The last one that the peer reported of this round."""
        entry = self._by_peer(round_).get(peer)
        return None if entry is None else entry.fingerprint

    def others(self, peer: int, round_: int) -> dict[int, ReportEntry]:
        """What peers with counted work reported of the round that is not what this peer did; empty, where it
        has reported nothing."""
        own = self.fingerprint(peer, round_)
        return {
            other: entry
            for other, entry in self._by_peer(round_).items()
            if own is not None and entry.fingerprint != own and self._standing.has_worked(other)
        }

    def differs_since(self, peer: int, other: int) -> int:
        """The first remembered round of which the two reported different fingerprints; 0: none."""
        return next((r for r in sorted(self._rounds) if other in self.others(peer, r)), 0)

    def _is_due(self, peer: int, round_: int) -> bool:
        groups = self._groups(round_)
        own = next((group for group in groups.values() if peer in group), None)
        by_peer = self._by_peer(round_)
        if own is None or len(groups) < 2 or by_peer[peer].checked:
            return False
        if own != max(groups.values(), key=self._weight):
            return True
        others = frozenset[int]().union(*groups.values()) - own
        is_silent = self._head - self._rounds[round_].changed_at >= TURN_ROUNDS
        return is_silent or any(by_peer[other].checked for other in others)

    def _weight(self, group: frozenset[int]) -> tuple[int, int]:
        return sum(map(self._standing.work, group)), min(group)

    def _by_peer(self, round_: int) -> dict[int, ReportEntry]:
        reported = self._rounds.get(round_)
        return {} if reported is None else reported.by_peer

    def _groups(self, round_: int) -> dict[bytes, frozenset[int]]:
        groups: dict[bytes, frozenset[int]] = {}
        for peer, entry in self._by_peer(round_).items():
            if self._standing.has_worked(peer) and round_ >= self._disproved.get(peer, 0):
                groups[entry.fingerprint] = groups.get(entry.fingerprint, frozenset()) | {peer}
        return groups
