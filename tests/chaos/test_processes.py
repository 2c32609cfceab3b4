"""Real processes over libp2p on loopback: frozen, killed and started again; replicas equal at the end."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(240)]

RUN = """
[run]
name = "chaos"
rounds = 120
min_peers = 3
eval_every = 30
[task]
layers = 2
width = 64
heads = 4
context = 32
batch = 8
held_out_bytes = 2048
[strategy]
name = "decoupled"
lr = 3e-3
beta = 0.95
[network]
heartbeat_s = 0.5
"""

Start = Callable[..., Any]


@pytest.fixture
def swarm(thinwire: Start, tmp_path: Path) -> tuple[Any, list[Any], str]:
    """A coordinator and three nodes that train: (coordinator, nodes, ticket)."""
    (tmp_path / "run.toml").write_text(RUN)
    coordinator = thinwire("coordinator", "run.toml", "--host", "127.0.0.1")
    ticket = coordinator.first_line()
    nodes = [
        thinwire("join", ticket, "--threads", "1", "--json", "--host", "127.0.0.1", "--state", f"node{i}")
        for i in range(3)
    ]
    for node in nodes:
        node.wait_for("round 5/")
    return coordinator, nodes, ticket


def last_round(program: Any) -> int:
    rounds = re.findall(r"round (\d+)(?:/\d+)?: \d+ offers", program.stderr())
    return int(rounds[-1]) if rounds else 0


def ends_equal(nodes: list[Any]) -> list[dict[str, Any]]:
    results = []
    for node in nodes:
        assert node.wait(120) == 0, node.stderr()[-3000:]
        assert "Traceback" not in node.stderr()
        results.append(json.loads(node.stdout()))
    assert {r["rounds"] for r in results} == {120}
    assert len({r["fingerprint"] for r in results}) == 1
    return results


def test_a_frozen_node_stalls_nobody_and_catches_up(swarm: tuple[Any, list[Any], str]) -> None:
    coordinator, nodes, _ = swarm
    nodes[2].process.send_signal(signal.SIGSTOP)
    frozen_at, frozen_s = last_round(coordinator), time.monotonic()
    while last_round(coordinator) < frozen_at + 8:
        assert time.monotonic() - frozen_s < 30, coordinator.stderr()[-2000:]
        time.sleep(0.05)
    nodes[2].process.send_signal(signal.SIGCONT)
    results = ends_equal(nodes)
    assert coordinator.wait(70) == 0
    assert results[2]["missed"] >= 1
    assert results[2]["counted"] >= 20, "it takes part again"


def test_a_killed_coordinator_goes_on_where_its_ledger_ends(
    swarm: tuple[Any, list[Any], str], thinwire: Start, tmp_path: Path
) -> None:
    coordinator, nodes, ticket = swarm
    coordinator.process.kill()
    coordinator.wait()
    # The write-ahead log belongs to the ledger: what was committed may still be in it alone.
    shutil.copytree(tmp_path / "chaos-coordinator", tmp_path / "copy")
    before = records(tmp_path / "copy" / "ledger.db")
    for node in nodes:
        node.wait_for("the coordinator", 30)
        assert node.process.poll() is None
    again = thinwire("coordinator", "run.toml", "--host", "127.0.0.1")
    assert again.first_line() == ticket
    ends_equal(nodes)
    assert again.wait(70) == 0
    after = records(tmp_path / "chaos-coordinator" / "ledger.db")
    assert len(before) >= 5
    assert after[: len(before)] == before
    assert len(after) == 1 + 120


def test_a_killed_node_comes_back_and_ends_equal(swarm: tuple[Any, list[Any], str], thinwire: Start) -> None:
    coordinator, nodes, ticket = swarm
    killed_at = last_round(coordinator)
    nodes[1].process.kill()
    nodes[1].wait()
    back = thinwire("join", "-", "--threads", "1", "--json", "--state", "node1", line=ticket)
    back.wait_for("took the replica after round", 60)
    results = ends_equal([nodes[0], nodes[2], back])
    assert coordinator.wait(70) == 0
    assert results[2]["counted"] + results[2]["missed"] >= 1
    took = int(re.findall(r"took the replica after round (\d+)", back.stderr())[0])
    assert took > killed_at, "the others went on while it was away"
    assert "as peer 3" not in coordinator.stderr(), "it is the same peer as before"


def records(path: Path) -> list[tuple[Any, ...]]:
    db = sqlite3.connect(path)
    try:
        return list(db.execute("SELECT * FROM record ORDER BY 1"))
    finally:
        db.close()
