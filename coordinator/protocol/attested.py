"""Which snapshots the ledger vouches for: pure, fed with commits in order (ARCHITECTURE.md, "Snapshots").

A snapshot is attested when two peers reported the same manifest; one is enough where the round's commit
counted a single peer and nobody reported another one.
"""

from __future__ import annotations

from dataclasses import dataclass

from .messages import CommitBody

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


class Snapshots:
    """`snapshot_every`: of the run; reports on other rounds are not looked at."""

    def __init__(self, snapshot_every: int) -> None:
        self._every = snapshot_every
        self._n_counted: dict[int, int] = {}
        self._reported: dict[int, dict[int, tuple[bytes, int]]] = {}

    def committed(self, body: CommitBody) -> None:
        """The next commit. A peer's later report on a round replaces its earlier one; one of 0 bytes takes it
        back."""
        if body.round % self._every == 0:
            self._n_counted[body.round] = len(body.offers)
        for entry in body.snapshots:
            if entry.round in self._n_counted:
                self._reported.setdefault(entry.round, {})[entry.peer] = (entry.manifest, entry.n_bytes)
        if body.snapshots:
            self._forget()

    def is_known(self, round_: int) -> bool:
        """Whether reports on this round count: it is committed, and not forgotten yet."""
        return round_ in self._n_counted

    def reported(self, peer: int, round_: int) -> tuple[bytes, int] | None:
        """Manifest and size that the peer reported last."""
        return self._reported.get(round_, {}).get(peer)

    def attested(self) -> list[Attested]:
        """The newest ones, in the order of their rounds. One for each round: if two manifests of a round were
        both reported twice, the one with more peers (then the smaller digest) is meant."""
        found = (self._of_round(round_) for round_ in sorted(self._reported))
        return [snapshot for snapshot in found if snapshot is not None]

    def newest(self) -> Attested | None:
        """The newest attested snapshot."""
        return next(reversed(self.attested()), None)

    def _of_round(self, round_: int) -> Attested | None:
        by_manifest: dict[tuple[bytes, int], list[int]] = {}
        for peer, reported in self._reported[round_].items():
            if reported[1] > 0:
                by_manifest.setdefault(reported, []).append(peer)
        needed = 1 if self._n_counted[round_] == 1 and len(by_manifest) == 1 else 2
        able = [(len(peers), what) for what, peers in by_manifest.items() if len(peers) >= needed]
        if not able:
            return None
        manifest, n_bytes = min(able, key=lambda entry: (-entry[0], entry[1]))[1]
        return Attested(round_, manifest, n_bytes, tuple(sorted(by_manifest[manifest, n_bytes])))

    def _forget(self) -> None:
        attested = self.attested()
        if len(attested) > KEPT:
            oldest = attested[-KEPT].round
            self._reported = {r: v for r, v in self._reported.items() if r >= oldest}
            self._n_counted = {r: n for r, n in self._n_counted.items() if r >= oldest}
