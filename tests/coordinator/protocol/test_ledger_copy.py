"""A node's copy of the ledger: verified as it is read, damage cut off by name, never of another run."""

from __future__ import annotations

import gc
import logging
import shutil
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from thinwire.compression.errors import ConfigError, LedgerCorrupt
from thinwire.coordinator.protocol.identity import peer_id_of
from thinwire.coordinator.protocol.ledger_copy import LedgerCopy
from thinwire.coordinator.protocol.messages import Admission, Commit, CommitBody, OfferEntry, encode_record

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
RUN_ID = bytes(range(100, 132))


def chain(n: int, payload: bytes = b"p" * 1000) -> list[Commit]:
    """Rounds 1 to n of a run; peer r - 1 is admitted in round r."""
    commits: list[Commit] = []
    for round_ in range(1, n + 1):
        body = CommitBody(
            round=round_,
            parent=commits[-1].digest if commits else RUN_ID,
            offers=(
                OfferEntry(
                    peer=0, n_samples=1, n_tokens=1, loss=1.0, n_bytes=1000, payload=payload, digest=None
                ),
            ),
            admitted=(Admission(index=round_ - 1, peer_id=f"peer-{round_}"),),
            lr_factor_bits=0,
            reports=(),
            snapshots=(),
            evaluator=None,
            time_ms=1,
        )
        record = encode_record(body)
        commits.append(Commit(record=record, signature=KEY.sign(record)))
    return commits


COMMITS = chain(20)


def opened(path: Path | None, run_id: bytes = RUN_ID) -> LedgerCopy:
    return LedgerCopy(path, run_id, peer_id_of(KEY.public_key()))


def filled(path: Path | None, n: int = 20) -> LedgerCopy:
    copy = opened(path)
    for commit in COMMITS[:n]:
        copy.append(commit)
    return copy


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


def test_a_long_run_does_not_stay_in_memory(path: Path) -> None:
    def decoded() -> int:
        return sum(type(o) is CommitBody for o in gc.get_objects())

    before, copy = decoded(), opened(path)
    for commit in chain(600):
        copy.append(commit)
    del commit
    assert decoded() - before < 300
    assert [c.body.round for c in copy.commits(100, 3)] == [101, 102, 103]


@pytest.mark.parametrize("in_memory", [False, True])
def test_commits_come_back_as_they_were(path: Path, in_memory: bool) -> None:
    copy = filled(None if in_memory else path)
    assert (copy.head_round, copy.head_digest) == (20, COMMITS[-1].digest)
    assert copy.commits(0, 100) == COMMITS
    assert copy.commits(7, 3) == COMMITS[7:10]
    assert copy.commits(19, 5) == COMMITS[19:]
    assert copy.commits(20, 5) == []
    assert copy.digest_at(0) == RUN_ID
    assert copy.digest_at(5) == COMMITS[4].digest
    assert copy.digest_at(21) is None
    assert copy.peers == {i: f"peer-{i + 1}" for i in range(20)}
    copy.close()
    assert copy.commits(0, 5) == []


def test_an_empty_copy_stands_at_record_0() -> None:
    copy = opened(None)
    assert (copy.head_round, copy.head_digest, copy.commits(0, 5)) == (0, RUN_ID, [])


def test_it_goes_on_where_it_ended(path: Path) -> None:
    filled(path, 12).close()
    copy = opened(path)
    assert (copy.head_round, len(copy.peers)) == (12, 12)
    copy.append(COMMITS[12])
    copy.close()
    assert opened(path).commits(0, 100) == COMMITS[:13]


def test_what_does_not_fit_the_chain_is_not_taken(path: Path) -> None:
    copy = filled(path, 5)
    other = chain(6, payload=b"another")
    for wrong in (COMMITS[4], COMMITS[6], other[5], COMMITS[5].model_copy(update={"signature": bytes(64)})):
        with pytest.raises(LedgerCorrupt, match="record 6"):
            copy.append(wrong)
    copy.append(COMMITS[5])
    assert copy.commits(0, 100) == COMMITS[:6]


def test_many_are_taken_together_by_their_parents_and_the_last_one_s_seal(path: Path) -> None:
    copy, other = opened(path), chain(20, payload=b"another")
    unsealed = COMMITS[19].model_copy(update={"signature": bytes(64)})
    for wrong, named in (
        ([*COMMITS[:6], *COMMITS[7:]], "record 7"),
        ([*COMMITS[:6], *other[6:]], "record 7: it does not follow"),
        ([*COMMITS[:6], other[6], *COMMITS[7:]], "record 7: it does not follow"),
        ([*COMMITS[:19], unsealed], "record 20: its signature"),
        ([COMMITS[19]], "record 1"),
    ):
        with pytest.raises(LedgerCorrupt, match=named):
            copy.append(*wrong)
        assert (copy.head_round, copy.commits(0, 100), copy.peers) == (0, [], {})
    copy.append(*COMMITS)
    copy.close()
    assert opened(path).commits(0, 100) == COMMITS


def test_of_the_newest_some_are_in_memory_and_all_are_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thinwire.coordinator.protocol.ledger_copy._RECENT_BYTES", 3 * len(COMMITS[0].record))
    copy = filled(path)
    for after in range(20):
        assert copy.commits(after, 4) == COMMITS[after : after + 4]
    assert copy.commits(19, 1)[0] is COMMITS[19]
    assert copy.commits(0, 1)[0] is not COMMITS[0]
    copy.close()


def test_another_run_s_copy_is_refused_by_name(path: Path) -> None:
    filled(path, 3).close()
    with pytest.raises(ConfigError, match=f"{path} is of run {RUN_ID.hex()[:16]}"):
        opened(path, bytes(32))
    assert opened(path).head_round == 3


@pytest.mark.parametrize("content", [b"not a database at all" * 100, None])
def test_a_file_of_no_run_is_refused_by_name_and_left_alone(path: Path, content: bytes | None) -> None:
    if content is None:
        db = sqlite3.connect(path)
        db.execute("CREATE TABLE record (round INTEGER PRIMARY KEY)")
        db.close()
        content = path.read_bytes()
    else:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=str(path)):
        opened(path)
    assert path.read_bytes() == content


def test_a_folder_that_is_not_there_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent"):
        opened(tmp_path / "absent" / "ledger.db")


def change(statement: str, *values: object) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        db = sqlite3.connect(path)
        with db:
            assert db.execute(statement, values).rowcount == 1
        db.close()

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        change("UPDATE record SET record = record || x'00' WHERE round = 9"),
        change("UPDATE record SET record = x'' WHERE round = 9"),
        change("UPDATE record SET signature = zeroblob(64) WHERE round = 9"),
        change("UPDATE record SET signature = x'01' WHERE round = 9"),
        change("DELETE FROM record WHERE round = 9"),
    ],
)
def test_a_damaged_tail_is_cut_off_and_named(
    path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    filled(path).close()
    damage(path)
    with caplog.at_level(logging.WARNING):
        copy = opened(path)
    assert "record 9 is damaged" in caplog.text
    assert copy.head_round == 8
    assert len(copy.peers) == 8
    for commit in COMMITS[8:]:
        copy.append(commit)
    copy.close()
    caplog.clear()
    assert opened(path).commits(0, 100) == COMMITS
    assert not caplog.text


def test_damaged_pages_cost_what_is_behind_them(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    commits = chain(200)
    copy = opened(path)
    for commit in commits:
        copy.append(commit)
    copy.close()
    data = bytearray(path.read_bytes())
    n_pages = len(data) // 4096
    start = 4096 * (n_pages * 3 // 4)
    data[start : start + 4096] = b"\xff" * 4096
    path.write_bytes(data)
    copy = opened(path)
    assert 0 < copy.head_round < 200
    assert f"record {copy.head_round + 1} is damaged" in caplog.text
    for commit in commits[copy.head_round :]:
        copy.append(commit)
    copy.close()
    assert opened(path).commits(0, 1000) == commits


def test_what_a_crash_leaves_is_a_copy(path: Path, tmp_path: Path) -> None:
    copy = filled(path)
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    for file in tmp_path.glob("ledger.db*"):
        shutil.copy(file, crashed)
    copy.close()
    assert opened(crashed / "ledger.db").commits(0, 100) == COMMITS


def test_a_full_disk_stops_nobody(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    copy = filled(path, 3)
    (n_pages,) = copy._db.execute("PRAGMA page_count").fetchone()
    copy._db.execute(f"PRAGMA max_page_count = {n_pages}")  # as a disk that is full answers
    for commit in COMMITS[3:19]:
        copy.append(commit)
    assert caplog.text.count("takes no more commits") == 1
    assert copy.commits(0, 100) == COMMITS[:19]
    assert copy.commits(1, 5) == COMMITS[1:6]
    assert copy.digest_at(18) == COMMITS[17].digest
    copy._db.execute("PRAGMA max_page_count = 1000000")
    copy.append(COMMITS[19])
    copy.close()
    assert opened(path).commits(0, 100) == COMMITS


def test_one_thread_appends_while_another_reads(path: Path) -> None:
    copy = opened(path)
    writer = threading.Thread(target=lambda: [copy.append(commit) for commit in COMMITS])
    writer.start()
    seen: list[Commit] = []
    while len(seen) < len(COMMITS):
        seen += copy.commits(len(seen), 3)
    writer.join()
    assert seen == COMMITS
