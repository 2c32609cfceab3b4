"""The coordinator's state directory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.full_disk import full_disk
from thinwire.compression.errors import ConfigError
from thinwire.coordinator.protocol.identity import new_key, peer_id_of
from thinwire.coordinator.state import StateDir

HOLDER = """
import sys
from pathlib import Path
from thinwire.coordinator.state import StateDir
StateDir(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


def test_one_coordinator_at_a_time(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER + "\n", str(tmp_path / "state")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match=f"process {holder.pid}"):
            StateDir(tmp_path / "state")
    finally:
        holder.kill()
        holder.wait()
        holder.stdin.close()
        holder.stdout.close()
    StateDir(tmp_path / "state").close()


def test_the_lock_is_given_back(tmp_path: Path) -> None:
    with StateDir(tmp_path), pytest.raises(ConfigError, match=f"process {os.getpid()}"):
        StateDir(tmp_path)
    StateDir(tmp_path).close()


def test_what_was_being_written_when_a_process_was_killed_goes(tmp_path: Path) -> None:
    left, others = tmp_path / ".ledger.checkpoint.12345", tmp_path / ".keep-me"
    for path in (left, others):
        path.write_bytes(b"half of it")
    (tmp_path / ".folder.7").mkdir()
    StateDir(tmp_path).close()
    assert not left.exists()
    assert others.exists()


def test_the_token_is_made_once_and_private(tmp_path: Path) -> None:
    with StateDir(tmp_path) as state:
        token = state.token()
        assert len(token) >= 32
        assert state.token() == token
    with StateDir(tmp_path) as state:
        assert state.token() == token
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    with StateDir(tmp_path) as state, full_disk():
        with pytest.raises(OSError, match="token"):
            state.rotate_token()
        assert state.token() == token
    with StateDir(tmp_path) as state:
        state.rotate_token()
        assert state.token() != token


def test_bans_are_kept_and_checked(tmp_path: Path) -> None:
    first, second = (peer_id_of(new_key().public_key()) for _ in range(2))
    with StateDir(tmp_path) as state:
        assert state.banned() == frozenset()
        state.ban([first])
    with StateDir(tmp_path) as state:
        with pytest.raises(ConfigError, match="not the peer id"):
            state.ban([second, "somebody"])
        assert state.banned() == {first}
        state.ban([second, first])
        assert state.banned() == {first, second}


def test_the_port_is_kept(tmp_path: Path) -> None:
    with StateDir(tmp_path) as state:
        assert state.port() is None
        state.save_port(4001)
        assert state.port() == 4001
        (tmp_path / "port").write_text("what?")
        with pytest.raises(ConfigError, match="port number"):
            state.port()
