"""Where a node keeps its state: one node per folder, found again after a restart."""

from __future__ import annotations

from pathlib import Path

import pytest

from thinwire.compression.errors import ConfigError
from thinwire.coordinator.protocol.identity import load_or_create
from thinwire.coordinator.state import StateDir
from thinwire.node.system.folder import IDENTITY_NAME, NodeFolder, folder_of_run


def test_every_node_finds_a_folder_of_its_own_and_again(tmp_path: Path) -> None:
    environ = {"XDG_STATE_HOME": str(tmp_path)}
    first, second = NodeFolder(None, environ), NodeFolder(None, environ)
    assert first.path == tmp_path / "thinwire" / "node-0"
    assert second.path == tmp_path / "thinwire" / "node-1"
    first.close()
    assert NodeFolder(None, environ).path == first.path
    assert first.path.stat().st_mode & 0o777 == 0o700


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    folder = NodeFolder(tmp_path / "state")
    with pytest.raises(ConfigError, match="in use by another node, process"):
        NodeFolder(tmp_path / "state")
    folder.close()
    NodeFolder(tmp_path / "state").close()


def test_a_node_takes_no_coordinators_folder_nor_the_other_way_round(tmp_path: Path) -> None:
    with StateDir(tmp_path / "coordinator") as state:
        load_or_create(state.key_path)
    with pytest.raises(ConfigError, match="is a coordinator's state folder: name another"):
        NodeFolder(tmp_path / "coordinator")
    NodeFolder(tmp_path / "node").close()
    load_or_create(tmp_path / "node" / IDENTITY_NAME)
    with pytest.raises(ConfigError, match="is a node's state folder"):
        StateDir(tmp_path / "node")
    load_or_create(tmp_path / "node" / "key")  # an earlier thinwire let both be in one
    StateDir(tmp_path / "node").close()
    NodeFolder(tmp_path / "node").close()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, environ in ((tmp_path / "file" / "x", {}), (None, {"XDG_STATE_HOME": str(tmp_path / "file")})):
        with pytest.raises(ConfigError, match=str(tmp_path / "file")):
            NodeFolder(path, environ)


def test_a_coordinators_folder_is_the_users_unless_an_earlier_one_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    environ = {"XDG_STATE_HOME": str(tmp_path / "home")}
    default = tmp_path / "home" / "thinwire"
    assert folder_of_run("gpt", "coordinator", environ) == default / "gpt-coordinator"
    assert folder_of_run("../gpt", "ray", environ) == default / "..-gpt-ray"
    (tmp_path / "gpt-coordinator").mkdir()
    assert folder_of_run("gpt", "coordinator", environ) == default / "gpt-coordinator"
    (tmp_path / "gpt-coordinator" / "ledger.db").touch()
    with caplog.at_level("INFO"):
        assert folder_of_run("gpt", "coordinator", environ) == Path("gpt-coordinator")
    assert f"going on in {tmp_path / 'gpt-coordinator'}, where an earlier thinwire kept" in caplog.text
