"""The checks that make commits a chain: order, parent and seal. Links, seats and the ledger share them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy

from ...compression.errors import ConfigError, LedgerCorrupt
from .identity import is_signed_by
from .messages import (
    BadMessage,
    Commit,
    CommitBody,
    CommitteeEntry,
    GenesisBody,
    SeatEntry,
    decode_record,
    digest_of,
)
from .trust.seals import Committee
from .trust.signatures import SIGNATURE_BYTES, key_of, verifies_raw


class Forked(LedgerCorrupt):
    """A commit with the right round and signature that follows another record than the one that is known."""


class Chain:
    """Follows the commits of one run from any round on.

    `digest` is that of the record of `round`: the run id for round 0. None: not known, as for a node that
    starts from a snapshot; then the seal of the first commit vouches for what is before it. `committee` seals
    the next record; `recovery`: digest of the key that may name another one, b"": there is none.
    """

    def __init__(
        self,
        run_id: bytes,
        founder: str,
        round_: int = 0,
        digest: bytes | None = None,
        *,
        recovery: bytes = b"",
        before: Iterable[CommitBody] = (),
    ) -> None:
        """`founder`, `recovery`: as record 0 has them (`GenesisBody.coordinator`, `.recovery`); `before`: of
        the records up to `round_`, in order, those at least that name a committee."""
        self._run_id = run_id
        self.round = round_
        self.digest = run_id if round_ == 0 else digest
        self.committee = Committee.founder(founder)
        self.seats: tuple[SeatEntry, ...] = ()
        """Of the committee, with their addresses, once a record has named it."""
        self.recovery = recovery
        for body in before:
            if body.committee is not None:
                self._follow(body.round, body.committee)

    def check(self, commit: Commit) -> None:
        """Accepts the next commit, or raises LedgerCorrupt (Forked, if that is it) and stays where it was."""
        self._check(commit, sealed=True)

    def check_all(self, commits: Sequence[Commit]) -> None:
        """The same of the next ones, all or none. Of the last one and of those that name a committee the seal
        is checked: it covers the parent's digest, and by that all that is before."""
        ahead = copy(self)
        for commit in commits:
            ahead._check(commit, sealed=commit is commits[-1])
        vars(self).update(vars(ahead))

    def _check(self, commit: Commit, *, sealed: bool) -> None:
        wanted = self.round + 1
        try:
            body = commit.body
        except BadMessage as e:
            raise LedgerCorrupt(f"record {wanted}: it is no commit: {e}") from e
        if sealed or body.committee is not None:
            self._check_seal(commit, body.committee)
        if body.round != wanted:
            raise LedgerCorrupt(f"record {wanted}: it says that it is round {body.round}")
        if self.digest is not None and body.parent != self.digest:
            raise Forked(f"record {wanted}: it does not follow record {self.round}")
        if body.committee is not None:
            self._check_named(body.committee)
            if body.committee.recovered_with and body.offers:
                raise LedgerCorrupt(f"record {wanted}: a record of the recovery key counts no offers")
        self.took(commit)

    def took(self, commit: Commit) -> None:
        """Goes on to the next commit, which is known to be it."""
        self.round, self.digest = self.round + 1, commit.digest
        if commit.body.committee is not None:
            self._follow(self.round, commit.body.committee)

    def _check_seal(self, commit: Commit, named: CommitteeEntry | None) -> None:
        wanted = self.round + 1
        if named is not None and named.recovered_with:
            self._check_recovery(commit, named.recovered_with)
            return
        why = self.committee.why_not_sealed(self._run_id, wanted, commit.record, commit.signature)
        if why is not None:
            raise LedgerCorrupt(f"record {wanted}: {why}")

    def _check_named(self, named: CommitteeEntry) -> None:
        wanted = self.round + 1
        if named.recovery and self.recovery:
            raise LedgerCorrupt(f"record {wanted}: it changes the recovery key, which is set once")
        for seat in named.seats:
            if key_of(seat.peer_id) is None:
                raise LedgerCorrupt(f"record {wanted}: it names a seat without a key, {seat.peer_id!a}")

    def _check_recovery(self, commit: Commit, key: bytes) -> None:
        wanted = self.round + 1
        if not self.recovery or digest_of(key) != self.recovery:
            raise LedgerCorrupt(
                f"record {wanted}: it is signed with a key that is not the run's recovery key"
            )
        if len(commit.signature) != SIGNATURE_BYTES or not verifies_raw(key, commit.signature, commit.record):
            raise LedgerCorrupt(f"record {wanted}: its signature is not the recovery key's")

    def _follow(self, round_: int, entry: CommitteeEntry) -> None:
        self.committee, self.seats = Committee.named(round_, entry), entry.seats
        self.recovery = self.recovery or entry.recovery


def check_genesis(record: bytes, signature: bytes) -> GenesisBody:
    """Record 0, signed by the founder that it names. Raises LedgerCorrupt."""
    try:
        body = decode_record(GenesisBody, record)
        is_signed = is_signed_by(body.coordinator, signature, record)
    except (BadMessage, ConfigError) as e:
        raise LedgerCorrupt(f"record 0: it is no genesis: {e}") from e
    if not is_signed:
        raise LedgerCorrupt("record 0: its signature is not the coordinator's")
    return body


def seats_of(body: CommitBody) -> tuple[SeatEntry, ...]:
    """That the record names as the committee; (): it names none."""
    return () if body.committee is None else body.committee.seats


REPAIR_FORK = (
    "The coordinator was restored from an older copy of its state directory, or such a copy runs beside it, "
    "and went on without this node's rounds. Stop the coordinator and restore a copy from before it was "
    "restored, or a newer one: nodes give back the rounds after it. Or give up this node's rounds: start it "
    "with an empty --state directory."
)
"""Two records of one round, both signed by this coordinator."""
