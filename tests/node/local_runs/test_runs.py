"""`thinwire runs`: states are found and read as they are; what is removed, and what never is."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.local_nodes import DECOUPLED, KEY, config_of
from tests.support.paths import ROOT
from tests.support.records import commit_body
from thinwire.coordinator.blobs import BlobStore
from thinwire.coordinator.control.wire import SOCKET_NAME
from thinwire.coordinator.ledger import Ledger
from thinwire.coordinator.protocol.files import FolderLock
from thinwire.coordinator.protocol.identity import load_or_create, peer_id_of
from thinwire.coordinator.protocol.messages import digest_of
from thinwire.coordinator.state import StateDir
from thinwire.node.cli.main import main
from thinwire.node.cli.runs import described
from thinwire.node.genesis import make_genesis
from thinwire.node.local_runs.cleaning import clean
from thinwire.node.local_runs.finding import LocalRun, local_runs, places
from thinwire.node.tasks.registry import make_task

RUN_ID = "6e5f0647d072e3de"


@pytest.fixture
def states(tmp_path: Path) -> Path:
    """A stopped run of an earlier build, as a coordinator and a node have left it."""
    folder = tmp_path / "states"
    shutil.copytree(ROOT / "tests" / "golden" / "state", folder)
    return folder


def finished_run(folder: Path) -> Path:
    """A coordinator's folder after the last round of a run of one round."""
    folder.mkdir(parents=True)
    config = config_of(DECOUPLED, rounds=1, name="short \x1b[31m run")
    body = make_genesis(config, make_task(config.task, None, None), peer_id_of(KEY.public_key()), 1).body
    ledger = Ledger.create(folder / "ledger.db", body, KEY)
    ledger.admit("a")
    ledger.append(commit_body(parent=ledger.head_digest, admitted=ledger.pending_admissions()), KEY)
    ledger.close()
    return folder


def by_kind(runs: list[LocalRun]) -> dict[str, LocalRun]:
    return {run.kind: run for run in runs}


def files_of(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_states_are_read_as_they_are(states: Path) -> None:
    before = files_of(states)
    runs = by_kind(local_runs([states]))
    assert files_of(states) == before, "looking leaves nothing behind"
    coordinator, node = runs["coordinator"], runs["node"]
    assert (coordinator.run_id, coordinator.name, coordinator.round, coordinator.rounds) == (
        RUN_ID,
        "old state",
        6,
        12,
    )
    assert coordinator.about == "decoupled on text"
    assert coordinator.held_out is not None
    assert (node.run_id, node.round, node.snapshot) == (RUN_ID, 6, 5)
    assert node.name == "old state", "the coordinator's record 0 is on the same machine"
    assert not node.is_running
    assert not node.is_over
    assert node.n_bytes >= sum(p.stat().st_size for p in node.folder.rglob("*") if p.is_file()) // 2
    (alone,) = local_runs([states / "node"])
    assert (alone.name, alone.rounds) == (None, None)
    assert f"run {RUN_ID}, node, round 6" in described(alone, alone.changed_s + 90)
    assert "stopped 1 min 30 s ago" in described(alone, alone.changed_s + 90)


def test_what_cannot_be_read_is_listed_with_its_reason(states: Path) -> None:
    (states / "node" / RUN_ID / "ledger.db").write_bytes(b"no database at all" * 100)
    with closing(sqlite3.connect(states / "coordinator" / "ledger.db")) as db, db:
        db.execute("UPDATE record SET record = x'00' WHERE round = 0")
    runs = by_kind(local_runs([states]))
    assert "not a database" in str(runs["node"].error)
    assert runs["coordinator"].error
    assert "cannot be read" in described(runs["coordinator"], 0.0)


def test_nothing_of_a_stranger_reaches_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run,) = local_runs([finished_run(tmp_path / "c")])
    assert run.is_over
    assert "\x1b" not in described(run, 0.0)
    assert "round 1 of 1" in described(run, 0.0)
    assert main(["status", str(tmp_path / "c")]) == 0
    out = capsys.readouterr().out
    assert "short ?[31m run: round 1/1" in out
    assert "\x1b" not in out


def test_a_running_one_is_seen_and_stays(states: Path, tmp_path: Path) -> None:
    other = states / "node" / ("0" * 16)  # another run of the same node, of earlier
    shutil.copytree(states / "node" / RUN_ID, other)
    os.utime(other / "ledger.db", (1, 1))
    lock = FolderLock(states / "node", "node")
    try:
        runs = local_runs([states])
        assert {run.folder.name: run.is_running for run in runs} == {
            RUN_ID: True,
            other.name: False,
            "coordinator": False,
        }
        removed = clean(runs)
    finally:
        lock.close()
    assert [run.kind for run in removed] == ["coordinator"]
    assert (states / "node" / RUN_ID / "ledger.db").exists()
    assert (other / "ledger.db").exists(), "somebody has the folder: nothing in it is touched"
    assert len(clean(local_runs([states]))) == 2
    assert sorted(p.name for p in (states / "node").iterdir()) == ["identity.key", "lock"]


def test_all_that_a_coordinator_makes_is_known(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "c")
    with StateDir(folder) as state:
        state.token()
        state.ban([peer_id_of(KEY.public_key())])
        state.save_keep("all")
        state.save_port(1)
        state.save_history(b"{}")
        load_or_create(state.key_path)
        BlobStore(state.blobs_path).put(digest_of(b"x"), b"x")
        (folder / SOCKET_NAME).touch()
    assert len(clean(local_runs([folder]))) == 1
    assert not folder.exists()


@pytest.mark.parametrize("given", [".", "link"])
def test_a_running_one_is_seen_by_whatever_name(
    states: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    """What a folder is, and whose lock it has, stands in its own name."""
    (states / "link").symlink_to(states / "node" / RUN_ID)
    monkeypatch.chdir(states / "node" / RUN_ID if given == "." else states)
    lock = FolderLock(states / "node", "node")
    try:
        (run,) = local_runs([Path(given)])
        assert (run.kind, run.is_running) == ("node", True)
        assert clean([run]) == []
    finally:
        lock.close()
    assert len(clean(local_runs([Path(given)]))) == 1
    assert not (states / "node" / RUN_ID).exists()


@pytest.mark.parametrize("name", ["accounts", "0123456789abcdef"])
def test_ledgers_of_other_programs_stay(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    with closing(sqlite3.connect(folder / "ledger.db")) as db, db:
        db.execute("CREATE TABLE booking (amount REAL)")
    for file in ("key", "token", "taxes.ods"):
        (folder / file).write_text("mine")
    before = files_of(tmp_path)
    assert main(["runs", str(tmp_path), "--clean", "--all", "--yes"]) == 0
    err = capsys.readouterr().err
    assert "it may be no run" in err
    assert "nothing to remove" in err
    assert clean(local_runs([tmp_path])) == []
    assert files_of(tmp_path) == before


def test_a_lock_that_leads_elsewhere_is_not_written(states: Path) -> None:
    (states / "letter").write_text("mine")
    (states / "coordinator" / "lock").unlink(missing_ok=True)
    (states / "coordinator" / "lock").symlink_to(states / "letter")
    assert clean(local_runs([states / "coordinator"])) == []
    assert (states / "letter").read_text() == "mine"


def test_other_files_in_a_coordinators_folder_stay(states: Path) -> None:
    (states / "coordinator" / "thesis.tex").write_text("mine")
    for name in ("keep", ".history.json.4711", ".ledger.db.part"):  # the last ones: of one that was killed
        (states / "coordinator" / name).write_text("all")
    (states / "coordinator" / ".mine.4711").write_text("mine")
    assert len(clean(local_runs([states / "coordinator"]))) == 1
    assert [p.name for p in sorted((states / "coordinator").iterdir())] == [".mine.4711", "thesis.tex"]


def test_only_what_is_over_is_removed(states: Path, capsys: pytest.CaptureFixture[str]) -> None:
    over = finished_run(states / "over")
    folder = str(states)
    assert main(["runs", folder, "--clean"]) == 2
    assert "nobody to ask; add --yes" in capsys.readouterr().err
    assert main(["runs", folder, "--all"]) == 2
    assert main(["runs", folder, "--clean", "--yes"]) == 0
    err = capsys.readouterr().err
    assert "2 runs not known to be over: kept" in err
    assert "removed 1 run, " in err
    assert not over.exists()
    assert (states / "coordinator" / "ledger.db").exists()
    assert main(["runs", folder, "--clean", "--all", "--yes", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2
    assert local_runs([states]) == []


def test_where_is_looked_without_being_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    finished_run(tmp_path / "my-coordinator")
    finished_run(tmp_path / "home" / "thinwire" / "a")
    environ = {"XDG_STATE_HOME": str(tmp_path / "home")}
    assert sorted(run.folder.name for run in local_runs(places([], environ))) == ["a", "my-coordinator"]
    assert places([tmp_path / "x"], environ) == [tmp_path / "x"]
    assert main(["runs", str(tmp_path / "none")]) == 2
