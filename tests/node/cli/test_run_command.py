"""`thinwire run` with a coordinator and a node as processes of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.small_run import TASK
from tests.support.waiting import wait_until
from thinwire.compression.errors import ConfigError
from thinwire.coordinator.control.orders import Order
from thinwire.coordinator.control.owner import give_order
from thinwire.coordinator.control.wire import SOCKET_NAME, Answer
from thinwire.coordinator.protocol.messages import Change
from thinwire.node.cli.main import main
from thinwire.node.cli.offline import as_file
from thinwire.node.cli.replay import replay
from thinwire.node.cli.run_command import change_run
from thinwire.node.cli.status import StatusClient
from thinwire.node.states.opening import open_state
from thinwire.node.system.stopping import stop_on_signals
from thinwire.optim.registry import check_changes

RUN = f"""
[run]
name = "changed"
rounds = 100000
min_peers = 1
verify_every = 1
snapshot_every = 1000
{TASK}[strategy]
name = "decoupled"
lr = 1e-3
[network]
heartbeat_s = 0.5
"""


def give(folder: Path, what: str, rounds: int = 0, **settings: Any) -> Answer:
    changes = tuple(Change(key=key.replace("__", "."), value=value) for key, value in settings.items())
    order = Order.model_validate({"what": what, "rounds": rounds, "changes": changes})
    return give_order(folder, order, check_changes, lambda _answer: None, lambda: False)


@pytest.mark.swarm
@pytest.mark.timeout(240)
def test_a_run_of_processes_is_changed_ended_and_extended(
    thinwire: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "run.toml").write_text(RUN)
    state = tmp_path / "state"
    where = ("--host", "127.0.0.1", "--state", "state", "--linger", "forever")
    coordinator = thinwire("coordinator", "run.toml", *where)
    ticket = coordinator.first_line()
    join = ("join", ticket, "--threads", "1", "--host", "127.0.0.1", "--state", "node", "--json")
    node = thinwire(*join)
    node.wait_for("round 3/", 100)
    assert (state / SOCKET_NAME).stat().st_mode & 0o777 == 0o600
    assert state.stat().st_mode & 0o777 == 0o700

    command = thinwire("run", "state", "set", "strategy.lr=0.002", "schedule.name=constant")
    assert command.wait(60) == 0, command.stderr()
    assert "strategy.lr 0.001 -> 0.002" in command.stdout()
    with pytest.raises(ConfigError, match=r"strategy\.beta stands in record 0.*strategy\.lr"):
        give(state, "set", strategy__beta=0.5)
    with pytest.raises(ConfigError, match="lr = -1"):
        give(state, "set", strategy__lr=-1)

    paused = give(state, "pause").round
    node.wait_for("the run is paused", 60)
    with StatusClient(ticket) as client:
        status = client.fetch()
        assert (status["state"], status["round"]) == ("paused", paused)
        assert len(status["changes"]) == 3
        assert main(["status", str(state), "--json"]) == 0  # it is asked through its folder
        asked = json.loads(capsys.readouterr().out)
        assert (asked["state"], asked["run_id"], "folder" in asked) == ("paused", status["run_id"], False)
        assert give(state, "resume").round == paused + 1
        wait_until(lambda: client.fetch()["round"] > paused + 2, 60, coordinator.stderr)
    end = give(state, "stop").round
    assert node.wait(60) == 0, node.stderr()
    assert json.loads(node.stdout())["rounds"] == end
    coordinator.wait_for("the run is over", 60)

    done = give(state, "extend", 2, strategy__lr=0.001)
    assert (done.round, done.told) == (
        end + 1,
        (f"run.rounds {end} -> {end + 3}", "strategy.lr 0.002 -> 0.001"),
    )
    node = thinwire(*join)
    assert node.wait(100) == 0, node.stderr()
    result = json.loads(node.stdout())
    assert (result["rounds"], result["counted"]) == (end + 3, 2)
    coordinator.wait_for(f"the run is over after round {end + 3}", 60)
    coordinator.process.terminate()
    coordinator.wait(60)
    assert not (state / SOCKET_NAME).exists()
    with open_state(state) as found:
        assert (found.is_over, found.head, found.course.n_rounds) == (True, end + 3, end + 3)
    with as_file(state) as (_, file):
        replayed = replay(file)
    assert replayed is not None
    assert replayed.fingerprint == result["fingerprint"]


@pytest.mark.parametrize(
    ("what", "rounds", "settings", "text"),
    [
        ("extend", None, {}, "extend, which needs it"),
        ("pause", 3, {}, "--rounds N goes with extend"),
        ("stop", None, {"strategy.lr": 1}, "stop takes no settings"),
        ("extend", -1, {}, "at most"),
        ("set", None, {"strategy.lr": [1]}, "write it as section.key=value"),
        ("set", None, {"strategy.lr": float("nan")}, "write it as section.key=value"),
        ("set", None, {"strategy.lr": 0.1}, "not the state folder of a coordinator"),
    ],
)
def test_what_makes_no_sense_is_refused_at_the_command(
    tmp_path: Path, what: Any, rounds: int | None, settings: dict[str, Any], text: str
) -> None:
    with stop_on_signals() as stop, pytest.raises(ConfigError, match=text):
        change_run(tmp_path, what, rounds, settings, stop)
