"""A whole ledger as one file: record 0, every commit, and the payloads that commits name, each once.

    head     "thinwire ledger\\n" | u32 version of this file
    item     kind (1 byte) | u64 length | body          kinds: Genesis, Commit, Sealed, Blob, Absent, End
    G, C     signature (64 bytes) | record              as signed by the only coordinator
    S        u16 length | seal | record                 a commit, as a committee of several has sealed it
    B        payload                                    after the first commit that names it, in its order
    A        32 bytes digest of a payload               in its place: the coordinator had thrown it away
             Signatures of a commit's offers (`CommitBody.work`) are the last of its payloads.
    E        u32 round | 32 bytes digest of the last record; nothing comes after it

The version is the protocol version that record 0 names. Of a run that began with protocol 2 or 3 it is 4 once
a record names a committee, a resting seat or who may come in: earlier builds say that they cannot read it.
Without such a record the file has the bytes that it always had.

All integers are little-endian. Base weights and texts are not in it. Readers check every byte: signatures by
the key in record 0, the chain of digests, each payload's digest, each peer's signature of its offers. Who
holds a file can trust it as far as the run id, which is the digest of record 0.
"""

from __future__ import annotations

import os
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from blake3 import blake3

from ...compression.errors import ConfigError, Incompatible, LedgerCorrupt
from .chain import Chain, check_genesis
from .files import sync_folder
from .messages import (
    COMMITTEES_SINCE,
    MAX_SEAL_BYTES,
    PROTOCOL_VERSION,
    Commit,
    CommitBody,
    GenesisBody,
    OfferEntry,
    decode_record,
    digest_of,
    is_readable,
)
from .trust.governing import Changing
from .trust.signatures import SIGNATURE_BYTES
from .trust.signed_offers import check_work

MAGIC: Final = b"thinwire ledger\n"
_HEAD: Final = struct.Struct("<16sI")
_ITEM: Final = struct.Struct("<cQ")
_END: Final = struct.Struct("<I32s")
_SEAL: Final = struct.Struct("<H")
_GENESIS, _COMMIT, _SEALED, _BLOB, _ABSENT, _LAST = b"G", b"C", b"S", b"B", b"A", b"E"
_MAX_RECORD_BYTES: Final = 16 * 2**20
_PIECE_BYTES: Final = 2**20


@dataclass(frozen=True, slots=True)
class Summary:
    """What a verified file holds. `reports`: round -> (peer id, fingerprint); the last one of each peer.
    `absent_to`: the last round of which a payload is absent, 0: none. `changes`: of settings, of who orders
    the run and of who may come in, in words.
    `unsigned`: spans of rounds, first and last, with offers that no signature shows to be their peers'."""

    run_id: bytes
    rounds: int
    n_blobs: int
    absent_to: int
    n_bytes: int
    reports: Mapping[int, tuple[tuple[str, bytes], ...]]
    changes: tuple[str, ...] = ()
    unsigned: tuple[tuple[int, int], ...] = ()


class LedgerFile:
    """Reads an open file as a stream; nothing larger than one record or payload is held in memory."""

    def __init__(self, file: BinaryIO) -> None:
        """Reads record 0. Raises LedgerCorrupt, or Incompatible for another protocol version."""
        self._file = file
        self._at = 0
        self.n_bytes = file.seek(0, os.SEEK_END)
        self._places: dict[bytes, tuple[int, int]] = {}  # digest -> offset, length
        self._version = version = self._read_head()
        self.signature, self.record = self._signed(_GENESIS, 0)
        self.genesis = check_genesis(self.record, self.signature)
        if version not in (self.genesis.protocol, _version(self.genesis, governs=True)):
            raise self._of_another_version()
        self.run_id = digest_of(self.record)
        self.peers: dict[int, str] = {}
        self._absent: set[bytes] = set()
        self.absent_to = 0
        self.unsigned: list[tuple[int, int]] = []
        self._items_at = self._at

    @property
    def n_blobs(self) -> int:
        return len(self._places)

    def commits(self) -> Iterator[Commit]:
        """All commits from round 1 on, each with its payloads verified. Raises LedgerCorrupt."""
        self._at = self._items_at
        self._places.clear()
        self._absent.clear()
        self.unsigned.clear()
        self.peers.clear()
        governs = False
        chain = Chain(self.run_id, self.genesis.coordinator, recovery=self.genesis.recovery)
        while (kind := self._next_kind(chain.round + 1)) != _LAST:
            wanted = chain.round + 1
            signature, record = self._sealed(wanted) if kind == _SEALED else self._signed(_COMMIT, wanted)
            commit = Commit(record=record, signature=signature)
            chain.check(commit)
            governs = governs or self._governs(commit.body)
            self._check_peers(commit.body)
            for digest in blobs_of(commit.body):
                if digest not in self._places and digest not in self._absent:
                    self._check_blob(digest, wanted)
                if digest in self._absent and digest != commit.body.work:
                    self.absent_to = wanted
            self._check_work(commit.body)
            yield commit
        self._check_end(chain)
        if self._version != _version(self.genesis, governs):
            raise self._of_another_version()

    def payload(self, offer: OfferEntry) -> bytes:
        """The bytes of an offer in a commit that `commits` has given already. Raises KeyError if absent."""
        if offer.payload is not None:
            return offer.payload
        assert offer.digest is not None
        data = self._at_place(*self._places[offer.digest])
        if digest_of(data) != offer.digest:
            raise LedgerCorrupt(f"payload {offer.digest.hex()[:16]} has changed since it was checked")
        return data

    def work(self, body: CommitBody) -> bytes | None:
        """The signatures of the offers of such a commit; None: it names none, or nobody had them any more."""
        place = self._places.get(body.work)
        return None if place is None else self._at_place(*place)

    def _governs(self, body: CommitBody) -> bool:
        if body.governs and self._version < COMMITTEES_SINCE:
            what = f"it is of protocol {COMMITTEES_SINCE}"
            raise LedgerCorrupt(f"record {body.round}: {what}, in a file of {self._version}")
        return body.governs

    def _check_work(self, body: CommitBody) -> None:
        if not check_work(self.run_id, body, self.work(body), self.peers):
            return
        first = body.round
        if self.unsigned and self.unsigned[-1][1] == body.round - 1:
            first, _ = self.unsigned.pop()
        self.unsigned.append((first, body.round))

    def _at_place(self, offset: int, n_bytes: int) -> bytes:
        self._file.seek(offset)
        return self._file.read(n_bytes)

    def _read_head(self) -> int:
        data = self._bytes(_HEAD.size, "this is no ledger file: it is too short")
        magic, version = _HEAD.unpack(data)
        if magic != MAGIC:
            raise LedgerCorrupt("record 0: this is no ledger file of thinwire")
        if not is_readable(version):
            raise _other_version(version)
        return int(version)

    def _next_kind(self, record: int) -> bytes:
        kind = self._bytes(1, f"record {record}: the file is cut off before it")
        self._at -= 1
        return kind

    def _item(self, kind: bytes, max_bytes: int, what: str) -> int:
        """Takes the head of an item; returns the length of its body, which lies wholly in the file."""
        found, n_bytes = _ITEM.unpack(self._bytes(_ITEM.size, f"{what}: the file is cut off before it"))
        if found != kind:
            raise LedgerCorrupt(f"{what}: an item of another kind ({found!r}) is in its place")
        if n_bytes > max_bytes:
            raise LedgerCorrupt(f"{what}: it says that it has {n_bytes} bytes, at most {max_bytes}")
        if n_bytes > self.n_bytes - self._at:
            raise LedgerCorrupt(f"{what}: the file is cut off inside of it")
        return int(n_bytes)

    def _signed(self, kind: bytes, record: int) -> tuple[bytes, bytes]:
        data = self._record_item(kind, SIGNATURE_BYTES, record)
        return data[:SIGNATURE_BYTES], data[SIGNATURE_BYTES:]

    def _sealed(self, record: int) -> tuple[bytes, bytes]:
        data = self._record_item(_SEALED, _SEAL.size + MAX_SEAL_BYTES, record)
        end = _SEAL.size + int(_SEAL.unpack_from(data)[0])
        seal = data[_SEAL.size : end]
        if not SIGNATURE_BYTES < len(seal) <= MAX_SEAL_BYTES or len(data) < end:
            raise LedgerCorrupt(f"record {record}: a seal of {end - _SEAL.size} bytes is none")
        return seal, data[end:]

    def _record_item(self, kind: bytes, n_before: int, record: int) -> bytes:
        n_bytes = self._item(kind, n_before + _MAX_RECORD_BYTES, f"record {record}")
        data = self._bytes(n_bytes, f"record {record}: the file is cut off inside of it")
        if n_bytes < SIGNATURE_BYTES:
            raise LedgerCorrupt(f"record {record}: it is too short")
        return data

    def _of_another_version(self) -> LedgerCorrupt:
        return LedgerCorrupt(f"record 0: of protocol {self.genesis.protocol}, in a file of {self._version}")

    def _check_blob(self, digest: bytes, record: int) -> None:
        what = f"record {record}: its payload {digest.hex()[:16]}"
        if self._next_kind(record) == _ABSENT:
            if self._bytes(self._item(_ABSENT, len(digest), what), what) != digest:
                raise LedgerCorrupt(f"{what}: another one is said to be absent in its place")
            self._absent.add(digest)
            return
        n_bytes = self._item(_BLOB, self.genesis.limits.max_payload_bytes, what)
        offset, missing, hashed = self._at, n_bytes, blake3()
        while missing:
            piece = self._bytes(min(missing, _PIECE_BYTES), f"{what}: the file is cut off inside of it")
            hashed.update(piece)
            missing -= len(piece)
        if hashed.digest() != digest:
            raise LedgerCorrupt(f"{what}: its bytes do not fit the digest in the record")
        self._places[digest] = (offset, n_bytes)

    def _check_peers(self, body: CommitBody) -> None:
        self.peers.update({a.index: a.peer_id for a in body.admitted})
        named = (
            {o.peer for o in body.offers} | {r.peer for r in body.reports} | {s.peer for s in body.snapshots}
        )
        for peer in sorted(named - self.peers.keys()):
            raise LedgerCorrupt(f"record {body.round}: it names peer {peer}, whom no record admits")

    def _check_end(self, chain: Chain) -> None:
        what = f"record {chain.round + 1}: the end mark in its place"
        n_bytes = self._item(_LAST, _END.size, what)
        if n_bytes != _END.size or self._bytes(_END.size, what) != _END.pack(
            chain.round, chain.digest or self.run_id
        ):
            raise LedgerCorrupt(f"{what} does not fit record {chain.round}")
        if self._at != self.n_bytes:
            raise LedgerCorrupt(f"{what} is followed by {self.n_bytes - self._at} more bytes")

    def _bytes(self, n_bytes: int, error: str) -> bytes:
        self._file.seek(self._at)
        data = self._file.read(n_bytes)
        if len(data) != n_bytes:
            raise LedgerCorrupt(error)
        self._at += n_bytes
        return data


@contextmanager
def open_ledger(path: Path) -> Iterator[LedgerFile]:
    """Raises ConfigError (no such file) or what `LedgerFile` raises, with the file's name before it."""
    try:
        file = path.open("rb")
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}") from e
    with file:
        try:
            yield LedgerFile(file)
        except (LedgerCorrupt, Incompatible) as e:
            raise type(e)(f"{path}: {e}") from e


def check(path: Path) -> Summary:
    """Verifies a whole file. Raises LedgerCorrupt that names the first bad record."""
    with open_ledger(path) as ledger:
        rounds, changes = 0, Changing(ledger.genesis)
        reports: dict[int, dict[str, bytes]] = defaultdict(dict)
        for commit in ledger.commits():
            rounds = commit.body.round
            changes.follow(commit)
            for report in commit.body.reports:
                reports[report.round][ledger.peers[report.peer]] = report.fingerprint
        return Summary(
            ledger.run_id,
            rounds,
            ledger.n_blobs,
            ledger.absent_to,
            ledger.n_bytes,
            {round_: tuple(by_peer.items()) for round_, by_peer in reports.items()},
            tuple(changes.told),
            tuple(ledger.unsigned),
        )


def write_ledger(
    path: Path,
    genesis: bytes,
    signature: bytes,
    commits: Iterable[Commit],
    payload: Callable[[bytes], bytes | None],
) -> Summary:
    """Writes aside, verifies what was written, then renames: `path` holds a whole ledger or what it held.

    `genesis`: record 0; `payload`: the bytes of a digest, None: nobody has them any more. Raises ConfigError
    when the file cannot be written, LedgerCorrupt when what was given is no ledger, and what `commits` and
    `payload` raise.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            _write(file, genesis, signature, commits, payload)
            file.flush()
            os.fsync(file.fileno())
        summary = check(aside)
        aside.rename(path)
        sync_folder(path.parent)
    except OSError as e:
        raise ConfigError(f"{path} cannot be written: {e.strerror}") from e
    finally:
        aside.unlink(missing_ok=True)
    return summary


def _write(
    file: BinaryIO,
    genesis: bytes,
    signature: bytes,
    commits: Iterable[Commit],
    payload: Callable[[bytes], bytes | None],
) -> None:
    round_, digest = 0, digest_of(genesis)
    body, governs = decode_record(GenesisBody, genesis), False
    written: set[bytes] = set()
    file.write(_HEAD.pack(MAGIC, body.protocol))
    _put(file, _GENESIS, signature + genesis)
    for commit in commits:
        _put_commit(file, commit)
        governs = governs or commit.body.governs
        for name in blobs_of(commit.body):
            if name not in written:
                data = payload(name)
                _put(file, _ABSENT, name) if data is None else _put(file, _BLOB, data)
                written.add(name)
        round_, digest = commit.body.round, commit.digest
    _put(file, _LAST, _END.pack(round_, digest))
    file.seek(0)
    file.write(_HEAD.pack(MAGIC, _version(body, governs)))


def _version(genesis: GenesisBody, governs: bool) -> int:
    """Of a file. `governs`: whether a record of it does."""
    return max(genesis.protocol, COMMITTEES_SINCE) if governs else genesis.protocol


def _put_commit(file: BinaryIO, commit: Commit) -> None:
    seal = commit.signature
    if len(seal) == SIGNATURE_BYTES:
        _put(file, _COMMIT, seal + commit.record)
    else:
        _put(file, _SEALED, _SEAL.pack(len(seal)) + seal + commit.record)


def _put(file: BinaryIO, kind: bytes, body: bytes) -> None:
    file.write(_ITEM.pack(kind, len(body)))
    file.write(body)


def blobs_of(body: CommitBody) -> list[bytes]:
    """Digests of what belongs to the commit and is not inside of it: payloads in the order of its offers,
    then their signatures."""
    payloads = [offer.digest for offer in body.offers if offer.digest is not None]
    return [*payloads, body.work] if body.work else payloads


def _other_version(version: int) -> Incompatible:
    return Incompatible(
        f"record 0: the ledger is of protocol version {version}, this is {PROTOCOL_VERSION}: "
        f"use the thinwire that made it"
    )
