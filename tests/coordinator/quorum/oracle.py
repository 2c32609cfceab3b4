"""What must hold whatever happens: of every round one record has a majority of votes,
and of every ballot, whether anybody has come to know of it or not; it is on every disk, and stays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tests.coordinator.quorum.stand_ins import RUN, Body, Disk, Fault
from thinwire.coordinator.protocol.messages import digest_of
from thinwire.coordinator.protocol.trust.seals import Committee, vote_bytes

_VOTE: Final = vote_bytes(RUN, 0, 0, b"")[:-16]


class Oracle:
    """Sees every signature and every ledger of one world. Its methods raise Fault."""

    def __init__(self, committee: Committee) -> None:
        self.sealed: dict[int, bytes] = {}
        """Digests by round, as soon as a majority has signed them."""
        self._committees = {0: committee}
        self._voters: dict[tuple[int | None, int, bytes], set[str]] = {}
        self._votes: dict[tuple[str, int | None, int], bytes] = {}

    def signed(self, seat: str, data: bytes) -> None:
        """A vote: from the moment when there is a signature, somebody may come to have it."""
        ballot, round_, digest = _parts(data)
        if self._votes.setdefault((seat, ballot, round_), digest) != digest:
            raise Fault(f"{seat} has voted for two records in one ballot of round {round_}")
        voters = self._voters.setdefault((ballot, round_, digest), set())
        voters.add(seat)
        committee = self._committees[max(epoch for epoch in self._committees if epoch < round_)]
        is_void = ballot is not None and committee.owner(ballot) is None
        if not is_void and len(voters & set(committee.seats)) >= committee.need:
            self._compare(round_, digest)

    def appended(self, body: Body, digest: bytes) -> None:
        """To some seat's ledger."""
        self._compare(body.round, digest)
        if body.seats:
            self._committees[body.round] = Committee.majority(body.round, body.seats)

    def look_at_all(self, disks: Mapping[str, Disk]) -> None:
        """Every ledger has what was ever sealed, as far as it goes, and the longest has all of it."""
        for name, disk in disks.items():
            for i, sealed in enumerate(disk.records):
                if self.sealed.get(i + 1) != digest_of(sealed.record):
                    raise Fault(f"{name} has another record of round {i + 1}")
        if max(self.sealed, default=0) > max(disk.head for disk in disks.values()) + 1:
            raise Fault("a round was lost")

    def _compare(self, round_: int, digest: bytes) -> None:
        if self.sealed.setdefault(round_, digest) != digest:
            raise Fault(f"two records of round {round_} were sealed")


def _parts(data: bytes) -> tuple[int | None, int, bytes]:
    """Ballot, round and digest of what a vote signs; one who is alone signs the record, without a ballot."""
    if not data.startswith(_VOTE):
        return None, Body.of(data).round, digest_of(data)
    rest = data[len(_VOTE) :]
    return int.from_bytes(rest[:8], "big"), int.from_bytes(rest[8:16], "big"), rest[16:]


def is_well(disks: Mapping[str, Disk], head: int) -> bool:
    """Whether all seats have that round at least, those of the committee three more, and nobody rests."""
    newest = max(disks.values(), key=lambda disk: disk.head)
    seated = [disks[name] for name in newest.committee.seats]
    is_on = min(disk.head for disk in seated) >= head + 3 and not any(disk.rests for disk in seated)
    return is_on and all(disk.head >= head for disk in disks.values())
