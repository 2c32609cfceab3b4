"""A ledger as a file: every byte is checked, and whatever is wrong is named."""

from __future__ import annotations

from functools import partial
from io import BytesIO
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from thinwire.compression.errors import ConfigError, Incompatible, LedgerCorrupt
from thinwire.coordinator.protocol.identity import peer_id_of
from thinwire.coordinator.protocol.ledger_file import MAGIC, LedgerFile, check, open_ledger, write_ledger
from thinwire.coordinator.protocol.messages import (
    PROTOCOL_VERSION,
    Admission,
    Commit,
    CommitBody,
    GenesisBody,
    LayoutEntry,
    Limits,
    OfferEntry,
    ReportEntry,
    SnapshotEntry,
    digest_of,
    encode_record,
)
from thinwire.coordinator.protocol.trust.signed_offers import signed_bytes

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
LARGE, LARGER = b"large" * 9, b"larger" * 11
BLOBS = {digest_of(blob): blob for blob in (LARGE, LARGER)}
GENESIS = GenesisBody(
    protocol=PROTOCOL_VERSION,
    config="{}",
    layout=(LayoutEntry(name="w", shape=(2,), dtype="float32", init="zeros", scale=0.0),),
    base=None,
    held_out=None,
    corpus=None,
    limits=Limits(max_payload_bytes=100),
    coordinator=peer_id_of(KEY.public_key()),
    lr_factor_bits=0,
    time_ms=1,
)


def offer(peer: int, payload: bytes, *, as_blob: bool) -> OfferEntry:
    return OfferEntry(
        peer=peer,
        n_samples=1,
        n_tokens=1,
        loss=0.5,
        n_bytes=len(payload),
        payload=None if as_blob else payload,
        digest=digest_of(payload) if as_blob else None,
    )


WRONG = ReportEntry(peer=1, round=1, fingerprint=b"mistaken", checked=False)
OTHER = ReportEntry(peer=0, round=1, fingerprint=b"8 bytes!", checked=False)
HEALED = ReportEntry(peer=1, round=1, fingerprint=b"8 bytes!", checked=True)
SNAPSHOT = SnapshotEntry(peer=1, round=1, manifest=digest_of(b"manifest"), n_bytes=77)
ROUNDS: tuple[tuple[tuple[OfferEntry, ...], tuple[ReportEntry, ...]], ...] = (
    ((offer(0, b"tiny", as_blob=False), offer(1, LARGE, as_blob=True)), ()),
    ((offer(0, LARGE, as_blob=True), offer(1, LARGER, as_blob=True)), (WRONG, OTHER)),
    ((offer(1, b"last", as_blob=False),), (HEALED,)),
)


def chain(genesis: GenesisBody = GENESIS, key: Ed25519PrivateKey = KEY) -> list[Commit]:
    """Three commits; the payload LARGE is named by two of them."""
    commits, parent = [], digest_of(encode_record(genesis))
    for i, (offers, reports) in enumerate(ROUNDS):
        admitted = tuple(Admission(index=k, peer_id=f"peer-{k}") for k in range(2)) if i == 0 else ()
        body = CommitBody(
            round=i + 1,
            parent=parent,
            offers=offers,
            admitted=admitted,
            lr_factor_bits=0,
            reports=reports,
            snapshots=(SNAPSHOT,) if i == 1 else (),
            evaluator=None,
            time_ms=i,
        )
        record = encode_record(body)
        commits.append(Commit(record=record, signature=key.sign(record)))
        parent = commits[-1].digest
    return commits


def write(path: Path, commits: list[Commit], genesis: GenesisBody = GENESIS) -> bytes:
    record = encode_record(genesis)
    write_ledger(path, record, KEY.sign(record), commits, BLOBS.__getitem__)
    return path.read_bytes()


@pytest.fixture
def data(tmp_path: Path) -> bytes:
    return write(tmp_path / "whole", chain())


def read(data: bytes) -> list[Commit]:
    return list(LedgerFile(BytesIO(data)).commits())


def test_payloads_that_nobody_has_any_more_are_said_to_be_absent(tmp_path: Path) -> None:
    record = encode_record(GENESIS)
    gone = digest_of(LARGE)
    summary = write_ledger(
        tmp_path / "ledger",
        record,
        KEY.sign(record),
        chain(),
        lambda digest: None if digest == gone else BLOBS[digest],
    )
    assert (summary.rounds, summary.n_blobs, summary.absent_to) == (3, 1, 2)
    assert check(tmp_path / "ledger") == summary
    data = (tmp_path / "ledger").read_bytes()
    with pytest.raises(LedgerCorrupt, match=r"record 1: its payload \w+: another one is said to be absent"):
        read(
            data.replace(
                b"A" + (32).to_bytes(8, "little") + gone, b"A" + (32).to_bytes(8, "little") + bytes(32)
            )
        )
    with open_ledger(tmp_path / "ledger") as ledger:
        first = next(ledger.commits()).body.offers
        assert ledger.payload(first[0]) == b"tiny"
        with pytest.raises(KeyError):
            ledger.payload(first[1])


def signed_chain(signatures: bytes) -> tuple[list[Commit], bytes]:
    """One commit of a peer with a key, whose signature of its offer may be any."""
    peer_id = peer_id_of(OTHER_KEY.public_key())
    body = chain()[0].body
    admitted = (Admission(index=0, peer_id=peer_id),)
    kept = {"offers": body.offers[:1], "admitted": admitted, "work": digest_of(signatures)}
    record = encode_record(body.model_copy(update=kept))
    return [Commit(record=record, signature=KEY.sign(record))], signatures


def test_signatures_of_offers_are_checked(tmp_path: Path) -> None:
    run_id, record = digest_of(encode_record(GENESIS)), encode_record(GENESIS)
    own = OTHER_KEY.sign(signed_bytes(run_id, 1, ROUNDS[0][0][0]))
    write = partial(write_ledger, tmp_path / "ledger", record, KEY.sign(record))
    commits, work = signed_chain(own)
    assert write(commits, lambda _: work).unsigned == ()
    assert write(commits, lambda _: None).unsigned == ((1, 1),), "nobody has them any more"
    assert check(tmp_path / "ledger").absent_to == 0, "it can be replayed all the same"
    commits, work = signed_chain(KEY.sign(b"the coordinator's own"))
    with pytest.raises(LedgerCorrupt, match="record 1: the signature of peer 0 is not its own"):
        write(commits, lambda _: work)


def items(data: bytes) -> list[int]:
    """Offsets of all items, and the end."""
    offsets = [len(MAGIC) + 4]
    while offsets[-1] < len(data):
        n_bytes = int.from_bytes(data[offsets[-1] + 1 : offsets[-1] + 9], "little")
        offsets.append(offsets[-1] + 9 + n_bytes)
    return offsets


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    written = write(path, chain())
    assert list(tmp_path.iterdir()) == [path]
    assert written.count(LARGE) == 1
    summary = check(path)
    assert (summary.rounds, summary.n_blobs, summary.n_bytes) == (3, 2, len(written))
    assert summary.run_id == digest_of(encode_record(GENESIS))
    healed = {1: (("peer-1", b"8 bytes!"), ("peer-0", b"8 bytes!"))}
    assert summary.reports == healed, "what a peer said last counts"
    with open_ledger(path) as ledger:
        assert ledger.genesis == GENESIS
        for attempt in range(2):  # a second pass starts anew
            payloads = []
            for commit, expected in zip(ledger.commits(), chain(), strict=True):
                assert commit == expected, attempt
                payloads.append([ledger.payload(o) for o in commit.body.offers])
            assert payloads == [[b"tiny", LARGE], [LARGE, LARGER], [b"last"]]


def test_a_ledger_without_rounds(tmp_path: Path) -> None:
    assert read(write(tmp_path / "ledger", [])) == []


def test_every_altered_bit_is_noticed(data: bytes) -> None:
    for i in range(len(data)):
        altered = bytearray(data)
        altered[i] ^= 1 << i % 8
        with pytest.raises((LedgerCorrupt, Incompatible), match=r"^record \d"):
            read(bytes(altered))


def test_every_truncation_is_noticed_and_names_the_record(data: bytes) -> None:
    offsets = items(data)
    assert len(offsets) == 1 + 1 + 3 + 2 + 1
    for n in range(len(data)):
        with pytest.raises(LedgerCorrupt, match=r"record \d|no ledger file"):
            read(data[:n])
    # After: head | genesis | round 1 | its blob | round 2 | its blob | round 3 | end
    for end, record in zip(offsets[:-1], (0, 1, 1, 2, 2, 3, 4), strict=True):
        with pytest.raises(LedgerCorrupt, match=rf"^record {record}.* cut off before it"):
            read(data[:end])
        if record < 4:
            with pytest.raises(LedgerCorrupt, match=rf"^record {record}.* cut off inside of it"):
                read(data[: end + 12])


@given(st.binary(max_size=300), st.integers(0, 2**12))
def test_foreign_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, junk: bytes, at: int) -> None:
    with pytest.raises(LedgerCorrupt):
        read(junk)
    good = _GOOD.setdefault(0, write(tmp_path_factory.mktemp("good") / "ledger", chain()))
    at %= len(good)
    mixed = good[:at] + junk + good[at:]
    if junk:
        with pytest.raises((LedgerCorrupt, Incompatible)):
            read(mixed)


_GOOD: dict[int, bytes] = {}


def test_records_of_another_key_order_and_run(tmp_path: Path, data: bytes) -> None:
    good, forged = chain(), chain(key=OTHER_KEY)
    other_run = chain(GENESIS.model_copy(update={"time_ms": 2}))
    path = tmp_path / "ledger"
    path.write_bytes(b"what was there")
    for commits, message in (
        ([good[0], forged[1], good[2]], "record 2: its signature is not the coordinator's"),
        ([good[0], good[2]], "record 2: it says that it is round 3"),
        ([good[0], other_run[1]], "record 2: it does not follow record 1"),
        (other_run, "record 1: it does not follow record 0"),
    ):
        with pytest.raises(LedgerCorrupt, match=message):
            write(path, commits)
    assert path.read_bytes() == b"what was there", "nothing is overwritten before its replacement is verified"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ledger", "whole"]


def test_an_unadmitted_peer_a_wrong_and_an_oversized_payload(tmp_path: Path) -> None:
    record = encode_record(GENESIS)
    body = chain()[0].body.model_copy(update={"admitted": ()})
    commit = Commit(record=encode_record(body), signature=KEY.sign(encode_record(body)))
    with pytest.raises(LedgerCorrupt, match="record 1: it names peer 0, whom no record admits"):
        write(tmp_path / "ledger", [commit])
    strange = SNAPSHOT.model_copy(update={"peer": 2})
    body = chain()[0].body.model_copy(update={"snapshots": (strange,)})
    commit = Commit(record=encode_record(body), signature=KEY.sign(encode_record(body)))
    with pytest.raises(LedgerCorrupt, match="record 1: it names peer 2, whom no record admits"):
        write(tmp_path / "ledger", [commit])
    for payload, message in ((b"other", "its bytes do not fit"), (b"x" * 101, "101 bytes, at most 100")):
        with pytest.raises(
            LedgerCorrupt, match=f"record 1: its payload {digest_of(LARGE).hex()[:16]}.*{message}"
        ):
            write_ledger(tmp_path / "ledger", record, KEY.sign(record), chain(), lambda _, p=payload: p)
    with pytest.raises(LedgerCorrupt, match="record 0: its signature is not the coordinator's"):
        write_ledger(tmp_path / "ledger", record, OTHER_KEY.sign(record), [], BLOBS.__getitem__)
    assert not list(tmp_path.iterdir())


def test_other_versions_and_missing_files(tmp_path: Path, data: bytes) -> None:
    newer = data[: len(MAGIC)] + (PROTOCOL_VERSION + 1).to_bytes(4, "little") + data[len(MAGIC) + 4 :]
    (tmp_path / "newer").write_bytes(newer)
    with pytest.raises(Incompatible, match=rf"newer: record 0: .* version {PROTOCOL_VERSION + 1}"):
        check(tmp_path / "newer")
    with pytest.raises(Incompatible, match="record 0"):
        write(tmp_path / "newer-record", [], GENESIS.model_copy(update={"protocol": PROTOCOL_VERSION + 1}))
    with pytest.raises(ConfigError, match="No such file"):
        check(tmp_path / "none")
    with pytest.raises(ConfigError, match="cannot be written"):
        write(tmp_path / "no folder" / "ledger", [])
