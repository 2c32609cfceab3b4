"""Ledger files of runs that a committee orders: their seals, what is told of it, which version they are."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.committee import RECOVERY_KEY, SEATS, Sealing, entry, raw_public
from thinwire.compression.errors import Incompatible, LedgerCorrupt
from thinwire.coordinator.protocol.figures import short
from thinwire.coordinator.protocol.identity import peer_id_of
from thinwire.coordinator.protocol.ledger_file import MAGIC, LedgerFile, check, write_ledger
from thinwire.coordinator.protocol.messages import (
    AccessEntry,
    Admission,
    Change,
    GenesisBody,
    Reseated,
    digest_of,
)
from thinwire.coordinator.protocol.trust.signed_offers import signed_bytes

A, B, C, D, E = map(short, SEATS[:5])
PEER = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
ACCESS = AccessEntry(token=bytes(32), mode="open", banned=(), listed=())


@pytest.fixture
def genesis(make_genesis: Callable[..., GenesisBody]) -> GenesisBody:
    return make_genesis().model_copy(
        update={"coordinator": SEATS[0], "recovery": digest_of(raw_public(RECOVERY_KEY))}
    )


@pytest.fixture
def run(genesis: GenesisBody) -> Sealing:
    """Of every kind of record one."""
    run = Sealing(genesis)
    admitted = (Admission(index=0, peer_id="a peer"),)
    run.add(run.body(admitted=admitted))
    run.add(run.governing(committee=entry([0, 1, 2]), access=ACCESS))
    run.add(run.body(changes=(Change(key="run.rounds", value=99),)), voters=SEATS[1:3])
    run.add(run.governing(reseat=(Reseated(seat=SEATS[1], nonce=bytes(16)),)))
    banned = ACCESS.model_copy(update={"token": digest_of(b"new"), "mode": "invited", "banned": ("x",)})
    run.add(run.governing(access=banned), voters=SEATS[:3])
    run.recover(entry([2, 3]))
    run.add(run.body(committee=entry([0, 1, 2, 3, 4])))
    run.add(run.governing(committee=entry([4])), voters=(SEATS[1], SEATS[3], SEATS[4]))
    run.add(run.body())
    return run


def write(path: Path, run: Sealing) -> bytes:
    commits = [sealed.commit for sealed in run.sealed]
    write_ledger(path, run.genesis_record, run.genesis_signature, commits, lambda _: None)
    return path.read_bytes()


def read(data: bytes) -> None:
    for _ in LedgerFile(BytesIO(data)).commits():
        pass


def test_what_it_tells(tmp_path: Path, run: Sealing) -> None:
    write(tmp_path / "ledger", run)
    summary = check(tmp_path / "ledger")
    assert (summary.rounds, summary.run_id) == (9, run.run_id)
    assert list(summary.changes) == [
        f"round 2: the committee is now {A}, {B}, {C}; 2 of 3 must sign (signed by {A})",
        f"round 2: entry is open (signed by {A})",
        "round 3: run.rounds 10 -> 99",
        f"round 4: {B} votes again: it had lost its votes (sealed by {A}, {B})",
        f"round 5: entry is invited, 1 peer banned, the token is a new one (sealed by {A}, {B}, {C})",
        f"round 6: the committee is now {C}, {D}; 2 of 2 must sign (signed with the recovery key)",
        f"round 7: the committee is now {A}, {B}, {C}, {D}, {E}; 3 of 5 must sign (sealed by {C}, {D})",
        f"round 8: the committee is now {E} (sealed by {B}, {D}, {E})",
    ]
    with (tmp_path / "ledger").open("rb") as file:
        assert list(LedgerFile(file).commits()) == [sealed.commit for sealed in run.sealed]


def test_every_altered_bit_and_every_end_is_noticed(tmp_path: Path, genesis: GenesisBody) -> None:
    run = Sealing(genesis)
    run.add(run.governing(committee=entry([0, 1, 2])))
    run.add(run.body(admitted=(Admission(index=0, peer_id="a peer"),)))
    data = write(tmp_path / "ledger", run)
    read(data)
    for i in range(len(MAGIC) + 4 + 9 + 64 + len(run.genesis_record), len(data)):
        altered = bytearray(data)
        altered[i] ^= 1 << i % 8
        with pytest.raises((LedgerCorrupt, Incompatible), match=r"^record \d"):
            read(bytes(altered))
        with pytest.raises(LedgerCorrupt, match=r"^record \d"):
            read(data[:i])


@given(st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_mixed_up_file_is_refused(run: Sealing, tmp_path: Path, data: st.DataObject) -> None:
    """Items left out, doubled, moved, of other lengths; bytes changed between them."""
    if not _GOOD:
        _GOOD.append(write(tmp_path / "good", run))
    whole = bytearray(_GOOD[0])
    match data.draw(st.sampled_from(["swap", "length", "junk", "drop", "double"])):
        case "length":
            at = data.draw(st.sampled_from(items(whole)))
            whole[at + 1 : at + 9] = data.draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
        case "junk":
            at = data.draw(st.integers(20, len(whole)))
            whole[at:at] = data.draw(st.binary(min_size=1, max_size=100))
        case how:
            places = [*items(whole), len(whole)]
            parts = [bytes(whole[a:b]) for a, b in pairwise(places)]
            i, j = (data.draw(st.integers(1, len(parts) - 2)) for _ in range(2))
            if how == "swap":
                parts[i], parts[j] = parts[j], parts[i]
            else:
                parts[i : i + 1] = [] if how == "drop" else [parts[i], parts[i]]
            whole[20:] = b"".join(parts)
    if whole != _GOOD[0]:
        with pytest.raises((LedgerCorrupt, Incompatible), match=r"^record \d"):
            read(bytes(whole))


_GOOD: list[bytes] = []


def items(data: bytes) -> list[int]:
    """Offsets of all items."""
    offsets = [len(MAGIC) + 4]
    while (end := offsets[-1] + 9 + int.from_bytes(data[offsets[-1] + 1 : offsets[-1] + 9], "little")) < len(
        data
    ):
        offsets.append(end)
    return offsets


def item_of(seal: bytes, record: bytes, n: int | None = None) -> bytes:
    body = (len(seal) if n is None else n).to_bytes(2, "little") + seal + record
    return b"S" + len(body).to_bytes(8, "little") + body


def test_a_seal_has_one_form(tmp_path: Path, genesis: GenesisBody) -> None:
    run = Sealing(genesis)
    only = run.add(run.governing(committee=entry([0, 1, 2])))
    data = write(tmp_path / "ledger", run)
    as_commit = b"C" + (64 + len(only.record)).to_bytes(8, "little") + only.seal + only.record
    for item, text in (
        (item_of(only.seal, only.record), "record 1: a seal of 64 bytes is none"),
        (item_of(b"", only.seal + only.record), "record 1: a seal of 0 bytes is none"),
        (item_of(only.seal, only.record, 464), "record 1: a seal of 464 bytes is none"),
        (item_of(only.seal, b"", 65), "record 1: a seal of 65 bytes is none"),
        (item_of(only.seal + b"x", only.record), "record 1: its signature is not the coordinator's"),
        (item_of(b"", b""), "record 1: it is too short"),
    ):
        assert data.count(as_commit) == 1
        with pytest.raises(LedgerCorrupt, match=text):
            read(data.replace(as_commit, item))


@pytest.mark.parametrize("began", [2, 3])
def test_a_run_that_began_before_there_were_committees(
    tmp_path: Path, make_genesis: Callable[..., GenesisBody], began: int
) -> None:
    """Its file is as it always was up to the first record that earlier builds do not know."""
    run = Sealing(make_genesis().model_copy(update={"coordinator": SEATS[0], "protocol": began}))
    key = digest_of(raw_public(RECOVERY_KEY))
    run.add(run.body(admitted=(Admission(index=0, peer_id="a peer"),)))
    before = write(tmp_path / "before", run)
    assert before.startswith(MAGIC + began.to_bytes(4, "little"))
    with pytest.raises(LedgerCorrupt, match=f"record 0: of protocol {began}, in a file of 4"):
        read(MAGIC + (4).to_bytes(4, "little") + before[20:])
    run.add(run.governing(access=ACCESS))
    alone = write(tmp_path / "alone", run)
    run.add(run.governing(committee=entry([0, 1, 2], recovery=key)))
    run.add(run.body())
    run.recover(entry([1]))
    after = write(tmp_path / "after", run)
    for data, first in ((alone, 2), (after, 2)):
        assert data.startswith(MAGIC + (4).to_bytes(4, "little"))
        n_same = len(before) - 9 - 36
        assert data[20:n_same] == before[20:n_same]
        with pytest.raises(LedgerCorrupt, match=f"record {first}: it is of protocol 4, in a file of {began}"):
            read(MAGIC + began.to_bytes(4, "little") + data[20:])
    assert check(tmp_path / "after").changes[1:] == (
        f"round 3: the committee is now {A}, {B}, {C}; 2 of 3 must sign; the run has a recovery key now "
        f"(signed by {A})",
        f"round 5: the committee is now {B} (signed with the recovery key)",
    )
    with pytest.raises(LedgerCorrupt, match=f"record 0: of protocol {began}, in a file of {5 - began}"):
        read(MAGIC + (5 - began).to_bytes(4, "little") + before[20:])


def test_signatures_of_offers_stand_beside_sealed_records(tmp_path: Path, genesis: GenesisBody) -> None:
    run = Sealing(genesis)
    run.add(run.governing(committee=entry([0, 1, 2])))
    plain = run.body(admitted=(Admission(index=0, peer_id=peer_id_of(PEER.public_key())),))
    work = PEER.sign(signed_bytes(run.run_id, 2, plain.offers[0]))
    run.add(plain.model_copy(update={"work": digest_of(work)}), work=work)
    commits = [sealed.commit for sealed in run.sealed]
    summary = write_ledger(
        tmp_path / "ledger", run.genesis_record, run.genesis_signature, commits, lambda _: work
    )
    assert (summary.unsigned, summary.n_blobs) == ((), 1)
