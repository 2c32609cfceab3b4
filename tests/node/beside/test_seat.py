"""`thinwire join --coordinate`: a seat of the run's committee in a process beside a node."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.small_run import TASK
from tests.support.waiting import wait_until
from thinwire.compression.errors import ConfigError
from thinwire.coordinator.protocol.identity import load_or_create, new_key, peer_id_of
from thinwire.coordinator.protocol.messages import SeatEntry
from thinwire.coordinator.protocol.ticket import Ticket
from thinwire.coordinator.seats.ticket import SeatTicket
from thinwire.node.beside.seat import Beside, Coordinate, seat_command
from thinwire.node.cli.status import StatusClient
from thinwire.node.local_runs.finding import local_runs
from thinwire.node.system.stopping import Stop

Start = Callable[..., Any]

RUN = f"""
[run]
name = "without a machine of its own"
rounds = 100000
min_peers = 2
{TASK}[strategy]
name = "decoupled"
compressor = {{ name = "dense" }}
[network]
heartbeat_s = 0.5
"""

WAIT_S = 60.0


def program(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def starts(path: Path) -> int:
    return len(path.read_text()) if path.exists() else 0


def test_one_that_breaks_is_started_again_until_it_ends_well(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "starts"
    third_time = (
        f"p = {str(path)!r}; open(p, 'a').write('x'); raise SystemExit(9 * (len(open(p).read()) < 3))"
    )
    with caplog.at_level(logging.WARNING, "thinwire"):
        beside = Beside(program(third_time), os.environ, first_pause_s=0.01)
        wait_until(lambda: not beside.is_running, WAIT_S, lambda: caplog.text)
        beside.close()
    assert starts(path) == 3
    assert [r.args for r in caplog.records] == [(9, 0.01), (9, 0.02)]


@pytest.mark.parametrize("code", [2, 4])
def test_what_would_fail_again_is_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    path = tmp_path / "starts"
    fails = f"open({str(path)!r}, 'a').write('x'); raise SystemExit({code})"
    with caplog.at_level(logging.WARNING, "thinwire"):
        beside = Beside(program(fails), os.environ, first_pause_s=0.01)
        wait_until(lambda: not beside.is_running, WAIT_S, lambda: caplog.text)
        beside.close()
    assert starts(path) == 1
    assert "The node trains on" in caplog.text


def test_it_is_seen_off_when_the_run_is_over_and_stopped_with_the_node() -> None:
    until_told = Beside(program("import time; time.sleep(600)"), os.environ)
    stop = Stop()
    stop.request(signal.SIGINT)
    until_told.see_off(stop)  # returns at once
    assert until_told.is_running
    until_told.close()
    until_told.close()
    assert not until_told.is_running
    by_itself = Beside(program("pass"), os.environ)
    by_itself.see_off(Stop())
    assert not by_itself.is_running
    by_itself.close()


def test_its_folder_is_beside_the_nodes_one_for_each_run(tmp_path: Path) -> None:
    where = SeatEntry(peer_id=peer_id_of(new_key().public_key()), addresses=("/ip4/127.0.0.1/tcp/1",))
    run_id, other = bytes([7] * 32), bytes([8] * 32)
    ticket = Ticket(peer_id=where.peer_id, addresses=where.addresses, run_id=run_id, token="t")
    line = SeatTicket(run_id=run_id, secret=bytes(32), token="t", seats=(where,)).line()
    args = seat_command(ticket, Coordinate(line, "127.0.0.1", 4001, ("example.org:1",)), tmp_path / "node")
    folder = tmp_path / "node-seat" / f"run-{run_id.hex()[:12]}-coordinator"
    kept = folder / "seat-ticket"
    assert kept.read_text().strip() == line
    assert kept.stat().st_mode & 0o777 == 0o600
    assert line not in args, "others on this machine see the arguments of a process"
    assert args[:5] == ["coordinator", "--replica", str(kept), "--state", str(folder)]
    assert args[-1] == "--announce=example.org:1"
    of_another = ticket.model_copy(update={"run_id": other})
    with pytest.raises(ConfigError, match="of another run"):
        seat_command(of_another, Coordinate(str(kept)), tmp_path / "node")


@pytest.mark.swarm
@pytest.mark.timeout(240)
def test_a_run_goes_on_without_any_coordinator_but_those_beside_its_nodes(
    thinwire: Start, here: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """The first coordinator is killed for good."""
    (tmp_path / "run.toml").write_text(RUN)
    first = thinwire(
        *("coordinator", "run.toml", "--state", "first", "--host", "127.0.0.1"),
        *("--seats", "3", "--ticket-file", "ticket"),
    )
    ticket = first.first_line()
    beside = ("--coordinate", str(tmp_path / "first/seat-ticket"), "--host", "127.0.0.1", "--json")
    nodes = [
        thinwire("join", ticket, "--threads", "1", "--state", str(tmp_path / f"node-{i}"), *beside)
        for i in range(2)
    ]
    whole = lambda: Ticket.parse((tmp_path / "ticket").read_text())  # noqa: E731
    wait_until(lambda: len(whole().seats) == 3, 90, lambda: first.stderr()[-2000:] + nodes[0].stderr())
    with StatusClient(whole()) as client:
        wait_until(lambda: client.fetch()["state"] == "training", WAIT_S, first.stderr)
        first.process.kill()
        killed_at = client.fetch()["round"]
        wait_until(lambda: client.fetch()["round"] > killed_at + 5, WAIT_S, nodes[0].stderr)
        leader = client.fetch()["seat"]["leader"]
    folders = [folder for folder in tmp_path.glob("node-*-seat/*") if (folder / "key").exists()]
    (leads,) = [f for f in folders if peer_id_of(load_or_create(f / "key").public_key()) == leader]
    assert [(run.kind, run.is_running) for run in local_runs(folders)] == [("coordinator", True)] * 2
    assert here("run", str(leads), "stop")[0] == 0
    results = [node.wait(WAIT_S) for node in nodes]
    assert results == [0, 0], nodes[0].stderr()[-2000:] + nodes[1].stderr()[-2000:]
    fingerprints = {json.loads(node.stdout())["fingerprint"] for node in nodes}
    assert len(fingerprints) == 1
    assert "coordinator: " in nodes[0].stderr()
