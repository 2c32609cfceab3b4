"""Everything that crosses a session between node and coordinator, and the records of the ledger.

A message is a msgpack list: its tag, then its fields in the order in which they are declared. Nothing is
decoded beyond what the class expects: wrong tags, counts, types and lengths raise `BadMessage`.
Ledger records are stored and passed on as the bytes that were signed; nobody re-encodes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from functools import cache, cached_property
from typing import Annotated, Any, ClassVar, Final, Literal, Self, TypeVar

import msgpack
from blake3 import blake3
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ...compression.errors import ThinwireError, error_name, named_error

PROTOCOL_VERSION = 4
"""Of sessions, and of the ledgers of new runs."""

OLDEST_LEDGER = 2
"""Runs that began with this protocol version, or a later one, are read, replayed and gone on with."""

INLINE_BYTES = 4096
"""Payloads up to this size travel inside offer and commit; larger ones are blobs named by digest."""

MAX_METRICS_BYTES = 48 * 2**10
"""Compressed; a node has about 3 kB of them."""

MAX_TEXT = 2000
"""Characters of what one side tells the other in words."""

MAX_FIGURES = 64
"""Of one evaluation."""

MAX_NAME = 100
"""Characters of a figure's name."""

MAX_AUDITS = 256
"""In one record."""

MAX_PEERS = 1024
MAX_ROUND = 2**32 - 1
MAX_LISTED: Final = 4 * MAX_PEERS
"""Peers that are banned, or let in by name."""

COMMITTEES_SINCE: Final = 4
"""The first protocol version in which records name committees, resting seats and who may come in."""

MAX_SEATS: Final = 7
"""Of a committee."""

MAX_SEAL_BYTES: Final = 8 + 65 * MAX_SEATS
MAX_WORK_BYTES: Final = 64 * MAX_PEERS


class BadMessage(ThinwireError):
    """Bytes from the network that are not a message: the session that sent them is closed."""


_REFUSALS: Final = ("ConfigError", "Incompatible", "LedgerCorrupt", "SwarmUnreachable", BadMessage.__name__)


def digest_of(data: bytes) -> bytes:
    """BLAKE3 of `data`, 32 bytes: the name of a blob, a record or a payload."""
    return blake3(data).digest()


Digest = Annotated[bytes, Field(min_length=32, max_length=32)]
Round = Annotated[int, Field(ge=0, le=MAX_ROUND)]
Index = Annotated[int, Field(ge=0, lt=2**16)]
Count = Annotated[int, Field(ge=0, lt=2**40)]
Time = Annotated[int, Field(ge=0, lt=2**48)]
"""In milliseconds, by the clock of who says it."""

Signature = Annotated[bytes, Field(min_length=64, max_length=64)]
SealBytes = Annotated[bytes, Field(min_length=64, max_length=MAX_SEAL_BYTES)]
"""Why a record is one: the signature of the only seat, 64 bytes, or a seal of several (see `seals`)."""

Work = Annotated[bytes, Field(max_length=MAX_WORK_BYTES)]
"""Signatures of a record's offers, see `signed_offers.work_of`."""

Term = Annotated[int, Field(ge=0, lt=2**63)]
"""The ballot by which a seat leads: a later one has a higher one. 0: nobody was elected."""

PeerId = Annotated[str, Field(min_length=1, max_length=100)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]
Address = Annotated[str, Field(min_length=1, max_length=300)]


def as_text(words: str) -> str:
    """What fits into a `Text`: cut, and with "?" for what has no UTF-8, as names of files and JSON may."""
    return words[:MAX_TEXT].encode(errors="replace").decode()


def is_readable(protocol: int) -> bool:
    """Whether this build reads and goes on with ledgers of that protocol version."""
    return OLDEST_LEDGER <= protocol <= PROTOCOL_VERSION


class Record(BaseModel):
    """A frozen, strictly typed value that is packed as the list of its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=False)

    n_younger: ClassVar[int] = 0
    """So many of the last fields are younger than the record: those at its end that are empty are left out of
    the bytes, which are what they were before there was such a field."""

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        if not isinstance(value, tuple):
            return value
        names = _names(cls)
        n_older = len(names) - cls.n_younger
        if not n_older <= len(value) <= len(names):
            newer = ": it is of a newer thinwire" if len(value) > len(names) else ""
            raise ValueError(f"{cls.__name__} has {len(names)} fields, not {len(value)}{newer}")
        if len(value) > n_older and not value[-1]:
            raise ValueError(f"an empty {names[len(value) - 1]} is left out")
        return dict(zip(names, value, strict=False))

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """With other values; what was worked out from the old ones is not taken along."""
        copied = super().model_copy(update=update, deep=deep)
        names = _names(type(self))
        for name in [name for name in copied.__dict__ if name not in names]:
            del copied.__dict__[name]
        return copied

    def to_list(self) -> list[Any]:
        """The fields' values in order, as msgpack takes them."""
        fields = self.__dict__
        values = [_plain(fields[name]) for name in _names(type(self))]
        n_older = len(values) - self.n_younger
        while len(values) > n_older and not values[-1]:
            values.pop()
        return values


@cache
def _names(kind: type[Record]) -> tuple[str, ...]:
    """Of its fields, in order."""
    return tuple(kind.model_fields)


R = TypeVar("R", bound=Record)


def _once_each(changes: tuple[Change, ...]) -> tuple[Change, ...]:
    keys = [change.key for change in changes]
    if keys != sorted(set(keys)):
        raise ValueError("changes are in the order of their keys, each one once")
    return changes


def _plain(value: Any) -> Any:
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Record):
        return value.to_list()
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if isinstance(value, StrEnum):
        return str(value)
    return value


_PLAIN: Final = frozenset((int, bytes, float, str, bool, type(None)))


class NodeState(StrEnum):
    JOINING = "joining"
    TRAINING = "training"
    LEAVING = "leaving"


# ------------------------------------------------------------------------------------------- the ledger


class OfferEntry(Record):
    """One counted offer in a commit: either the payload itself or the digest of a blob.

    0 samples: no batch of the peer's was finite; its payload is empty and changes nothing. `own_data`: it was
    made from data that others do not have.
    """

    n_younger = 1
    peer: Index
    n_samples: Annotated[int, Field(ge=0, le=2**20)]
    n_tokens: Count
    loss: float | None
    n_bytes: Count
    payload: Annotated[bytes, Field(max_length=INLINE_BYTES)] | None
    digest: Digest | None
    own_data: bool = False

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.payload is None) == (self.digest is None):
            raise ValueError("an offer has either a payload or a digest")
        return self


class Admission(Record):
    """A peer gets its small index: offers, reports and evaluators name it by this from then on.

    `invitation`: the name of the one that let it in; "": none.
    """

    n_younger = 1
    index: Index
    peer_id: PeerId
    invitation: Annotated[str, Field(max_length=MAX_NAME)] = ""


class ReportEntry(Record):
    """A fingerprint that a peer reported since the last commit. A later one on the same round replaces it;
    `checked`: the peer has replayed the ledger up to that round, and this is what came out."""

    peer: Index
    round: Round
    fingerprint: Annotated[bytes, Field(min_length=8, max_length=8)]
    checked: bool


class SnapshotEntry(Record):
    """A snapshot that a peer has on disk since the last commit: the digest of its manifest, and the size of
    all of it. 0 bytes: what it reported of that round before is taken back."""

    peer: Index
    round: Round
    manifest: Digest
    n_bytes: Count


class Verdict(StrEnum):
    """What an auditor has found of another peer's offer, after it did that peer's work again."""

    PASSED = "passed"
    FAILED = "failed"


class AuditEntry(Record):
    """One auditor's report on the counted offer of `target` in `round`, signed by the auditor."""

    round: Annotated[int, Field(ge=1, le=MAX_ROUND)]
    target: Index
    auditor: Index
    verdict: Annotated[Verdict, Field(strict=False)]
    signature: Signature


_Int = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Value = bool | _Int | Annotated[float, Field(allow_inf_nan=False)] | Annotated[str, Field(max_length=100)]
"""Of a setting that can be changed."""


class Change(Record):
    """A setting of the run that has another value from the round after the record's on, for everybody.

    `key`: as in a run file (`strategy.lr`), or `run.paused`.
    """

    key: Annotated[str, Field(pattern=r"^[a-z]+\.[a-z][a-z0-9_]*$", max_length=60)]
    value: Value


MAX_CHANGES: Final = 32
Changes = Annotated[tuple[Change, ...], Field(max_length=MAX_CHANGES), AfterValidator(_once_each)]
"""In the order of their keys, each one once."""


class SeatEntry(Record):
    """A seat of a committee: a coordinator, known by its key. `addresses`: multiaddrs without the peer id,
    the most likely to work first."""

    peer_id: PeerId
    addresses: Annotated[tuple[Address, ...], Field(max_length=8)]


class CommitteeEntry(Record):
    """Who orders the records after this one, and how many of them must sign.

    `recovery`: digest of the public key that may name another committee when a majority is lost for ever;
    once in a run, and only where record 0 has none. `recovered_with`: that public key, in a record that it
    has signed itself, instead of the committee before.
    """

    n_younger = 2
    seats: Annotated[tuple[SeatEntry, ...], Field(min_length=1, max_length=MAX_SEATS)]
    need: Annotated[int, Field(ge=1, le=MAX_SEATS)]
    recovery: Annotated[bytes, Field(max_length=32)] = b""
    recovered_with: Annotated[bytes, Field(max_length=32)] = b""

    @model_validator(mode="after")
    def _is_a_majority(self) -> Self:
        n = len(self.seats)
        if len({seat.peer_id for seat in self.seats}) != n or not n // 2 < self.need <= n:
            raise ValueError("a committee has different seats, of which more than half must sign")
        if not {len(self.recovery), len(self.recovered_with)} <= {0, 32}:
            raise ValueError("a recovery key has 32 bytes")
        return self


class Reseated(Record):
    """A seat that lost its votes need not rest any more: it has said this nonce."""

    seat: PeerId
    nonce: Annotated[bytes, Field(min_length=16, max_length=16)]


class AccessEntry(Record):
    """Who may come in, all of it, from this record on: for all seats alike. `token`: digest of the run's;
    `mode`, `listed`: see `EntryRules`."""

    token: Digest
    mode: Annotated[str, Field(pattern="^(open|invited|listed)$")]
    banned: Annotated[tuple[PeerId, ...], Field(max_length=MAX_LISTED)]
    listed: Annotated[tuple[PeerId, ...], Field(max_length=MAX_LISTED)]


class CommitBody(Record):
    """What closes a round. `lr_factor_bits`: float32 bits of the factor of round + 1.

    Without offers it only brings changes, of settings, the committee or of who may come in: its round trains
    nothing. `audits`: in the order of round, target
    and auditor, each once. `work`: digest of the signatures of the offers (see `signed_offers`); empty in
    records that were made before offers were signed, and without offers.
    """

    n_younger = 6
    round: Annotated[int, Field(ge=1, le=MAX_ROUND)]
    parent: Digest
    offers: Annotated[tuple[OfferEntry, ...], Field(max_length=MAX_PEERS)]
    admitted: Annotated[tuple[Admission, ...], Field(max_length=MAX_PEERS)]
    lr_factor_bits: Annotated[int, Field(ge=0, lt=2**32)]
    reports: Annotated[tuple[ReportEntry, ...], Field(max_length=4 * MAX_PEERS)]
    snapshots: Annotated[tuple[SnapshotEntry, ...], Field(max_length=2 * MAX_PEERS)]
    evaluator: Index | None
    time_ms: Time
    changes: Changes = ()
    audits: Annotated[tuple[AuditEntry, ...], Field(max_length=MAX_AUDITS)] = ()
    work: Annotated[bytes, Field(max_length=32)] = b""
    committee: CommitteeEntry | None = None
    reseat: Annotated[tuple[Reseated, ...], Field(max_length=MAX_SEATS)] = ()
    access: AccessEntry | None = None

    @property
    def governs(self) -> bool:
        """Whether it says who orders the run, or who may come in; since `COMMITTEES_SINCE`."""
        return self.committee is not None or bool(self.reseat) or self.access is not None

    @model_validator(mode="after")
    def _has_a_reason(self) -> Self:
        if not (self.offers or self.changes or self.governs):
            raise ValueError("a commit has offers or changes")
        if self.work and (len(self.work) != 32 or not self.offers):
            raise ValueError("work is the digest of the signatures of offers")
        keys = [(a.round, a.target, a.auditor) for a in self.audits]
        if keys != sorted(set(keys)):
            raise ValueError("audits are in order, each one once")
        return self


class LayoutEntry(Record):
    """One parameter of the model. `init`: zeros, ones or normal with `scale` (exact noise)."""

    name: Annotated[str, Field(min_length=1, max_length=500)]
    shape: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**48)], ...], Field(max_length=8)]
    dtype: Annotated[str, Field(max_length=20)]
    init: Annotated[str, Field(pattern="^(zeros|ones|normal)$")]
    scale: float


class BlobRef(Record):
    """Bytes that the coordinator serves for the whole run: base weights, training and held-out text."""

    digest: Digest
    n_bytes: Count


class Limits(Record):
    """What an offer may carry, fixed for the run."""

    max_peers: Annotated[int, Field(ge=1, le=MAX_PEERS)] = 64
    max_payload_bytes: Annotated[int, Field(ge=1, le=2**32)] = 64 * 2**20
    max_samples: Annotated[int, Field(ge=1, le=2**20)] = 2**16


class GenesisBody(Record):
    """Record 0. `config`: the run's configuration as JSON; `base`: None means exact initialisation;
    `corpus`: the text that nodes train on unless they bring their own, if it is not a built-in one.
    `coordinator`: the founder, the only seat until a record names a committee; `recovery`: see
    CommitteeEntry."""

    n_younger = 1
    protocol: int
    config: Annotated[str, Field(max_length=200_000)]
    layout: Annotated[tuple[LayoutEntry, ...], Field(min_length=1, max_length=100_000)]
    base: BlobRef | None
    held_out: BlobRef | None
    corpus: BlobRef | None
    limits: Limits
    coordinator: PeerId
    lr_factor_bits: Annotated[int, Field(ge=0, lt=2**32)]
    time_ms: Time
    recovery: Annotated[bytes, Field(max_length=32)] = b""


# ------------------------------------------------------------------------------------------- messages


class Message(Record):
    """A record with a tag of its own, sent over a session."""

    tag: ClassVar[int]

    @cached_property
    def encoded(self) -> bytes:
        """msgpack of its tag and its fields in order: once, to however many it goes."""
        packed: bytes = msgpack.packb([self.tag, *self.to_list()], use_bin_type=True)
        return packed


READER: Final = "thinwire reader"


class Hello(Message):
    """First frame of a session, from the node. `head_*`: the last commit that it has on disk, if any.

    `device`: what it trains on, in words, for people. `watches`: this session only wants to hear who leads:
    it is answered by `Elsewhere`, and again whenever that changes.

    A head that the coordinator does not have (restored from an older copy) is answered by `Follow`: the node
    sends the commits that are missing, then comes the Welcome.
    """

    tag = 1
    n_younger = 1
    version: int
    run_id: Digest
    token: Annotated[str, Field(max_length=200)]
    head_round: Round | None
    head_digest: Digest | None
    addresses: Annotated[tuple[Address, ...], Field(max_length=32)]
    agent: Annotated[str, Field(max_length=100)]
    """Which program asks: READER only reads, and is no peer to people."""
    device: Annotated[str, Field(max_length=100)] = ""
    watches: bool = False

    def is_ahead_of(self, head: int) -> bool:
        """Whether the node says that it has later commits."""
        return self.head_round is not None and self.head_round > head


class Welcome(Message):
    """Record 0 with its signature, and where the ledger stands. Payloads of the rounds from `kept_from` on
    can be had from the coordinator, which leads by that `term`. `is_copy`: to a reader, from a seat that does
    not lead, and may be behind."""

    tag = 2
    n_younger = 2
    genesis: Annotated[bytes, Field(max_length=16 * 2**20)]
    signature: Signature
    head_round: Round
    head_digest: Digest
    kept_from: Round
    peer_index: Index
    heartbeat_s: Annotated[float, Field(gt=0, le=60)]
    term: Term = 0
    is_copy: bool = False

    @cached_property
    def body(self) -> GenesisBody:
        """Record 0, decoded. Raises BadMessage."""
        return decode_record(GenesisBody, self.genesis)


class Refused(Message):
    """Why a session is not opened or is ended: the error that the node is to raise."""

    tag = 3
    error: Annotated[str, Field(pattern=f"^({'|'.join(_REFUSALS)})$")]
    text: Text

    @classmethod
    def of(cls, error: ThinwireError) -> Refused:
        """For an error that the coordinator has met. What a node can do nothing about is BadMessage to it."""
        name = error_name(error)
        return cls(error=name if name in _REFUSALS else BadMessage.__name__, text=str(error)[:MAX_TEXT])

    def as_error(self) -> ThinwireError:
        """What the node raises."""
        if self.error == BadMessage.__name__:
            return BadMessage(self.text)
        return named_error(self.error, self.text)


class Elsewhere(Message):
    """From a seat that does not lead, instead of a Welcome; or that does not lead any more. `leader`: the one
    that does, as far as is known, by that `term`; `seats`: of the committee, in its order; `waits_for`: what
    it takes to go on, in words, if nobody leads."""

    tag = 18
    n_younger = 1
    leader: PeerId | None
    seats: Annotated[tuple[SeatEntry, ...], Field(max_length=MAX_SEATS)]
    waits_for: Text
    term: Term = 0


class State(Message):
    """What a node does. `needs_after`: a joining node is going to apply the rounds after this one, so that
    their payloads must be kept for it; None: it does not know yet. `last_word`: the error that a leaving node
    ends with."""

    tag = 4
    n_younger = 1
    state: Annotated[NodeState, Field(strict=False)]
    needs_after: Round | None = None
    last_word: Text = ""


class Offer(Message):
    """What a peer proposes for `round`. On the wire `payload` is None when it was sent as a blob.

    `signature`: the peer's, over what `signed_offers.signed_bytes` says. `own_data`: see OfferEntry.
    """

    tag = 5
    n_younger = 2
    round: Annotated[int, Field(ge=1, le=MAX_ROUND)]
    n_samples: Annotated[int, Field(ge=0, le=2**20)]
    n_tokens: Count
    loss: float | None
    n_bytes: Count
    payload: bytes | None
    digest: Digest | None
    signature: Annotated[bytes, Field(max_length=64)] = b""
    own_data: bool = False


class Follow(Message):
    """Send all commits after this round, then new ones as they are made. From the coordinator, instead of a
    Welcome: send me what you have after this round."""

    tag = 6
    after: Round


class Commit(Message):
    """One record of the ledger, as stored: the signed bytes, and why they are a record: the Ed25519 signature
    of the only seat, or a committee's seal."""

    tag = 7
    record: Annotated[bytes, Field(max_length=16 * 2**20)]
    signature: SealBytes

    @cached_property
    def digest(self) -> bytes:
        """Of the record: the parent of the next one."""
        return digest_of(self.record)

    @cached_property
    def body(self) -> CommitBody:
        """The record, decoded. Raises BadMessage."""
        return decode_record(CommitBody, self.record)

    @classmethod
    def made(cls, body: CommitBody, record: bytes, signature: bytes) -> Self:
        """Of a record that was encoded here: `body` need not be decoded again."""
        commit = cls(record=record, signature=signature)
        commit.__dict__["body"] = body
        return commit


class Head(Message):
    """The newest committed round. Answers a node's leaving: all that it sent before has been read."""

    tag = 8
    round: Round


class NoiseEntry(Record):
    """How noisy a round's payloads, made `of` that, are, as the node found that evaluates. `signal`: what all
    share, of their mean square; `noise`: the rest, in samples; `n_samples`: that a payload was made from, a
    mean."""

    signal: Annotated[float, Field(ge=-1, le=1)]
    noise: Annotated[float, Field(allow_inf_nan=False)]
    n_samples: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    of: Literal["momentum", "pseudo-gradients"]


class Report(Message):
    """What a node measured after applying `round`; None where it has nothing to say.

    `checked`: see ReportEntry. `snapshot`: digest of the manifest of one that is on disk now; its size.
    """

    tag = 9
    n_younger = 1
    round: Round
    fingerprint: Annotated[bytes, Field(min_length=8, max_length=8)] | None = None
    checked: bool = False
    held_out: float | None = None
    snapshot: Digest | None = None
    snapshot_bytes: Count | None = None
    noise: NoiseEntry | None = None


class Figure(Record):
    """A number that an evaluation gives, by its name."""

    name: Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
    value: float


class Evaluation(Message):
    """What an evaluation of the weights after `round` gave, or why it failed. Sent only in runs with
    `[eval]`, so that it needs no version of its own."""

    tag = 16
    round: Annotated[int, Field(ge=1, le=MAX_ROUND)]
    figures: Annotated[tuple[Figure, ...], Field(max_length=MAX_FIGURES)]
    failed: Text | None = None


class Phases(Record):
    """How long a node has taken for the parts of so many rounds, in all: totals since it was started."""

    rounds: Count
    compute_ms: Count
    pack_ms: Count
    exchange_ms: Count
    apply_ms: Count


MAX_SIZES: Final = 8
"""Peers that a heartbeat tells of: a node goes through them in turn."""


class PeerSize(Record):
    """What a node has seen of a peer's payloads lately, for people: how long they are beside the round's
    median, in percent, and how many percent of them were scaled down for that."""

    peer: Index
    size: Annotated[int, Field(ge=0, le=10**8)]
    clipped: Annotated[int, Field(ge=0, le=100)]


MAX_EDGES: Final = 16
"""Neighbours that a heartbeat tells of: those that were last met."""


class EdgeEntry(Record):
    """Bytes of the messages that a node and a neighbour in gossip have sent each other so far, and of them
    those that a member has carried, as they cannot reach each other."""

    n_younger = 1
    peer: Index
    sent: Count
    received: Count
    relayed: Count = 0


class Gossiping(Record):
    """What a node in gossip tells people. `round`: of its last exchange; `merged`: the last round that has
    changed the reference model, 0: it is untrained. `distance`: L2, of its own model from the median
    neighbour's. `own_held_out`: the held-out loss of its own model, when it last looked. None: not known.
    `carried`: bytes of others' messages."""

    n_younger = 1
    round: Round
    merged: Round
    distance: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None
    own_held_out: Annotated[float, Field(allow_inf_nan=False)] | None
    edges: Annotated[tuple[EdgeEntry, ...], Field(max_length=MAX_EDGES)]
    carried: Count = 0


class Heartbeat(Message):
    """Node to coordinator every `heartbeat_s`, and back: totals so far, for people and metrics; from nodes
    also `sizes` of some peers, and where they have models of their own how they mix."""

    tag = 10
    n_younger = 2
    round: Round
    sent_bytes: Count
    received_bytes: Count
    payload_bytes: Count
    phases: Phases | None = None
    sizes: Annotated[tuple[PeerSize, ...], Field(max_length=MAX_SIZES)] = ()
    gossip: Gossiping | None = None


class Offered(Message):
    """A payload of the open round, and the peer that has it: nodes may fetch it ahead from there. Who is
    named itself is sent it by the coordinator."""

    tag = 11
    round: Annotated[int, Field(ge=1, le=MAX_ROUND)]
    holder: PeerId
    digest: Digest
    n_bytes: Count


class Member(Record):
    peer_id: PeerId
    addresses: Annotated[tuple[Address, ...], Field(max_length=32)]


class Members(Message):
    """Who may fetch from whom, and where; sent when it changes.

    `is_change`: those who have come since, or are elsewhere, and those who have `left`; else all of them."""

    tag = 12
    n_younger = 2
    members: Annotated[tuple[Member, ...], Field(max_length=MAX_PEERS)]
    left: Annotated[tuple[PeerId, ...], Field(max_length=MAX_PEERS)] = ()
    is_change: bool = False

    @property
    def by_peer(self) -> dict[str, tuple[str, ...]]:
        """Where each is reached."""
        return {member.peer_id: member.addresses for member in self.members}

    def then(self, newer: Members) -> Members:
        """Both in one, for somebody who has heard neither."""
        if not newer.is_change:
            return newer
        found = {m.peer_id: m for m in (*self.members, *newer.members) if m.peer_id not in newer.left}
        back = {m.peer_id for m in newer.members}
        left = tuple(sorted({*self.left, *newer.left} - back)) if self.is_change else ()
        return Members(members=tuple(found.values()), left=left, is_change=self.is_change)


class Notice(Message):
    """What the coordinator waits for, in words."""

    tag = 13
    text: Text
    warning: bool


class Audit(Message):
    """An auditor's report on the offer of the peer `target` in `round`: see AuditEntry."""

    tag = 17
    round: Annotated[int, Field(ge=1, le=MAX_ROUND)]
    target: Index
    verdict: Annotated[Verdict, Field(strict=False)]
    signature: Signature


class AskMetrics(Message):
    """Coordinator to node: somebody wants to see your metrics."""

    tag = 14


class Metrics(Message):
    """The answer: a node's metrics in Prometheus' text format, compressed by zlib."""

    tag = 15
    text: Annotated[bytes, Field(max_length=MAX_METRICS_BYTES)]


MESSAGES: dict[int, type[Message]] = {
    m.tag: m
    for m in (
        Hello,
        Welcome,
        Refused,
        Elsewhere,
        State,
        Offer,
        Follow,
        Commit,
        Head,
        Report,
        Evaluation,
        Audit,
        Heartbeat,
        Offered,
        Members,
        Notice,
        AskMetrics,
        Metrics,
    )
}


def encode_record(record: Record) -> bytes:
    """msgpack of the record's fields in order."""
    packed: bytes = msgpack.packb(record.to_list(), use_bin_type=True)
    return packed


def decode_record(kind: type[R], data: bytes) -> R:
    """Raises BadMessage for anything but exactly one record of this kind."""
    return _validated(kind, _unpack(data))


def encode_message(message: Message) -> bytes:
    """msgpack of its tag and its fields in order."""
    return message.encoded


def decode_message(data: bytes, kinds: Mapping[int, type[Message]] = MESSAGES) -> Message:
    """Raises BadMessage for anything but exactly one message of these kinds, by their tags."""
    value = _unpack(data)
    if not isinstance(value, tuple) or not value or not isinstance(value[0], int) or value[0] not in kinds:
        raise BadMessage("unknown message")
    return _validated(kinds[value[0]], value[1:])


def _unpack(data: bytes) -> Any:
    # Containers hold at least a byte per entry and strings at most all of them: nothing can ask for more
    # memory than a small multiple of the frame that was already bounded.
    n = len(data)
    try:
        return msgpack.unpackb(
            data,
            raw=False,
            use_list=False,
            strict_map_key=True,
            max_bin_len=n,
            max_str_len=n,
            max_array_len=n,
            max_map_len=0,
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException, RecursionError) as e:
        raise BadMessage(f"not msgpack: {e}") from e


def _validated(kind: type[R], value: Any) -> R:
    try:
        return kind.model_validate(value)
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(x) for x in first["loc"])
        raise BadMessage(f"{kind.__name__}.{where}: {first['msg']}") from e


Rejected = Literal[
    # sessions
    "adopt", "banned", "fork", "full", "head", "hello", "not_admitted", "old_session", "run", "strangers",
    "token", "too_slow", "uninvited", "version",
    # frames and messages
    "frame_cut", "frame_kind", "frame_size", "message", "metrics", "wrong_message",
    # offers
    "changed_offer", "condemned", "copied_offer", "late_offer", "offer", "oversized", "samples", "signature",
    "size", "too_many_offers", "wrong_round",
    # blobs
    "blob", "blob_streams", "quota", "stranger",
    # reports
    "audit", "evaluation", "fingerprint", "held_out", "no_work", "rate", "report_round", "snapshot",
    "too_many_reports",
    # a fault of ours
    "internal",
]  # fmt: skip
"""What was not let in. Late offers are usual, and after a crash changed ones and old sessions; the others say
that a program is broken, too old or ill meant."""


PHASES: Final = ("compute", "pack", "exchange", "apply")
