"""A run whose records a committee seals: keys of its seats, and a chain that goes on record by record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.support.records import commit_body
from thinwire.coordinator.ledger import Ledger
from thinwire.coordinator.protocol.chain import Chain
from thinwire.coordinator.protocol.identity import peer_id_of
from thinwire.coordinator.protocol.messages import (
    CommitBody,
    CommitteeEntry,
    GenesisBody,
    SeatEntry,
    digest_of,
    encode_record,
)
from thinwire.coordinator.protocol.trust.seals import Committee, Sealed
from thinwire.coordinator.quorum.log import OnSealed

KEYS = tuple(Ed25519PrivateKey.from_private_bytes(bytes([n] * 32)) for n in range(1, 8))
"""Of seats; the first one is the founder's."""

SEATS = tuple(peer_id_of(key.public_key()) for key in KEYS)
RECOVERY_KEY = Ed25519PrivateKey.from_private_bytes(bytes([99] * 32))
KEY_OF = dict(zip(SEATS, KEYS, strict=True))


def raw_public(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def entry(places: Sequence[int], **fields: Any) -> CommitteeEntry:
    """A committee of the seats of these places in SEATS, with a majority of them."""
    seats = tuple(SeatEntry(peer_id=SEATS[i], addresses=(f"/ip4/127.0.0.1/tcp/{4001 + i}",)) for i in places)
    return CommitteeEntry(**{"seats": seats, "need": len(seats) // 2 + 1, **fields})


def seal_of(
    committee: Committee, run_id: bytes, round_: int, record: bytes, voters: Sequence[str] = ()
) -> bytes:
    """By the first seats that are enough, or by these."""
    voters = voters or committee.seats[: committee.need]
    ballot = committee.ballot_above(0, voters[0])
    data = committee.signed(run_id, ballot, round_, record)
    return committee.seal(ballot, {seat: KEY_OF[seat].sign(data) for seat in voters})


class SealsAtOnce:
    """A `Log` for a committee, all of whose keys are here: what is proposed is sealed, without a word between
    seats."""

    on_sealed: OnSealed
    is_over = False

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.resting: dict[str, bytes] = {}

    def propose(self, body: CommitBody, work: bytes, now_s: float) -> None:
        record, ledger = encode_record(body), self._ledger
        seal = seal_of(ledger.committee, ledger.run_id, body.round, record)
        (commit,) = ledger.take(Sealed(record=record, seal=seal, work=work))
        self.on_sealed(commit, now_s)


class Sealing:
    """The records of one run from record 0 on. `sealed`: all of them but that."""

    def __init__(self, genesis: GenesisBody) -> None:
        """`genesis`: its coordinator is SEATS[0]."""
        self.genesis_record = encode_record(genesis)
        self.genesis_signature = KEYS[0].sign(self.genesis_record)
        self.run_id = digest_of(self.genesis_record)
        self.chain = Chain(self.run_id, genesis.coordinator, recovery=genesis.recovery)
        self.sealed: list[Sealed] = []

    def body(self, **fields: Any) -> CommitBody:
        """The next one."""
        return commit_body(self.chain.round + 1, parent=self.chain.digest, **fields)

    def governing(self, **fields: Any) -> CommitBody:
        """The next one, without offers."""
        return self.body(offers=(), **fields)

    def sealing(self, body: CommitBody, *, work: bytes = b"", voters: Sequence[str] = ()) -> Sealed:
        """What the committee seals, whatever it says; it is not added."""
        record = encode_record(body)
        seal = seal_of(self.chain.committee, self.run_id, body.round, record, voters)
        return Sealed(record=record, seal=seal, work=work)

    def add(self, body: CommitBody, *, work: bytes = b"", voters: Sequence[str] = ()) -> Sealed:
        """Seals the next one."""
        return self.added(self.sealing(body, work=work, voters=voters))

    def recover(self, committee: CommitteeEntry) -> Sealed:
        """A record that names this committee by the recovery key."""
        named = committee.model_copy(update={"recovered_with": raw_public(RECOVERY_KEY)})
        record = encode_record(self.governing(committee=named))
        return self.added(Sealed(record=record, seal=RECOVERY_KEY.sign(record)))

    def added(self, sealed: Sealed) -> Sealed:
        self.chain.check(sealed.commit)
        self.sealed.append(sealed)
        return sealed
