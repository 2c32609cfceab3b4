"""`thinwire demo`, as a new user runs it."""

from __future__ import annotations

import json
import signal
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.ports import free_port

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(300), pytest.mark.usefixtures("own_temp_folder")]

Start = Callable[..., Any]


@pytest.fixture(autouse=True)
def _little_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else most of these short runs is to measure their loss."""
    monkeypatch.setenv("THINWIRE_TASK__HELD_OUT_BYTES", "2048")


@pytest.fixture
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"LAYERS": 1, "WIDTH": 32, "HEADS": 2, "BATCH": 2}.items():
        monkeypatch.setenv(f"THINWIRE_TASK__{key}", str(value))


def test_training_from_scratch_with_kills_on_the_way(thinwire: Start) -> None:
    args = ("--peers", "2", "--rounds", "200", "--coordinators", "3", "--http", "127.0.0.1:0")
    program = thinwire("demo", "--json", *args)
    assert program.wait(200) == 0, program.stderr()
    result = json.loads(program.stdout())
    assert result["rounds"] == 200
    assert 5.4 < result["held_out_first"] < 5.8  # of weights that have learned nothing
    assert result["held_out_last"] < 3.3
    assert len(result["fingerprints"]) == 2
    assert len(set(result["fingerprints"].values())) == 1
    assert None not in result["fingerprints"].values()
    assert result["payload_bytes_per_peer_round"] < 10_000
    # Each uploads once; what was sent since a node's last heartbeat is not known, nor before it was killed.
    assert result["sent_bytes_per_peer_round"] > 0.4 * result["payload_bytes_per_peer_round"]
    assert result["ddp_bytes_per_peer_round"] > 100 * result["payload_bytes_per_peer_round"]
    node, leader = result["faults"]
    assert node["signal"] == leader["signal"] == "SIGKILL"
    assert 66 <= node["killed_at_round"] <= node["restarted_at_round"] <= node["back_at_round"] <= 200
    assert leader["coordinator"] == "coordinator-0" != leader["led_by"]
    assert 133 <= leader["killed_at_round"] < leader["restarted_at_round"]
    assert leader["next_commit_s"] > 0
    assert f"{leader['coordinator']}, which led, was killed" in program.stderr()
    assert f"the page of {leader['led_by']}, which leads now: http://127.0.0.1:" in program.stderr()
    assert program.stderr().count("node-1 (…") == 1
    assert "Replicas identical to the last bit" in program.stderr()
    assert "What next" in program.stderr()


@pytest.mark.usefixtures("small_model")
def test_fine_tuning_with_one_byte_per_probe(thinwire: Start) -> None:
    args = ("--strategy", "spsa", "--peers", "2", "--rounds", "10", "--no-faults")
    program = thinwire("demo", "--json", *args)
    assert program.wait(200) == 0, program.stderr()
    result = json.loads(program.stdout())
    assert result["rounds"] == 10
    assert result["held_out_last"] < result["held_out_first"] - 0.005
    assert len(set(result["fingerprints"].values())) == 1
    assert result["payload_bytes_per_peer_round"] <= 64
    assert result["sent_bytes_per_peer_round"] <= 300
    assert result["faults"] == []


@pytest.mark.usefixtures("small_model")
def test_peers_with_models_of_their_own(thinwire: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every round but the first and the last has an exchange; who evaluates may miss one."""
    monkeypatch.setenv("THINWIRE_NETWORK__HEARTBEAT_S", "0.1")
    args = ("--strategy", "gossip", "--peers", "2", "--rounds", "8", "--no-faults")
    program = thinwire("demo", "--json", *args)
    assert program.wait(200) == 0, program.stderr()
    result = json.loads(program.stdout())
    assert len(result["fingerprints"]) == 2
    assert len(set(result["fingerprints"].values())) == 1
    assert result["held_out_last"] < result["held_out_first"] - 0.05
    assert result["gossip"]["merged"] == 8
    ((*edge, n_bytes, relayed),) = result["gossip"]["edges"]
    assert (edge, relayed) == ([0, 1], 0)
    assert n_bytes > 2 * 3 * 20_000
    assert "merged after the last round" in program.stderr()


@pytest.mark.usefixtures("small_model")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_or_killed_it_leaves_nothing_running(thinwire: Start, number: signal.Signals) -> None:
    """The fixture of `thinwire` asserts that every process, also the nodes' own, is gone. Meanwhile it can be
    watched."""
    http = f"127.0.0.1:{free_port()}"
    program = thinwire("demo", "--peers", "1", "--rounds", "5000", "--http", http)
    program.wait_for("round 1", 60)
    assert f"The swarm's page: http://{http} " in program.stderr()
    seen = {}
    for path in ("metrics", "sd", "healthz"):
        with urllib.request.urlopen(f"http://{http}/{path}", timeout=20) as answer:
            seen[path] = answer.read().decode()
    assert 'thinwire_swarm_peers{state="training"} 1.0' in seen["metrics"]
    assert len(json.loads(seen["sd"])) == 1
    assert seen["healthz"] == "ok\n"
    program.process.send_signal(number)
    assert program.wait() == (-number if number == signal.SIGKILL else 128 + number)
