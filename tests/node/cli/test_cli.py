"""The command line as people meet it: help, refusals with their exit codes, signals, what is left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.ports import free_port
from tests.support.small_run import TASK
from tests.support.waiting import eventually
from thinwire.coordinator.protocol.identity import new_key, peer_id_of
from thinwire.coordinator.protocol.ticket import Ticket
from thinwire.node.cli.main import main

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(180)]

RUN = f"""
[run]
name = "small"
rounds = ROUNDS
min_peers = 2
eval_every = 10
{TASK}[strategy]
name = "decoupled"
lr = 1e-2
[network]
heartbeat_s = 0.5
"""

Start = Callable[..., Any]
Here = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(RUN.replace("ROUNDS", "100000"))
    return path


def test_help_is_quick_and_names_every_command(thinwire: Start) -> None:
    program = thinwire("--help", afresh=True)
    assert program.wait() == 0
    for command in ("demo", "coordinator", "join", "status", "ledger", "replay", "export", "bench"):
        assert command in program.stdout()
    assert len(program.stdout().splitlines()) < 70, "of each command a sentence or two"
    program = thinwire("join", "--help", afresh=True)
    assert program.wait() == 0
    assert "configuration, model and base weights come from" in program.stdout()


@pytest.mark.parametrize("args", [("--help",), ("join", "--help"), ("config", "--reference")])
def test_whoever_has_read_enough_gets_no_error(args: tuple[str, ...]) -> None:
    """Nobody reads from the beginning: whatever is printed meets a closed pipe."""
    reading, writing = os.pipe()
    os.close(reading)
    program = [sys.executable, "-m", "thinwire.node.cli.main", *args]
    done = subprocess.run(program, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_full_disk_is_told_in_a_line() -> None:
    program = [sys.executable, "-m", "thinwire.node.cli.main", "--version"]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("thinwire: a file cannot be written: No space left on device. Make room on")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("coordinator", "none.toml"), 2, "none.toml: no such file"),
        (("coordinator", "run.toml", "--set", "run.round=3"), 2, "did you mean 'rounds'?"),
        (("coordinator", "run.toml", "--set", "rounds"), 2, "write it as section.key=value"),
        (("coordinator", "run.toml", "--set", "strategy.name=spsb"), 2, "did you mean 'spsa'?"),
        (("coordinator", "run.toml", "--set", "strategy.beta=2"), 2, "beta = 2: must be a number"),
        (("join", "tw1-damaged"), 2, "ticket"),
        (("join", "something else"), 2, "no ticket of this version"),
        (("export", "no/folder", "-o", "weights"), 2, "no/folder: no such folder"),
        (("status", "no/folder"), 2, "no/folder: no such folder"),
        (("status", "nowhere"), 2, "nowhere: no such folder. Pass a ticket or a state folder"),
        (("join", "@none"), 2, "the ticket in none: No such file"),
        (("coordinator", "run.toml", "--ticket-file", "none/ticket"), 2, "none is not there"),
        (("join", "tw1-x", "--data", "nothing.txt"), 2, "no such file or folder"),
        (("status", ""), 2, "the ticket is empty"),
        (("join", "x", "--http", "9100"), 2, "write it as HOST:PORT"),
        (("demo", "--peers", "99"), 2, "--peers: between 1 and 32"),
        (("dance",), 2, "there is no command 'dance': one of bench, "),
        (("joni", "tw1-x"), 2, "did you mean 'join'?"),
        (("coordinator", "run.toml", "--set", "run.linger=0"), 2, "unknown key 'run.linger'; one of base, "),
    ],
)
@pytest.mark.usefixtures("run_file")
def test_wrong_usage(
    here: Here,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: tuple[str, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    found, out, err = here(*args)
    assert found == code
    assert message in err + out * (args == ("dance",))


def test_options_that_there_are_not_are_answered_by_those_of_the_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["join", "tw1-x", "--stat", "x"])
    err = capsys.readouterr().err
    assert "--state DIR" in err
    assert "--node-state" not in err, "an option of thinwire ray"
    assert "thinwire join --help" in err


def test_a_dead_ticket_says_what_every_address_answered(thinwire: Start, run_file: Path) -> None:
    coordinator = thinwire("coordinator", "run.toml", "--host", "127.0.0.1")
    ticket = coordinator.first_line()
    coordinator.process.send_signal(signal.SIGINT)
    assert coordinator.wait() == 128 + signal.SIGINT
    for command in ("join", "status"):
        program = thinwire(command, ticket)
        assert program.wait(40) == 3
        assert "127.0.0.1" in program.stderr()
        assert "refused" in program.stderr()
        assert "Traceback" not in program.stderr()


def test_ctrl_c_while_the_coordinator_is_being_reached(thinwire: Start) -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        ticket = Ticket(
            peer_id=peer_id_of(new_key().public_key()),
            addresses=(f"/ip4/127.0.0.1/tcp/{mute.getsockname()[1]}",),
            run_id=bytes(32),
            token="none",
        )
        program = thinwire("join", ticket.line())
        mute.settimeout(60)
        connections = [mute.accept()[0] for _ in range(2)]  # a knock, then libp2p itself
        program.process.send_signal(signal.SIGINT)
        code = program.wait(30)
        for connection in connections:
            connection.close()
    assert "Traceback" not in program.stderr()
    assert code == 128 + signal.SIGINT


def test_a_taken_port_and_a_directory_in_use(thinwire: Start, run_file: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        program = thinwire("coordinator", "run.toml", "--host", "127.0.0.1", "--port", port)
        assert program.wait() == 2
        assert port in program.stderr()
        program = thinwire("coordinator", "run.toml", "--host", "127.0.0.1", "--http", f"127.0.0.1:{port}")
        assert program.wait() == 2
        assert port in program.stderr()
    first = thinwire("coordinator", "run.toml", "--host", "127.0.0.1")
    first.first_line()
    second = thinwire("coordinator", "run.toml", "--host", "127.0.0.1")
    assert second.wait() == 2
    assert f"in use by another coordinator, process {first.process.pid}" in second.stderr()


def test_another_configuration_does_not_continue_a_run(thinwire: Start, run_file: Path) -> None:
    first = thinwire("coordinator", "run.toml", "--host", "127.0.0.1")
    ticket = first.first_line()
    first.process.send_signal(signal.SIGTERM)
    assert first.wait() == 128 + signal.SIGTERM
    changed = thinwire("coordinator", "run.toml", "--host", "127.0.0.1", "--set", "strategy.lr=0.5")
    assert changed.wait() == 2
    assert "strategy.lr is 0.01 there, 0.5 here" in changed.stderr()
    again = thinwire("coordinator", "run.toml", "--host", "127.0.0.1")
    assert again.first_line() == ticket, "tickets stay valid over a restart"


def test_another_model_is_incompatible(thinwire: Start, run_file: Path, tmp_path: Path) -> None:
    (tmp_path / "wider.py").write_text(
        "from thinwire.node.tasks.text import TextTask\n"
        "def make(options, data):\n"
        "    return TextTask(options.model_copy(update={'width': 32}), data)\n"
    )
    ticket = thinwire("coordinator", "run.toml", "--host", "127.0.0.1").first_line()
    program = thinwire("join", ticket, "--task", "wider:make")
    assert program.wait() == 4
    assert "the model differs from the run's" in program.stderr()
    program = thinwire("join", ticket, "--task", "nowhere:make")
    assert program.wait() == 2
    assert "No module named 'nowhere'" in program.stderr()


def test_a_small_run_from_the_ticket_to_the_weights(thinwire: Start, run_file: Path, tmp_path: Path) -> None:
    """Coordinator, two nodes, one of them on its own text; status meanwhile; metrics; Ctrl-C; end."""
    run_file.write_text(RUN.replace("ROUNDS", "200"))
    (tmp_path / "own.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    (tmp_path / "run-text.txt").write_text("pack my box with five dozen liquor jugs! " * 300)
    coordinator = thinwire(
        "coordinator",
        "run.toml",
        "--host",
        "127.0.0.1",
        "--set",
        "task.corpus=run-text.txt",
        "--ticket-file",
        "ticket",
    )
    ticket = coordinator.first_line()
    assert "run-text" not in ticket
    assert (tmp_path / "ticket").read_text() == ticket + "\n"
    assert (tmp_path / "ticket").stat().st_mode & 0o777 == 0o600
    nodes = [
        thinwire("join", "-", "--threads", "1", "--json", "--save", "end.safetensors", line=ticket),
        thinwire("join", "@ticket", "--threads", "1", "--json", "--data", "own.txt"),
    ]
    nodes[0].wait_for("round 3/200")
    for node in nodes:  # or the run may be over before anybody has asked
        node.process.send_signal(signal.SIGSTOP)
    status, shown = thinwire("status", ticket, "--json"), thinwire("status", ticket)
    assert status.wait() == 0
    seen = json.loads(status.stdout())
    assert seen["run"] == "small"
    assert seen["round"] >= 3
    assert len(seen["peers"]) == 2
    assert shown.wait() == 0
    assert "small: round" in shown.stdout()
    for node in nodes:
        node.process.send_signal(signal.SIGCONT)
    results = []
    for node in nodes:
        assert node.wait(100) == 0, node.stderr()
        results.append(json.loads(node.stdout()))
    assert coordinator.wait(70) == 0, coordinator.stderr()
    for program in (coordinator, *nodes):
        assert "Traceback" not in program.stderr()
    assert results[0]["fingerprint"] == results[1]["fingerprint"]
    assert (tmp_path / "end.safetensors").stat().st_size > 10_000
    end = json.loads((tmp_path / "home" / "thinwire" / "small-coordinator" / "result.json").read_text())
    assert end["state"] == "finished"
    assert {p["fingerprint"] for p in end["peers"]} == {results[0]["fingerprint"]}


def test_ctrl_c_leaves_cleanly_and_a_killed_process_leaves_nothing(thinwire: Start, run_file: Path) -> None:
    coordinator = thinwire("coordinator", "run.toml", "--host", "127.0.0.1", "--set", "run.min_peers=1")
    ticket = coordinator.first_line()
    node = thinwire("join", ticket, "--threads", "1", afresh=True)
    node.wait_for("round 2/")
    node.process.send_signal(signal.SIGINT)
    assert node.wait() == 128 + signal.SIGINT
    assert "leaving cleanly" in node.stderr()
    last = node.stderr().rstrip().splitlines()[-1]
    assert "left the run; the replica after round " in last
    assert "The same thinwire join command (--state " in last
    coordinator.wait_for("is gone: it has left")
    before = {p.pid for p in psutil.process_iter()}
    late = thinwire("join", ticket, "--threads", "1")
    late.wait_for("from this node's disk")  # it goes on where it was, with the same command
    assert "fetching the held-out text" not in late.stderr(), "the node has kept it"
    late.process.kill()
    late.wait()
    coordinator.process.kill()
    coordinator.wait()
    # The fixture asserts that no process is left: neither p2pd nor its watchdog.
    assert coordinator.process.pid in before


def test_metrics_are_served(thinwire: Start, run_file: Path) -> None:
    import urllib.request

    def scrape(port: int) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            return str(answer.read().decode())

    ports = [free_port(), free_port()]
    coordinator = thinwire(
        "coordinator",
        "run.toml",
        "--host",
        "127.0.0.1",
        "--set",
        "run.min_peers=1",
        "--http",
        f"127.0.0.1:{ports[0]}",
    )
    node = thinwire("join", coordinator.first_line(), "--threads", "1", "--http", f"127.0.0.1:{ports[1]}")
    node.wait_for("round 3/")
    texts = [scrape(port) for port in ports]
    for name in (
        "thinwire_swarm_round ",
        'thinwire_swarm_peers{state="training"} 1.0',
        "thinwire_coordinator_sent_bytes_total{",
        'thinwire_build_info{protocol="4"',
    ):
        assert name in texts[0], texts[0]
    for name in (
        "thinwire_round ",
        "thinwire_loss ",
        "thinwire_held_out_loss ",
        "thinwire_payload_bytes_total ",
        'thinwire_sent_bytes_total{kind="payload"}',
        'thinwire_received_bytes_total{kind="ledger"}',
        "thinwire_round_duration_seconds_count ",
        'thinwire_rounds_total{result="counted"}',
        'thinwire_device_memory_used_bytes{device="cpu"}',
    ):
        assert name in texts[1], texts[1]


@pytest.mark.parametrize("name", ["verify", "other"])
def test_the_program_is_not_torn_down_around_a_thread_that_computes(name: str) -> None:
    script = f"""
import atexit, sys, threading, time
from thinwire.node.cli.main import entry
atexit.register(print, "torn down")
threading.Thread(target=time.sleep, args=(60,), name={name!r}, daemon=True).start()
sys.argv = ["thinwire", "--version"]
entry()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("thinwire ")
    assert ("torn down" in done.stdout) == (name == "other")


@pytest.mark.parametrize("module", ["tyro", "thinwire.node.cli.tool_commands"])
def test_who_stops_the_program_while_it_loads_sees_no_traceback(module: str) -> None:
    script = f"""
import os, signal, sys
class Interrupted:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupted())
from thinwire.node.program.entry import entry
sys.argv = ["thinwire", "runs", "nowhere"]
entry()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_command_that_is_told_to_end_clears_its_folders_away(own_temp_folder: Path) -> None:
    command = [sys.executable, "-m", "thinwire.node.cli.main", "bench", "round", "--repeats", "1000"]
    with subprocess.Popen(command) as process:
        assert eventually(lambda: any(own_temp_folder.glob("thinwire-bench-*")))
        process.terminate()
    assert process.returncode == 128 + signal.SIGTERM  # and `own_temp_folder` is empty
