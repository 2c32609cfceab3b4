"""The ledger on disk: a chain that is verified, named where it is broken, and durable."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from thinwire.compression.errors import ConfigError, Incompatible, LedgerCorrupt
from thinwire.coordinator.entry import admitted as admitted_module
from thinwire.coordinator.ledger import Ledger
from thinwire.coordinator.protocol.chain import Chain
from thinwire.coordinator.protocol.identity import peer_id_of
from thinwire.coordinator.protocol.messages import (
    Admission,
    BadMessage,
    Commit,
    CommitBody,
    GenesisBody,
    OfferEntry,
    digest_of,
    encode_record,
)

MakeGenesis = Callable[..., GenesisBody]


def body(ledger: Ledger, peers: tuple[int, ...] = (0,)) -> CommitBody:
    """The next commit, with everything in it that can be."""
    offers = tuple(
        OfferEntry(
            peer=peer,
            n_samples=4,
            n_tokens=8,
            loss=1.25,
            n_bytes=3,
            payload=bytes([peer] * 3),
            digest=None,
        )
        for peer in peers
    )
    return CommitBody(
        round=ledger.head_round + 1,
        parent=ledger.head_digest,
        offers=offers,
        admitted=ledger.pending_admissions(),
        lr_factor_bits=5,
        reports=(),
        snapshots=(),
        evaluator=None,
        time_ms=7,
    )


@pytest.fixture
def path(tmp_path: Path, make_genesis: MakeGenesis, key: Ed25519PrivateKey) -> Path:
    """A ledger with five commits, closed."""
    path = tmp_path / "ledger.db"
    ledger = Ledger.create(path, make_genesis(), key)
    for peer_id in ("a", "b"):
        ledger.admit(peer_id)
    for _ in range(5):
        ledger.append(body(ledger, (0, 1)), key)
    ledger.close()
    return path


def test_a_new_ledger_holds_record_0(
    tmp_path: Path, make_genesis: MakeGenesis, key: Ed25519PrivateKey
) -> None:
    genesis = make_genesis()
    ledger = Ledger.create(tmp_path / "l.db", genesis, key)
    assert ledger.genesis == genesis
    assert ledger.run_id == digest_of(ledger.genesis_record) == ledger.head_digest
    assert ledger.head_round == 0
    assert ledger.commits(0, 10) == []
    ledger.close()
    with pytest.raises(ConfigError, match="holds a run already"):
        Ledger.create(tmp_path / "l.db", genesis, key)
    with pytest.raises(ConfigError, match="there is no ledger"):
        Ledger.open(tmp_path / "other.db", key.public_key())


def test_commits_are_a_signed_chain(path: Path, key: Ed25519PrivateKey) -> None:
    ledger = Ledger.open(path, key.public_key())
    chain = Chain(ledger.run_id, peer_id_of(key.public_key()))
    for commit in ledger.commits(0, 100):
        chain.check(commit)
    assert (chain.round, chain.digest) == (5, ledger.head_digest) == (ledger.head_round, ledger.digest_at(5))
    assert [c.body.round for c in ledger.commits(2, 2)] == [3, 4]
    assert list(ledger.all_commits()) == ledger.commits(0, 100)
    assert ledger.digest_at(6) is None
    ledger.close()


def test_a_chain_refuses_what_does_not_follow(path: Path, key: Ed25519PrivateKey) -> None:
    ledger = Ledger.open(path, key.public_key())
    first, second = ledger.commits(0, 2)
    chain = Chain(ledger.run_id, peer_id_of(key.public_key()))
    with pytest.raises(LedgerCorrupt, match="record 1: it says that it is round 2"):
        chain.check(second)
    with pytest.raises(LedgerCorrupt, match="record 1: its signature"):
        chain.check(first.model_copy(update={"signature": bytes(64)}))
    with pytest.raises(LedgerCorrupt, match="record 1: it does not follow record 0"):
        Chain(bytes(32), peer_id_of(key.public_key())).check(first)
    with pytest.raises(LedgerCorrupt, match="record 1: its signature"):
        Chain(ledger.run_id, peer_id_of(Ed25519PrivateKey.generate().public_key())).check(first)
    chain.check(first)
    chain.check(second)
    from_snapshot = Chain(ledger.run_id, peer_id_of(key.public_key()), 1)
    from_snapshot.check(second)
    assert from_snapshot.digest == second.digest
    ledger.close()


def test_append_refuses_another_round_or_parent(path: Path, key: Ed25519PrivateKey) -> None:
    ledger = Ledger.open(path, key.public_key())
    wrong = body(ledger).model_copy(update={"round": 9})
    with pytest.raises(ValueError, match="does not follow"):
        ledger.append(wrong, key)
    assert ledger.head_round == 5
    ledger.close()


def flip(path: Path, column: str, round_: int, at: int) -> None:
    db = sqlite3.connect(path)
    (value,) = db.execute(f"SELECT {column} FROM record WHERE round = ?", (round_,)).fetchone()
    changed = bytearray(value)
    changed[at % len(changed)] ^= 0x41
    with db:
        db.execute(f"UPDATE record SET {column} = ? WHERE round = ?", (bytes(changed), round_))
    db.close()


@pytest.mark.parametrize("round_", [0, 1, 3, 5])
@pytest.mark.parametrize("column", ["record", "signature", "digest"])
def test_a_changed_byte_names_its_record(
    path: Path, key: Ed25519PrivateKey, column: str, round_: int
) -> None:
    whole = path.read_bytes()
    for at in (0, 1, 13, 31, 40, 63, 77, 140, 201):
        path.write_bytes(whole)
        flip(path, column, round_, at)
        with pytest.raises(LedgerCorrupt, match=f"record {round_}:") as caught:
            Ledger.open(path, key.public_key())
        assert "Restore the state directory from a copy" in str(caught.value)


def test_the_repair_that_is_named_works(path: Path, key: Ed25519PrivateKey) -> None:
    flip(path, "record", 4, 20)
    with pytest.raises(LedgerCorrupt, match="DELETE FROM record WHERE round >= 4"):
        Ledger.open(path, key.public_key())
    db = sqlite3.connect(path)
    with db:
        db.execute("DELETE FROM record WHERE round >= 4")
    db.close()
    ledger = Ledger.open(path, key.public_key())
    assert ledger.head_round == 3
    ledger.append(body(ledger), key)
    ledger.close()


def test_a_missing_record_is_named(path: Path, key: Ed25519PrivateKey) -> None:
    db = sqlite3.connect(path)
    with db:
        db.execute("DELETE FROM record WHERE round = 3")
    db.close()
    with pytest.raises(LedgerCorrupt, match="record 3 is missing, record 4 is there"):
        Ledger.open(path, key.public_key())


def test_admissions_must_agree_with_the_records(path: Path, key: Ed25519PrivateKey) -> None:
    db = sqlite3.connect(path)
    with db:
        db.execute("UPDATE admission SET peer_id = 'mallory' WHERE idx = 1")
    db.close()
    with pytest.raises(LedgerCorrupt, match="record 1: it admits b as peer 1"):
        Ledger.open(path, key.public_key())


def test_another_key_cannot_open_it(path: Path) -> None:
    with pytest.raises(LedgerCorrupt, match="record 0: its signature is not this coordinator's"):
        Ledger.open(path, Ed25519PrivateKey.generate().public_key())


def test_damage_anywhere_in_the_file_is_found_or_harmless(path: Path, key: Ed25519PrivateKey) -> None:
    """Any byte of the file: either the ledger reads as before, or it is LedgerCorrupt."""
    whole = path.read_bytes()
    ledger = Ledger.open(path, key.public_key())
    before = (ledger.genesis_record, ledger.commits(0, 100), ledger.peers())
    ledger.close()
    found = 0
    for at in range(0, len(whole), 61):
        changed = bytearray(whole)
        changed[at] ^= 0x3C
        for leftover in path.parent.glob("ledger.db-*"):
            leftover.unlink()
        path.write_bytes(changed)
        try:
            ledger = Ledger.open(path, key.public_key())
        except LedgerCorrupt:
            found += 1
            continue
        assert (ledger.genesis_record, ledger.commits(0, 100), ledger.peers()) == before
        ledger.close()
    assert found > 20


def test_a_file_that_is_no_database_is_corrupt(tmp_path: Path, key: Ed25519PrivateKey) -> None:
    path = tmp_path / "ledger.db"
    path.write_bytes(b"this is not a ledger" * 100)
    with pytest.raises(LedgerCorrupt, match="cannot be read"):
        Ledger.open(path, key.public_key())


def test_admissions_survive_a_restart_before_their_first_commit(path: Path, key: Ed25519PrivateKey) -> None:
    ledger = Ledger.open(path, key.public_key())
    assert ledger.admit("late") == 2
    assert ledger.admit("a") == 0
    ledger.close()
    ledger = Ledger.open(path, key.public_key())
    assert ledger.index_of("late") == ledger.admit("late") == 2
    assert [(a.index, a.peer_id) for a in ledger.pending_admissions()] == [(2, "late")]
    commit = ledger.append(body(ledger), key)
    assert [a.peer_id for a in commit.body.admitted] == ["late"]
    assert ledger.pending_admissions() == ()
    assert ledger.admit("next") == 3
    ledger.close()


def test_admissions_between_two_commits_are_bounded(
    path: Path, key: Ed25519PrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admitted_module, "MAX_PEERS", 3)
    ledger = Ledger.open(path, key.public_key())
    for name in "xyz":
        ledger.admit(name)
    with pytest.raises(Incompatible, match="full"):
        ledger.admit("one more")
    ledger.append(body(ledger), key)
    assert ledger.admit("one more") == 5
    ledger.close()


def test_held_out_losses_are_kept(path: Path, key: Ed25519PrivateKey) -> None:
    ledger = Ledger.open(path, key.public_key())
    ledger.note_held_out(3, 2.5)
    ledger.note_held_out(0, 5.5)
    ledger.note_held_out(3, 9.9)
    ledger.close()
    ledger = Ledger.open(path, key.public_key())
    assert ledger.held_out() == [(0, 5.5), (3, 2.5)]
    for round_ in range(1, 12):
        ledger.note_held_out(round_, 2.5)
    thinned = [round_ for round_, _ in ledger.held_out(most=4)]
    assert (thinned, len(ledger.held_out(12)), len(ledger.held_out(13))) == ([0, 3, 7, 11], 12, 12)
    ledger.close()


# ----------------------------------------------------------------------------------------- lost commits


@pytest.fixture
def copy(path: Path) -> Path:
    """The ledger as it was before three more commits, two of which admit a peer each."""
    copy = path.with_name("copy.db")
    shutil.copy(path, copy)
    return copy


@pytest.fixture
def lost(path: Path, key: Ed25519PrivateKey, copy: Path) -> list[Commit]:
    ledger = Ledger.open(path, key.public_key())
    for name in ("c", "d", None):
        if name is not None:
            ledger.admit(name)
        ledger.append(body(ledger), key)
    commits = ledger.commits(5, 10)
    ledger.close()
    return commits


def test_lost_commits_are_adopted(path: Path, copy: Path, lost: list[Commit], key: Ed25519PrivateKey) -> None:
    ledger = Ledger.open(copy, key.public_key())
    ledger.admit("x")  # takes the place that the lost commits gave to c
    ledger.admit("d")
    ledger.adopt(lost[:2])
    assert ledger.peers() == {0: "a", 1: "b", 2: "c", 3: "d"}
    assert ledger.index_of("x") is None
    assert ledger.pending_admissions() == ()
    ledger.adopt(lost[2:])
    ledger.close()
    whole, restored = (Ledger.open(p, key.public_key()) for p in (path, copy))
    assert restored.commits(0, 100) == whole.commits(0, 100)
    assert (restored.head_round, restored.head_digest) == (whole.head_round, whole.head_digest)
    assert restored.peers() == whole.peers()
    assert restored.admit("x") == 4
    assert [a.peer_id for a in restored.append(body(restored), key).body.admitted] == ["x"]
    for ledger in (whole, restored):
        ledger.close()


def test_of_what_cannot_be_adopted_nothing_is(copy: Path, lost: list[Commit], key: Ed25519PrivateKey) -> None:
    ledger = Ledger.open(copy, key.public_key())
    ledger.admit("x")
    forger = Ed25519PrivateKey.generate()
    forged = lost[1].model_copy(update={"signature": forger.sign(lost[1].record)})
    cut = lost[1].model_copy(update={"record": lost[1].record[:-1]})
    unreadable = Commit(record=b"no commit", signature=key.sign(b"no commit"))
    head = ledger.head_digest
    for wrong, text in (
        ([lost[0], forged], "record 7: its signature"),
        ([lost[0], cut], "record 7: it is no commit"),
        ([lost[0], unreadable], "record 7: it is no commit"),
        (lost[1:], "record 6: it says that it is round 7"),
        ([lost[0], lost[0]], "record 7: it says that it is round 6"),
    ):
        with pytest.raises(BadMessage, match=text):
            ledger.adopt(wrong)
        assert (ledger.head_round, ledger.head_digest, ledger.digest_at(6)) == (5, head, None)
        assert ledger.peers() == {0: "a", 1: "b", 2: "x"}
    ledger.append(body(ledger), key)
    with pytest.raises(LedgerCorrupt, match=r"round 7 of the node follows another round 6.*restore"):
        ledger.adopt(lost[1:])
    ledger.close()
    ledger = Ledger.open(copy, key.public_key())
    assert ledger.head_round == 6
    ledger.close()


def test_an_adopted_admission_must_be_the_next(copy: Path, key: Ed25519PrivateKey) -> None:
    ledger = Ledger.open(copy, key.public_key())
    for index, peer_id in ((3, "c"), (1, "c"), (2, "a")):
        wrong = body(ledger).model_copy(update={"admitted": (Admission(index=index, peer_id=peer_id),)})
        record = encode_record(wrong)
        with pytest.raises(LedgerCorrupt, match=f"record 6: it admits {peer_id} as peer {index}"):
            ledger.adopt([Commit(record=record, signature=key.sign(record))])
        assert (ledger.head_round, ledger.peers()) == (5, {0: "a", 1: "b"})
    ledger.close()


APPENDER = """
import sys
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from thinwire.coordinator.ledger import Ledger
from thinwire.coordinator.protocol.messages import CommitBody, OfferEntry

key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
ledger = Ledger.open(Path(sys.argv[1]), key.public_key())
while True:
    ledger.admit(f"peer {ledger.head_round}")
    offer = OfferEntry(
        peer=0, n_samples=1, n_tokens=1, loss=1.0, n_bytes=900, payload=bytes(900), digest=None
    )
    commit = ledger.append(CommitBody(
        round=ledger.head_round + 1, parent=ledger.head_digest, offers=(offer,),
        admitted=ledger.pending_admissions(), lr_factor_bits=0, reports=(), snapshots=(),
        evaluator=None, time_ms=0,
    ), key)
    print(commit.digest.hex(), flush=True)
"""


@pytest.mark.parametrize("n_seen", [1, 17, 60])
def test_what_was_shown_survives_a_kill(path: Path, key: Ed25519PrivateKey, n_seen: int) -> None:
    """SIGKILL while it appends: every commit that was shown is there, and the chain goes on."""
    process = subprocess.Popen([sys.executable, "-c", APPENDER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    shown = [process.stdout.readline().strip() for _ in range(n_seen)]
    process.send_signal(signal.SIGKILL)
    shown += process.stdout.read().split()
    process.wait()
    process.stdout.close()
    ledger = Ledger.open(path, key.public_key())
    digests = [commit.digest.hex() for commit in ledger.commits(5, 10_000)]
    assert len(shown) >= n_seen
    assert digests[: len(shown)] == shown
    assert len(digests) <= len(shown) + 1
    ledger.append(body(ledger), key)
    ledger.close()
