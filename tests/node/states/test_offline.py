"""State folders are read without a server by `export`, `ledger`, `replay` and `status`: such as an earlier
build has written (tests/golden/state), and those that nodes write today."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from thinwire.compression.errors import ConfigError, LedgerCorrupt, ThinwireError
from thinwire.coordinator.ledger import Ledger
from thinwire.coordinator.protocol.files import FolderLock
from thinwire.coordinator.protocol.identity import public_key_of
from thinwire.coordinator.protocol.ledger_copy import COPY_NAME, LedgerCopy
from thinwire.coordinator.protocol.ledger_file import check
from thinwire.node.cli.ledger_command import check_ledger, export_state, save_ledger_of_state
from thinwire.node.cli.main import main
from thinwire.node.cli.replay import replay
from thinwire.node.local_runs.finding import local_runs
from thinwire.node.states.opening import open_state, remains_of, run_folder
from thinwire.node.states.replica import newest_replica

STATE = Path(__file__).parents[2] / "golden" / "state"
HEAD = 6
FINGERPRINTS: list[str] = json.loads((STATE / "expected.json").read_text())["fingerprints"]


@pytest.fixture
def coordinator(tmp_path: Path) -> Path:
    return shutil.copytree(STATE / "coordinator", tmp_path / "coordinator")


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """As a node of today leaves it: with record 0."""
    folder = shutil.copytree(STATE / "node", tmp_path / "node-0")
    with open_state(STATE / "coordinator") as state:
        assert state.record is not None
        assert state.signature is not None
        copy = LedgerCopy(run_folder(folder) / COPY_NAME, state.run_id, state.genesis.coordinator)
        copy.keep_genesis(state.record, state.signature)
        copy.close()
    return folder


@pytest.fixture(params=["coordinator", "node"])
def folder(request: pytest.FixtureRequest, coordinator: Path, node: Path) -> Iterator[Path]:
    """Either kind; nothing in it may change."""
    path = coordinator if request.param == "coordinator" else node
    before = _contents(path)
    yield path
    assert _contents(path) == before


def _contents(folder: Path) -> dict[Path, tuple[int, int]]:
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


@pytest.mark.parametrize(
    ("which", "sql"),
    [
        ("coordinator", "UPDATE record SET record = 99999999999, signature = 'x' WHERE round = 0"),
        ("coordinator", "UPDATE record SET record = -1 WHERE round = 0"),
        ("coordinator", "UPDATE record SET signature = 'text' WHERE round = 0"),
        ("node", "UPDATE run SET run_id = 99999999999"),
        ("node", "UPDATE run SET run_id = 'text'"),
    ],
)
def test_a_file_with_something_else_for_bytes_is_no_ledger(tmp_path: Path, which: str, sql: str) -> None:
    """SQLite takes anything in any column: a number would become as many bytes of memory."""
    folder = run_folder(shutil.copytree(STATE / which, tmp_path / which))
    db = sqlite3.connect(folder / COPY_NAME)
    with db:
        db.execute(sql)
    db.close()
    with pytest.raises(LedgerCorrupt, match="for bytes"), open_state(folder):
        pass
    (found,) = local_runs([folder])
    assert "for bytes" in str(found.error)


def test_losses_that_are_no_numbers_are_left_out(coordinator: Path) -> None:
    db = sqlite3.connect(coordinator / COPY_NAME)
    with db:
        db.execute("DROP TABLE held_out")
        db.execute("CREATE TABLE held_out (round, loss)")
        db.execute("INSERT INTO held_out VALUES (1, 2.5), (2, 'low'), ('x', 1.0), (3, NULL)")
    db.close()
    with open_state(coordinator) as state:
        assert state.held_out() == [(1, 2.5)]


def test_what_is_in_it(folder: Path) -> None:
    with open_state(folder) as state:
        assert state.kind == ("coordinator" if folder.name == "coordinator" else "node")
        assert (state.head, state.is_over) == (HEAD, False)
        assert [c.body.round for c in state.commits()] == list(range(1, HEAD + 1))
        assert [c.body.round for c in state.commits(4)] == [5, 6]


def test_export(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    export_state(folder, tmp_path / "weights", None)
    about = json.loads((tmp_path / "weights" / "config.json").read_text())
    # The node's newest snapshot is of round 5: round 6's payloads are at the coordinator only.
    assert about["round"] == (6 if folder.name == "coordinator" else 5)
    assert about["fingerprint"] == FINGERPRINTS[about["round"] - 1]
    assert ("goes on to round 6" in caplog.text) == (folder.name != "coordinator")
    assert load_file(tmp_path / "weights" / "model.safetensors")


def test_ledger(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_ledger_of_state(folder, tmp_path / "file")
    summary = check(tmp_path / "file")
    assert summary.rounds == HEAD
    assert bool(summary.absent_to) == (folder.name != "coordinator")
    caplog.set_level(logging.INFO)
    check_ledger(folder)
    assert f"{folder} is whole: run " in caplog.text


def test_replay(coordinator: Path, node: Path, tmp_path: Path) -> None:
    replayed = replay(coordinator, output=tmp_path / "end")
    assert replayed is not None
    assert (replayed.rounds, replayed.fingerprint) == (HEAD, FINGERPRINTS[-1])
    export_state(coordinator, tmp_path / "weights", None)
    ours, theirs = load_file(tmp_path / "weights" / "model.safetensors"), load_file(tmp_path / "end")
    assert all(torch.equal(theirs[name], t) for name, t in ours.items())
    with pytest.raises(ConfigError, match=r"not in it.*thinwire export .*node-0.* -o DIR"):
        replay(node)


def test_status(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(folder), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["round"], status["rounds"], status["state"]) == (HEAD, 12, "stopped")
    assert [peer["offers_counted"] for peer in status["peers"]] == [5, 6]
    assert bool(status["held_out"]) == (folder.name == "coordinator")
    assert main(["status", str(folder)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "state folder: nobody was asked" in out
    assert "gone" in out


def test_the_status_of_a_folder_in_use(
    coordinator: Path, node: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever is at the run cannot be asked: it is a node, or its coordinator has no socket."""
    for folder in (coordinator, node, run_folder(node)):
        lock = FolderLock(node if folder != coordinator else folder, "process")
        try:
            assert main(["status", str(folder), "--json"]) == 0
            assert main(["status", str(folder)]) == 0
        finally:
            lock.close()
        first, *shown = capsys.readouterr().out.splitlines()
        status, out = json.loads(first), " ".join(" ".join(shown).split())
        assert (status["state"], {p["state"] for p in status["peers"]}) == ("running", {"unknown"})
        assert f"its {status['kind']} runs; who else is there" in out


def test_without_payloads_and_snapshots_it_says_what_would_do(coordinator: Path, tmp_path: Path) -> None:
    with open_state(coordinator) as state:
        first = next(o.digest for c in state.commits() for o in c.body.offers if o.digest is not None)
        state.blob_path(first).unlink()
    with pytest.raises(ThinwireError, match=r"payloads of round 1 are gone.*thinwire export NODE_STATE"):
        export_state(coordinator, tmp_path / "weights", None)
    assert not (tmp_path / "weights").exists()


def test_the_folder_of_a_running_coordinator(coordinator: Path, tmp_path: Path) -> None:
    with open_state(coordinator) as state:
        key = public_key_of(state.genesis.coordinator)
    ledger = Ledger.open(coordinator / "ledger.db", key)
    ledger.note_held_out(3, 0.25)  # in the log of writes, not in the file yet
    with open_state(coordinator) as state:
        assert (3, 0.25) in state.held_out()
        assert newest_replica(state, None).replica.fingerprint().hex() == FINGERPRINTS[-1]
        ledger.note_held_out(5, 0.5)  # nobody was kept from writing
    ledger.close()


def test_the_folder_of_a_killed_coordinator(coordinator: Path, tmp_path: Path) -> None:
    with open_state(coordinator) as state:
        key = public_key_of(state.genesis.coordinator)
    ledger = Ledger.open(coordinator / "ledger.db", key)
    ledger.note_held_out(3, 0.25)
    killed = shutil.copytree(coordinator, tmp_path / "killed")
    ledger.close()
    with open_state(killed) as state:
        assert (3, 0.25) in state.held_out()
    assert (killed / "ledger.db-wal").stat().st_size > 0


def test_a_node_of_an_earlier_build_has_no_record_0() -> None:
    with open_state(STATE / "node") as state:
        assert state.head == HEAD
        with pytest.raises(ConfigError, match=r"has no record 0.* Use the coordinator's state folder"):
            newest_replica(state, None)


def test_what_is_no_state_folder(tmp_path: Path, node: Path) -> None:
    for path, message in ((tmp_path / "none", "no such folder"), (tmp_path, "neither a ledger nor runs")):
        with pytest.raises(ConfigError, match=message), open_state(path):
            pass
    shutil.copytree(run_folder(node), node / "0123456789abcdef")
    with pytest.raises(ConfigError, match=r"holds 2 runs, name one .*0123456789abcdef"), open_state(node):
        pass


@pytest.mark.parametrize("damage", ["record", "signature", "gap", "no database"])
def test_damage_is_named(coordinator: Path, damage: str) -> None:
    path = coordinator / "ledger.db"
    if damage == "no database":
        path.write_bytes(b"something else" * 1000)
    else:
        with sqlite3.connect(path) as db:
            db.execute(
                {
                    "record": "UPDATE record SET record = x'00' WHERE round = 3",
                    "signature": "UPDATE record SET signature = zeroblob(64) WHERE round = 3",
                    "gap": "DELETE FROM record WHERE round = 3",
                }[damage]
            )
        db.close()
    with pytest.raises(LedgerCorrupt, match="cannot be read" if damage == "no database" else "record 3"):
        check_ledger(coordinator)


def test_what_this_machine_has_of_a_run(tmp_path: Path, node: Path) -> None:
    home = tmp_path / "home" / "thinwire"
    home.mkdir(parents=True)
    environ = {"XDG_STATE_HOME": str(tmp_path / "home")}
    with open_state(node) as state:
        run_id = state.run_id
    assert remains_of(run_id, environ) is None
    node.rename(home / "node-0")
    remains = remains_of(run_id, environ)
    assert remains is not None
    assert (remains.folder.parent, remains.head, remains.is_over) == (home / "node-0", HEAD, False)
    with contextlib.closing(sqlite3.connect(remains.folder / "ledger.db")) as db, db:
        db.execute("DELETE FROM record")  # of a node that has never reached its coordinator
    assert remains_of(run_id, environ) is None


def test_a_wrong_folder_ends_with_a_clear_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    for args in (["export", str(tmp_path), "-o", "x"], ["status", str(tmp_path)], ["replay", str(tmp_path)]):
        assert main(args) == 2
        assert "is no state folder" in capsys.readouterr().err
