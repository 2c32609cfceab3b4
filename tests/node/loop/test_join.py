"""`host` and `join` over libp2p: training loops as processes of their own, one of them killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.loop_nodes import STRATEGIES, Net, examples, loss_of
from tests.support.paths import ROOT
from tests.support.waiting import wait_until
from tests.support.zygote import Forked, zygote
from thinwire.compression.errors import ConfigError, Incompatible
from thinwire.node.loop.api import host, join, load_weights
from thinwire.node.system.processes import PARENT_VARIABLE


class Loop:
    """A process of `loop_node.py`; what it has said is in `lines`."""

    def __init__(self, folder: Path, name: str, ticket: str) -> None:
        self.out, self.err = folder / f"{name}.out", folder / f"{name}.err"
        self.process = self._start([ticket, str(folder / name), "0.01"])

    def _start(self, args: list[str]) -> subprocess.Popen[bytes] | Forked:
        module, forker = "tests.support.loop_node", zygote()
        if forker is not None:
            env = {**os.environ, PARENT_VARIABLE: str(forker.pid)}
            return forker.start(args, cwd=ROOT, env=env, out=self.out, err=self.err, module=module)
        env = {**os.environ, PARENT_VARIABLE: str(os.getpid())}
        with self.out.open("wb") as out, self.err.open("wb") as err:
            command = [sys.executable, "-m", module, *args]
            return subprocess.Popen(command, stdout=out, stderr=err, cwd=ROOT, env=env)

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.read_text().splitlines(keepends=True) if "\n" in line]

    def rounds(self) -> list[int]:
        return [line["round"] for line in self.lines if "round" in line]

    def has_met(self) -> bool:
        """Whether it has counted in one round with another."""
        return any(line.get("counted") and line["peers"] == 2 for line in self.lines)

    def wait(self) -> dict[str, Any]:
        """Its result."""
        assert self.process.wait(60) == 0, self.err.read_text()
        return self.lines[-1]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str, str], Loop]]:
    loops: list[Loop] = []

    def begin(name: str, ticket: str) -> Loop:
        loops.append(Loop(tmp_path, name, ticket))
        return loops[-1]

    yield begin
    for loop in loops:
        loop.process.kill()
        loop.process.wait()


RUN = {
    "run.rounds": 60,
    "run.min_peers": 2,
    "run.verify_every": 5,
    "run.snapshot_every": 10,
    "network.heartbeat_s": 0.5,
    "strategy": STRATEGIES["decoupled"],
}


@pytest.mark.swarm
def test_a_loop_is_killed_and_returns(tmp_path: Path, start: Callable[[str, str], Loop]) -> None:
    """Two processes, this one and another, which is killed."""
    torch.manual_seed(3)
    model = Net()
    with host(model, RUN, state=tmp_path / "state", host="127.0.0.1") as run:
        killed, mine = start("b", run.ticket), Net()
        with join(run.ticket, mine, examples(1), loss_of, state=tmp_path / "a", host="127.0.0.1") as swarm:
            begin = dict(mine.named_parameters())
            assert all(torch.equal(p, begin[name]) for name, p in model.named_parameters())
            again = None
            for outcome in swarm:  # which gives no outcome of a round that it did not see the end of
                if outcome.round >= 10 and killed.process.poll() is None:
                    wait_until(lambda: len(killed.rounds()) >= 5, 60, killed.err.read_text)
                    killed.process.send_signal(signal.SIGKILL)
                    killed.process.wait()
                elif outcome.round >= 20 and again is None:
                    again = start("b", run.ticket)
                    wait_until(lambda: len(again.lines) > 0, 60, again.err.read_text)  # noqa: B023
                elif again is not None and not again.has_met():
                    time.sleep(0.5)  # alone this one would be through before the other has caught up
            fingerprint = swarm.fingerprint
        assert again.wait() == {"fingerprint": fingerprint, "rounds": 60}
        first = again.lines[0]
        assert first["peer_id"] == killed.lines[0]["peer_id"]
        assert first["entered"] >= 20
        assert again.has_met()
        status = run.status()
        assert status["mismatches"] == 0
        assert {p["fingerprint"] for p in status["peers"]} == {fingerprint}
        refused_here(run.ticket, tmp_path)
    for folder in ("state", "a", "b"):
        fresh = Net()
        assert load_weights(tmp_path / folder, fresh) == 60
        there = dict(fresh.named_parameters())
        assert all(torch.equal(p, there[name]) for name, p in mine.named_parameters())
    # The same folder goes on with the run, whatever values the model has now; not with another model.
    with host(Net(), RUN, state=tmp_path / "state", host="127.0.0.1") as run:
        assert run.status()["round"] == 60
    with pytest.raises(Incompatible, match=r"the run has no parameter 0\.bias"):
        host(torch.nn.Sequential(torch.nn.Linear(2, 2)), RUN, state=tmp_path / "state").__enter__()
    with pytest.raises(ConfigError, match=r"run\.rounds is 60 there, 300 here"):
        host(Net(), {**RUN, "run.rounds": 300}, state=tmp_path / "state").__enter__()


def refused_here(ticket: str, folder: Path) -> None:
    """Another model, of which nothing is left open."""
    other = torch.nn.Linear(3, 3)
    with pytest.raises(Incompatible, match="the model differs from the run's"):
        join(ticket, other, examples(0), loss_of, state=folder / "c", host="127.0.0.1").__enter__()


TICKET = "no ticket"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"ticket": TICKET}, "ticket"),
        ({"ticket": "@/nowhere/ticket"}, "No such file"),
        ({"model": dict(Net().named_parameters())}, "a torch.nn.Module is needed, not dict"),
        ({"model": torch.nn.ReLU()}, "on no device"),
        ({"batches": 3}, "an iterable of batches is needed, not int"),
        ({"batches": []}, "`batches` has no batch"),
        ({"batches": [object()]}, "say it with samples="),
        ({"loss": None}, "a function of"),
        ({"samples": -1}, "samples=-1"),
    ],
)
def test_what_cannot_work_is_refused_at_once(changes: dict[str, Any], text: str) -> None:
    arguments = {"ticket": TICKET, "model": Net(), "batches": examples(0), "loss": loss_of, **changes}
    with pytest.raises(ConfigError, match=text):
        join(**arguments)


def test_a_run_of_statistics_that_nobody_shares_is_not_begun(tmp_path: Path) -> None:
    """Before anybody trains, and nothing is left of it: the folder can be used."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"1\.running_mean.*GroupNorm"):
            host(model, RUN, state=tmp_path).__enter__()
    assert all(p.device.type == "cpu" for p in model.parameters())
