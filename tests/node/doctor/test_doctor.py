"""`thinwire doctor`: every line true, a remedy for what is wrong, bounded, and nothing left behind."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
from collections.abc import Callable, Iterable, Iterator
from io import StringIO
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from rich.console import Console

from tests.support.ports import free_port
from tests.support.small_run import TASK
from thinwire.compression.errors import ConfigError
from thinwire.coordinator.protocol.identity import new_key, peer_id_of
from thinwire.coordinator.protocol.messages import PROTOCOL_VERSION
from thinwire.coordinator.protocol.ticket import Ticket
from thinwire.node.doctor import command, machine, network
from thinwire.node.doctor.disk import check_disk, nearest
from thinwire.node.doctor.findings import Check, Finding, Stopped, examine, failed, ok
from thinwire.node.doctor.machine import check_machine, check_python
from thinwire.node.doctor.network import NetworkPlan, _run, check_network

Start = Callable[..., Any]

LINES = {
    *("python", "packages", "extras", "cores", "memory", "open files", "shared memory", "numba", "triton"),
    *(
        "device cpu",
        "self-test torch on cpu",
        "self-test repeated",
        "disk space",
        "file system",
        "disk speed",
    ),
    *("disk speed", "commits", "libp2p", "addresses", "coordinator", "clock"),
}

RUN = f"""
[run]
name = "small"
rounds = 1000
min_peers = 2
{TASK}[strategy]
name = "decoupled"
lr = 1e-2
"""


def never() -> bool:
    return False


def by_name(findings: Iterable[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


# ------------------------------------------------------------------------------------------- checks


def test_lines_go_on_below_where_they_began(monkeypatch: pytest.MonkeyPatch) -> None:
    said = StringIO()
    monkeypatch.setattr(command, "_console", lambda: Console(file=said, width=80))
    command._print(failed("run", "word " * 30, "mend " * 30))
    lines = said.getvalue().splitlines()
    detail = [line for line in lines if "word" in line]
    remedy = [line for line in lines if "mend" in line]
    assert detail + remedy == lines
    assert len(detail) > 1 < len(remedy)
    assert len({line.index("word") for line in detail}) == len({line.index("mend") for line in remedy}) == 1


def test_a_check_that_breaks_or_hangs_hides_no_other() -> None:
    let_go = Event()

    def breaks(_stopped: Stopped) -> Iterator[Finding]:
        yield ok("first", "fine")
        raise ValueError("nobody thought of this")

    def hangs(_stopped: Stopped) -> list[Finding]:
        let_go.wait(60)
        return []

    def refuses(_stopped: Stopped) -> list[Finding]:
        raise ConfigError("no such port")

    checks = [
        Check("breaks", breaks),
        Check("hangs", hangs, limit_s=0.2),
        Check("refuses", refuses),
        Check("last", lambda _stopped: [ok("last", "fine")]),
    ]
    try:
        found = by_name(examine(checks, never))
    finally:
        let_go.set()
    assert list(found) == ["first", "breaks", "hangs", "refuses", "last"]
    assert [f.status for f in found.values()] == ["ok", "failed", "failed", "failed", "ok"]
    assert "ValueError: nobody thought of this" in found["breaks"].detail
    assert "no result within 0.2 s" in found["hangs"].detail
    assert found["refuses"].detail == "no such port"
    assert all(f.remedy for f in found.values() if f.status == "failed")


def test_a_stop_ends_the_examination_and_lets_a_check_clear_up() -> None:
    stop, cleared = Event(), Event()

    def waits(stopped: Stopped) -> Iterator[Finding]:
        yield ok("begun", "fine")
        while not stopped():
            stop.wait(0.01)
        cleared.set()

    found = []
    for finding in examine([Check("waits", waits), Check("never", lambda _: [ok("never", "")])], stop.is_set):
        found.append(finding.name)
        stop.set()
    assert found == ["begun"]
    assert cleared.is_set()


def test_python_and_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    found = by_name(check_python(never))
    assert found["packages"].status == "ok"
    assert "torch " in found["packages"].detail
    others, known = {"torch": "2.10.0+cpu", "hivemind": None}, machine._version
    monkeypatch.setattr(machine, "_version", lambda p: others[p] if p in others else known(p))
    packages = by_name(check_python(never))["packages"]
    assert packages.status == "failed"
    assert "torch 2.10.0+cpu" in packages.detail
    assert "hivemind is missing" in packages.detail
    assert packages.remedy is not None
    assert "'torch>=2.11' 'hivemind>=" in packages.remedy


def test_a_container_with_less_than_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    (tmp_path / "memory.max").write_text("1000000000\n")
    (tmp_path / "memory.current").write_text("400000000\n")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    found = by_name(check_machine(never))
    assert found["cores"].status == "warning"
    assert "0.5 cores" in found["cores"].detail
    assert found["memory"].status == "warning"
    assert found["memory"].figures["available_bytes"] == 600_000_000
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert by_name(check_machine(never))["memory"].figures["container_limit_bytes"] is None


# ------------------------------------------------------------------------------------------- disk


def test_the_disk_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there"
    found = by_name(check_disk(folder, never))
    assert set(found) == {"disk space", "file system", "disk speed", "commits"}
    assert all(f.status != "failed" for f in found.values())
    assert found["disk speed"].figures["write_bytes_per_s"] > 0
    assert found["commits"].figures["commit_s"] > 0
    assert list(tmp_path.iterdir()) == []
    assert nearest(folder) == tmp_path


def test_what_a_killed_one_has_left_is_removed(tmp_path: Path) -> None:
    old, new = (tmp_path / f".thinwire-doctor-{name}" for name in ("old", "new"))
    for each in (old, new):
        each.mkdir()
        (each / "ledger.db").write_bytes(b"x")
    os.utime(old, (1, 1))
    list(check_disk(tmp_path, never))
    assert list(tmp_path.iterdir()) == [new], "another doctor may be using the new one"


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "state", Path("/proc/nothing")):
        findings = list(check_disk(folder, never))
        assert [f.status for f in findings] == ["failed"], folder
        assert findings[0].remedy is not None
        assert "--state" in findings[0].remedy


# ------------------------------------------------------------------------------------------- network


def test_addresses_that_are_none_are_refused_at_once() -> None:
    for wrong in ({"host": "everywhere"}, {"port": 70_000}, {"announce": (":",)}):
        with pytest.raises(ConfigError):
            NetworkPlan(**{"host": "127.0.0.1", "port": 0, "announce": (), "ticket": None, **wrong})


def dead_ticket(*ports: int) -> Ticket:
    return Ticket(
        peer_id=peer_id_of(new_key().public_key()),
        addresses=tuple(f"/ip4/127.0.0.1/tcp/{port}" for port in ports),
        run_id=bytes(32),
        token="none",
    )


@pytest.mark.swarm
def test_a_taken_port_a_silent_address_and_a_dead_ticket(own_temp_folder: Path) -> None:
    """The coordinator is tried even if this machine cannot listen as asked."""
    ports = free_port(), free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        plan = NetworkPlan("127.0.0.1", taken.getsockname()[1], (), dead_ticket(*ports))
        found = by_name(check_network(plan, never))
    assert found["libp2p"].status == "failed"
    assert f"port {plan.port} is taken" in found["libp2p"].detail
    assert found["coordinator"].status == "failed"
    for port in ports:
        assert f"/tcp/{port}: connection refused" in found["coordinator"].detail
    found = by_name(check_network(NetworkPlan("127.0.0.1", 0, (f"127.0.0.1:{ports[0]}",), None), never))
    assert found["libp2p"].status == "ok"
    assert found["addresses"].status == "warning"
    assert "connection refused" in found["addresses"].detail
    assert found["clock"].status == "skipped"


@pytest.mark.swarm
def test_a_stop_while_the_coordinator_is_mute_leaves_nothing(own_temp_folder: Path) -> None:
    dialled = Event()
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        mute.settimeout(0)

        def stopped() -> bool:
            """From the moment on at which it is dialled."""
            with contextlib.suppress(OSError):
                mute.accept()[0].close()
                dialled.set()
            return dialled.is_set()

        plan = NetworkPlan("127.0.0.1", 0, (), dead_ticket(mute.getsockname()[1]))
        assert [f.name for f in check_network(plan, stopped)] == ["libp2p", "addresses"]
    gc.collect()  # whatever was not closed is told now


@pytest.fixture
def ticket(thinwire: Start, tmp_path: Path) -> str:
    (tmp_path / "run.toml").write_text(RUN)
    return str(thinwire("coordinator", "run.toml", "--host", "127.0.0.1").first_line())


@pytest.mark.swarm
def test_a_run_that_can_be_joined(ticket: str) -> None:
    parsed = Ticket.parse(ticket)
    silent = f"/ip4/127.0.0.1/tcp/{free_port()}"
    two = parsed.model_copy(update={"addresses": (silent, *parsed.addresses)})
    found = by_name(check_network(NetworkPlan("127.0.0.1", 0, (), two), never))
    assert {name: found[name].status for name in ("coordinator", "clock", "run")} == dict.fromkeys(
        ("coordinator", "clock", "run"), "ok"
    )
    assert parsed.addresses[0] in found["coordinator"].detail
    assert found["coordinator"].figures["tried"][silent] == "connection refused"
    assert abs(found["clock"].figures["skew_s"]) < 1
    assert "small, round 0 of 1000 (waiting)" in found["run"].detail
    assert found["run"].figures["least_bytes"] == 12 * found["run"].figures["n_params"] > 12_000
    wrong = parsed.model_copy(update={"token": "stolen"})
    found = by_name(check_network(NetworkPlan("127.0.0.1", 0, (), wrong), never))
    assert found["coordinator"].status == "failed"
    assert "token is wrong" in found["coordinator"].detail
    other = parsed.model_copy(update={"run_id": bytes(32)})
    found = by_name(check_network(NetworkPlan("127.0.0.1", 0, (), other), never))
    assert found["run"].status == "failed"
    assert "another run" in found["run"].detail


def test_runs_that_this_machine_cannot_take_part_in() -> None:
    ticket = dead_ticket(1)
    status = {
        **{"run": "r", "run_id": bytes(32).hex(), "round": 3, "rounds": 9, "state": "training"},
        **{"n_params": 1000, "protocol": PROTOCOL_VERSION},
    }
    assert _run(ticket, status).status == "ok"
    for change, found, words in (
        ({"protocol": 1000}, "failed", f"protocol version 1000 there, {PROTOCOL_VERSION} here"),
        ({"n_params": 10**15}, "failed", "are available"),
        ({"state": "finished"}, "warning", "round 3 of 9 (finished)"),
    ):
        finding = _run(ticket, status | change)
        assert finding.status == found
        assert words in finding.detail


@pytest.mark.parametrize(
    ("strategy", "least", "spared"),
    [
        ({"name": "spsa"}, 4, 4),
        ({"name": "decoupled"}, 12, 12),
        ({"name": "diloco"}, 28, 20),
        ({"name": "diloco", "inner": {"name": "muon"}, "outer_momentum": 0.0}, 20, 12),
        ({"name": "subspace"}, 20, 20),
        ({"name": "gossip"}, 26, 26),
        ({"name": "gossip", "inner": "lion"}, 22, 22),
        ({"name": "sapo"}, 20, 20),
        (None, 4, 4),
    ],
)
def test_memory_is_that_of_the_run_s_strategy(
    monkeypatch: pytest.MonkeyPatch, strategy: dict[str, Any] | None, least: int, spared: int
) -> None:
    status: dict[str, Any] = {
        **{"run": "r", "run_id": bytes(32).hex(), "round": 3, "rounds": 9, "state": "training"},
        **{"n_params": 1000, "strategy": strategy},
    }
    figures = _run(dead_ticket(1), status).figures
    assert (figures["least_bytes"], figures["least_bytes_offload_idle"]) == (1000 * least, 1000 * spared)
    for free_bytes, found in ((1000 * least, "ok"), (1000 * spared - 1, "failed")):
        monkeypatch.setattr(network, "available_bytes", lambda n=free_bytes: n)
        assert _run(dead_ticket(1), status).status == found
    if spared < least:
        monkeypatch.setattr(network, "available_bytes", lambda: 1000 * least - 1)
        finding = _run(dead_ticket(1), status)
        assert (finding.status, finding.remedy) == ("warning", "thinwire join TICKET --offload-idle")


def test_a_strategy_that_is_unknown_here_is_said() -> None:
    status = {"run_id": bytes(32).hex(), "n_params": 1000, "strategy": {"name": "decopled"}}
    assert "did you mean 'decoupled'" in _run(dead_ticket(1), status).detail


@pytest.mark.swarm
def test_a_clock_that_is_wrong(thinwire: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator's is three hours ahead."""
    (tmp_path / "run.toml").write_text(RUN)
    (tmp_path / "ahead").mkdir()
    (tmp_path / "ahead" / "sitecustomize.py").write_text(
        "import time\nns = time.time_ns\ntime.time_ns = lambda: ns() + 3 * 3600 * 10**9\n"
    )
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path / "ahead"), prepend=os.pathsep)
        line = thinwire("coordinator", "run.toml", "--host", "127.0.0.1", afresh=True).first_line()
    clock = by_name(check_network(NetworkPlan("127.0.0.1", 0, (), Ticket.parse(line)), never))["clock"]
    assert clock.status == "warning"
    assert "180 min behind" in clock.detail
    assert clock.remedy is not None
    assert "NTP" in clock.remedy
    assert clock.figures["skew_s"] == pytest.approx(-3 * 3600, abs=60)


# ------------------------------------------------------------------------------------------- the command


@pytest.mark.swarm
def test_the_command(thinwire: Start, ticket: str, tmp_path: Path) -> None:
    program = thinwire("doctor", "-", "--json", "--host", "127.0.0.1", "--state", "state", line=ticket)
    assert program.wait() == 0, program.stdout()
    result = json.loads(program.stdout())
    assert result["ok"] is True
    assert LINES | {"run"} <= {check["name"] for check in result["checks"]}
    for check in result["checks"]:
        assert check["status"] in ("ok", "warning", "skipped"), check
        assert (check["remedy"] is not None) == (check["status"] == "warning")
    assert program.stderr() == ""
    assert not (tmp_path / "state").exists()


def sloppy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on Python processes flush denormal numbers to zero."""
    (tmp_path / "sloppy").mkdir()
    (tmp_path / "sloppy" / "sitecustomize.py").write_text("import torch\ntorch.set_flush_denormal(True)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "sloppy"), prepend=os.pathsep)


@pytest.mark.swarm
def test_a_machine_that_computes_something_else(
    thinwire: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told so by the doctor, and before it joins; plain lines where there is no terminal."""
    sloppy(tmp_path, monkeypatch)
    program = thinwire("doctor", "--host", "127.0.0.1", "--state", "state", afresh=True)
    joining = thinwire("join", dead_ticket(free_port()).line(), "--state", "node", afresh=True)
    assert program.wait() == 1
    shown = program.stdout()
    assert "\x1b" not in shown
    assert "✗ device cpu" in shown
    assert "flushes denormal numbers to zero" in shown
    assert "✗ self-test torch on cpu" in shown
    assert "✓ libp2p" in shown
    assert shown.splitlines()[-1].endswith("to mend before this machine joins, 1 warning")
    assert joining.wait() == 4
    assert "denormal numbers" in joining.stderr()
    assert "thinwire doctor" in joining.stderr()
    assert "Traceback" not in joining.stderr() + program.stderr()
    made = {path.name for path in (tmp_path / "node").rglob("*") if path.is_file()}
    assert made == {"identity.key", "lock"}, "nothing of the run"


@pytest.mark.swarm
def test_bad_input_and_ctrl_c(thinwire: Start, tmp_path: Path) -> None:
    for args, message in ((("tw1-damaged",), "ticket"), (("--host", "here"), "cannot listen on 'here'")):
        program = thinwire("doctor", *args)
        assert program.wait() == 2
        assert message in program.stderr()
        assert program.stdout() == ""
    program = thinwire("doctor", "--host", "127.0.0.1", "--state", "state")
    program.first_line()
    program.process.send_signal(signal.SIGINT)
    assert program.wait() == 128 + signal.SIGINT
    assert "Traceback" not in program.stderr()
    assert "can join" not in program.stdout()
    assert not (tmp_path / "state").exists()
