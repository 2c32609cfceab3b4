"""Which snapshots the ledger vouches for: pure, fed with commits in order (ARCHITECTURE.md, "Snapshots").

Identities cost nothing, counted work does. A manifest of a round is attested when at least two peers that
have worked reported it, and those together have more than half of the work of all that reported a snapshot of
that round, and at least a quarter of the work of the peers that the round's commit counted. A peer's work is
what it had when the round was committed, or, where that did not count it, when it reported. One peer is
enough where the round's commit counted a single one and nobody reported another manifest. Being attested is
the word of others: a reason to fetch a snapshot, and for the coordinator, which verifies nothing, to let old
payloads go. It is never proof, and no node gives up a replica or a payload of its own for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from .messages import CommitBody
from .trust.standing import Standing

LEAST_SHARE = 4
"""Who attests has at least one part in so many of the work of the peers that the round's commit counted:
reports that come early do not decide alone."""

KEPT = 3
"""Attested snapshots that are remembered; unattested ones are, too, while they are newer than the oldest."""


@dataclass(frozen=True, slots=True)
class Attested:
    """The replica after `round`: its manifest's digest, the size of all of it, the peers that reported it
    (indices, sorted)."""

    round: int
    manifest: bytes
    n_bytes: int
    peers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Reported:
    manifest: bytes
    n_bytes: int
    work: int
    """Of the peer, as it weighs here."""


class Snapshots:
    """`snapshot_every`: of the run; reports on other rounds are not looked at. `standing`: of the peers; its
    owner feeds it with each commit first."""

    def __init__(self, snapshot_every: int, standing: Standing) -> None:
        self._every, self._standing = snapshot_every, standing
        self._counted: dict[int, dict[int, int]] = {}
        """Round -> the peers that its commit counted, and their work by then."""
        self._reported: dict[int, dict[int, _Reported]] = {}

    def committed(self, body: CommitBody) -> None:
        """The next commit. A peer's later report on a round replaces its earlier one; one of 0 bytes takes it
        back; one of a peer that has not worked is nothing."""
        if body.round % self._every == 0:
            workers = (offer.peer for offer in body.offers if self._standing.has_worked(offer.peer))
            self._counted[body.round] = {peer: self._standing.work(peer) for peer in workers}
        for entry in body.snapshots:
            if entry.round in self._counted and self._standing.has_worked(entry.peer):
                work = self._counted[entry.round].get(entry.peer) or self._standing.work(entry.peer)
                reported = _Reported(entry.manifest, entry.n_bytes, work)
                self._reported.setdefault(entry.round, {})[entry.peer] = reported
        if body.snapshots:
            self._forget()

    def is_known(self, round_: int) -> bool:
        """Whether reports on this round count: it is committed, and not forgotten yet."""
        return round_ in self._counted

    def reported(self, peer: int, round_: int) -> tuple[bytes, int] | None:
        """Manifest and size that the peer reported last."""
        found = self._reported.get(round_, {}).get(peer)
        return None if found is None else (found.manifest, found.n_bytes)

    def attested(self) -> list[Attested]:
        """The newest ones, in the order of their rounds; one for each round at most."""
        found = (self._of_round(round_) for round_ in sorted(self._reported))
        return [snapshot for snapshot in found if snapshot is not None]

    def newest(self) -> Attested | None:
        """The newest attested snapshot."""
        return next(reversed(self.attested()), None)

    def _of_round(self, round_: int) -> Attested | None:
        by_manifest: dict[tuple[bytes, int], dict[int, int]] = {}
        for peer, said in self._reported[round_].items():
            if said.n_bytes > 0 and not self._standing.is_condemned(peer):
                by_manifest.setdefault((said.manifest, said.n_bytes), {})[peer] = said.work
        if not by_manifest:
            return None
        counted = self._counted[round_]
        (manifest, n_bytes), work_of = max(by_manifest.items(), key=lambda entry: sum(entry[1].values()))
        work, of_all = sum(work_of.values()), sum(sum(other.values()) for other in by_manifest.values())
        is_alone = len(counted) == 1 and len(by_manifest) == 1
        is_shared = len(work_of) > 1 and 2 * work > of_all and LEAST_SHARE * work >= sum(counted.values())
        if not is_alone and not is_shared:
            return None
        return Attested(round_, manifest, n_bytes, tuple(sorted(work_of)))

    def _forget(self) -> None:
        attested = self.attested()
        if len(attested) > KEPT:
            oldest = attested[-KEPT].round
            self._reported = {r: v for r, v in self._reported.items() if r >= oldest}
            self._counted = {r: work for r, work in self._counted.items() if r >= oldest}
