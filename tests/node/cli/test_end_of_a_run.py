"""After the last round: the coordinator serves on, everybody hears that the run is over, and the weights can
be had from the coordinator and from every state folder."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.small_run import TASK
from thinwire.compression.errors import ConfigError
from thinwire.node.cli.arguments import seconds_of
from thinwire.node.cli.ledger_command import export_state
from thinwire.node.cli.status import fetch_status
from thinwire.node.states.opening import open_state, run_folder

ROUNDS = 40
RUN = f"""
[run]
name = "small"
rounds = {ROUNDS}
min_peers = 2
verify_every = 4
snapshot_every = 8
{TASK}[strategy]
name = "decoupled"
compressor = {{ name = "dense" }}
[network]
heartbeat_s = 0.5
"""

Start = Callable[..., Any]


@pytest.mark.swarm
@pytest.mark.timeout(240)
def test_a_finished_run_is_no_dead_end(thinwire: Start, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(RUN)
    command = (
        "coordinator",
        "run.toml",
        "--state",
        "coordinator",
        "--host",
        "127.0.0.1",
        "--linger",
        "forever",
    )
    coordinator = thinwire(*command)
    ticket = coordinator.first_line()
    nodes = [
        thinwire("join", ticket, "--threads", "1", "--state", f"node-{i}", "--json", "--host", "127.0.0.1")
        for i in range(2)
    ]
    results = [json.loads(_output(node)) for node in nodes]
    fingerprint = results[0]["fingerprint"]
    assert results[1]["fingerprint"] == fingerprint
    for i, node in enumerate(nodes):
        last = node.stderr().rstrip().splitlines()[-1]
        assert f"the run is over after round {ROUNDS}" in last
        assert f"fingerprint {fingerprint}. The weights are in node-{i}/" in last
        assert last.endswith(" -o weights")
    coordinator.wait_for(f"the run is over after round {ROUNDS}. Serving it until Ctrl-C", 70)
    coordinator.process.send_signal(signal.SIGINT)
    assert coordinator.wait() == 0, coordinator.stderr()

    again = thinwire(*command)  # nobody is there but the coordinator, which has thrown most payloads away
    assert again.first_line() == ticket
    again.wait_for(f"this run is over already, since round {ROUNDS}")
    late = thinwire(
        "join", ticket, "--threads", "1", "--state", "late", "--json", "--save", "late.safetensors"
    )
    exported = thinwire("export", ticket, "-o", "of-ticket")
    result = json.loads(_output(late))
    assert "this node fetches its weights, and trains nothing" in late.stderr()
    assert (result["rounds"], result["fingerprint"], result["counted"]) == (ROUNDS, fingerprint, 0)
    assert exported.wait(100) == 0, exported.stderr()
    status = fetch_status(ticket)
    assert (status["round"], status["state"]) == (ROUNDS, "finished")
    assert status["payloads"]["kept_from"] > 1
    again.process.send_signal(signal.SIGTERM)
    assert again.wait() == 0, again.stderr()

    _folders_have_the_weights(tmp_path)
    _nobody_waits_for_a_coordinator_that_went_after_the_end(thinwire, ticket)


def _folders_have_the_weights(tmp_path: Path) -> None:
    saved = load_file(tmp_path / "late.safetensors")
    for state in ("coordinator", "node-0", str(run_folder(tmp_path / "late"))):
        with open_state(tmp_path / state) as opened:
            assert opened.is_over
        export_state(tmp_path / state, tmp_path / "of-state", None)
        found = load_file(tmp_path / "of-state" / "model.safetensors")
        assert found.keys() == saved.keys()
        assert all(torch.equal(found[name], saved[name]) for name in saved), state


def _nobody_waits_for_a_coordinator_that_went_after_the_end(thinwire: Start, ticket: str) -> None:
    again = thinwire("join", ticket, "--threads", "1", "--state", "node-0", "--host", "127.0.0.1")
    assert again.wait(60) == 3
    assert f"the run is over after round {ROUNDS}; next: thinwire export node-0/" in again.stderr()
    assert "Traceback" not in again.stderr()


def test_durations() -> None:
    found = [seconds_of(text, "--linger") for text in ("0", "90s", "10m", "1.5h", "1d", "forever")]
    assert found == [0.0, 90.0, 600.0, 5400.0, 86400.0, float("inf")]
    for text in ("10", "-1s", "soon", "", "1e9s", "nan"):
        with pytest.raises(ConfigError, match=r"--linger .*write it as 90s"):
            seconds_of(text, "--linger")


def _output(program: Any) -> str:
    assert program.wait(100) == 0, program.stderr()
    return str(program.stdout())
