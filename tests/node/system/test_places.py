"""What a command is to write, and where it is to listen, is checked before it starts."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

from thinwire.compression.errors import ConfigError
from thinwire.coordinator.protocol.addresses import HttpAddress, require_free
from thinwire.coordinator.protocol.files import FolderLock
from thinwire.coordinator.protocol.identity import new_key, peer_id_of
from thinwire.coordinator.protocol.ticket import Ticket
from thinwire.node.cli.main import main
from thinwire.node.system.places import (
    refuse_address,
    refuse_below,
    refuse_file,
    refuse_folder,
    refuse_http,
)
from thinwire.node.system.processes import Children


def test_a_file_needs_a_folder_in_which_one_may_write(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("")
    for path, why in {
        tmp_path: "that is a folder",
        tmp_path / "no" / "file": "is not there; make it first: mkdir -p",
        tmp_path / "text" / "file": "is a file, not a folder",
        Path("/proc/thinwire"): "nothing can be written in /proc",
    }.items():
        with pytest.raises(ConfigError, match=why) as found:
            refuse_file("--save", path)
        assert str(found.value).startswith(f"--save {path}: ")
    refuse_file("--save", tmp_path / "file")
    refuse_file("--save", None)
    assert os.listdir(tmp_path) == ["text"]


def test_a_folder_may_be_made_below_one_that_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("")
    for path in (tmp_path / "text", tmp_path / "text" / "deeper", Path("/proc/thinwire/state")):
        with pytest.raises(ConfigError, match=f"--state {path}: "):
            refuse_folder("--state", path)
    refuse_folder("--state", tmp_path / "a" / "b")
    assert os.listdir(tmp_path) == ["text"]


def test_addresses_that_are_taken_or_nobody_could_reach() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} is taken .* another with --port"):
            refuse_address("127.0.0.1", port, ())
        with pytest.raises(ConfigError, match=f"port {port} is taken .* another with --http"):
            refuse_http(HttpAddress("localhost", port))
    for host in ("nowhere", "192.0.2.1"):
        with pytest.raises(ConfigError, match=r"no name or address of this machine|cannot listen on"):
            refuse_http(HttpAddress(host, 9))
    refuse_http(HttpAddress("localhost", 0))
    for text in ("no-such-host", "/ip4/here/tcp/1", "/ip4/::1/tcp/1", "/ip4/1.2.3.4", "/memory/1/tcp/2"):
        with pytest.raises(ConfigError, match=f"--announce {text}"):
            refuse_address("127.0.0.1", 0, (text,))
    refuse_address("127.0.0.1", 0, ("localhost:1", "/ip6/::1/tcp/1", "192.0.2.7"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may listen on any port")
def test_a_port_of_the_system() -> None:
    with pytest.raises(ConfigError, match="not for this user"):
        require_free("127.0.0.1", 1)


def test_numbers_have_a_range_and_a_hint() -> None:
    refuse_below("--patience-s", 0.0, 0, "seconds")
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"--patience-s .*: a number from 0 on is needed; seconds"):
            refuse_below("--patience-s", value, 0, "seconds, e.g. 9")


TICKET = Ticket(
    peer_id=peer_id_of(new_key().public_key()),
    addresses=("/ip4/192.0.2.1/tcp/1",),
    run_id=bytes(32),
    token="t",
).line()
RUN = "[run]\nname = 'places'\n[task]\ncorpus = 'pydoc'\n"


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("coordinator RUN --ticket-file no/ticket", "--ticket-file no/ticket: the folder"),
        ("coordinator RUN --state RUN", "--state .*/run.toml: .* is a file where a folder is meant"),
        ("coordinator RUN --host 127.0.0.1 --port TAKEN", "port TAKEN is taken on 127.0.0.1"),
        ("coordinator RUN --http 127.0.0.1:TAKEN", "port TAKEN is taken .* another with --http"),
        ("coordinator RUN --announce no-such-host", "--announce no-such-host: this machine knows no"),
        ("join TICKET --save no/weights", "--save no/weights: the folder"),
        ("join TICKET --save .", "--save .: that is a folder"),
        ("join TICKET --state RUN", "--state .*/run.toml: .* is a file where a folder is meant"),
        ("join TICKET --host 127.0.0.1 --port TAKEN", "port TAKEN is taken on 127.0.0.1"),
        ("join TICKET --http 127.0.0.1:TAKEN", "port TAKEN is taken .* another with --http"),
        ("join TICKET --announce no-such-host", "--announce no-such-host: this machine knows no"),
        ("join TICKET --patience-s -1", "--patience-s -1: a number from 0 on is needed; seconds"),
        ("demo --http 127.0.0.1:TAKEN", "port TAKEN is taken"),
        ("ledger TICKET -o no/ledger", "-o no/ledger: the folder"),
        ("export TICKET -o RUN", "-o .*/run.toml: .* is a file where a folder is meant"),
        ("replay RUN -o no/weights", "-o no/weights: the folder"),
        ("compare RUN -o no/picture.png", "-o no/picture.png: the folder"),
        ("compare RUN --rounds 0", "--rounds 0: a number from 1 on"),
        ("bench wire -o no/picture.png", "-o no/picture.png: the folder"),
        ("bench wire --repeats 0", "--repeats 0: a number from 1 on"),
        ("ray RUN --state RUN", "--state .*/run.toml: .* is a file where a folder is meant"),
        ("ray RUN -o RUN", "-o .*/run.toml: .* is a file where a folder is meant"),
    ],
)
def test_every_command_checks_before_it_starts(
    command: str,
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text(RUN)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        words = [
            w.replace("RUN", str(tmp_path / "run.toml")).replace("TAKEN", port).replace("TICKET", TICKET)
            for w in command.split()
        ]
        assert main(words) == 2
    assert_said(capsys.readouterr().err, why.replace("TAKEN", port))
    assert os.listdir(tmp_path) == ["run.toml"]


@pytest.mark.parametrize("command", ["join TICKET --ranks 2 --restart 1", "coordinator RUN", "ray RUN"])
def test_a_folder_in_use_is_refused_before_anything_is_started(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def popen(*_arguments: object, **_options: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", popen)
    (tmp_path / "run.toml").write_text(RUN)
    (tmp_path / "state" / "ledger.db").parent.mkdir()
    (tmp_path / "state" / "ledger.db").touch()  # of a run: its strategy is not looked at anew
    words = command.replace("RUN", str(tmp_path / "run.toml")).replace("TICKET", TICKET).split()
    lock = FolderLock(tmp_path / "state", "node")
    try:
        assert main([*words, "--state", str(tmp_path / "state")]) == 2
    finally:
        lock.close()
    assert_said(capsys.readouterr().err, f"state is in use by another .*, process {os.getpid()}: stop it")


def assert_said(text: str, why: str) -> None:
    assert re.search(why, text), text


def test_a_temporary_folder_is_short_enough_for_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ray's are, deep inside of it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Children() as usual, Children(longest=16) as short:
        assert usual.folder.parent == tmp_path
        assert short.folder.parent == Path("/tmp")
    assert not usual.folder.exists()
    assert not short.folder.exists()
