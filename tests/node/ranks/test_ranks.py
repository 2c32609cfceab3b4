"""Nodes of several ranks: what they send, keep and say is what a node of one rank would, whatever breaks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support.paths import ROOT
from tests.support.waiting import wait_until
from thinwire.compression.base import Part
from thinwire.compression.errors import ConfigError, ReplicaDiverged
from thinwire.coordinator.protocol.identity import new_key, peer_id_of
from thinwire.coordinator.protocol.ticket import Ticket
from thinwire.node.cli.main import main
from thinwire.node.config import Task as TaskOptions
from thinwire.node.genesis import base_bytes
from thinwire.node.ranks.collective_errors import collective_errors
from thinwire.node.ranks.sharding import blocks_of
from thinwire.node.snapshots.format import data_of
from thinwire.node.snapshots.parts import read_parts, write_parts
from thinwire.node.tasks.base import Rows
from thinwire.node.tasks.text import TextTask

RUN = """
[run]
rounds = {rounds}
min_peers = 2
verify_every = 5
snapshot_every = 5
[task]
layers = 1
width = 16
heads = 2
context = 16
batch = 4
held_out_bytes = 2048
[strategy]
name = "decoupled"
lr = 1e-3
[strategy.compressor]
name = "dct_topk"
[network]
heartbeat_s = 0.5
"""


# -------------------------------------------------------------------------------------- without processes


@given(st.integers(1, 20), st.integers(1, 8), st.integers(0, 2**32))
def test_the_mean_over_the_ranks_is_that_of_the_batch(n: int, ranks: int, seed: int) -> None:
    losses = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    shares = [Rows.of(n, rank, ranks) for rank in range(ranks)]
    mean = sum(float(losses[s.slice].mean()) * s.weight for s in shares) / ranks
    assert mean == pytest.approx(float(losses.mean()), rel=1e-12)
    seen = [row for s in shares if s.weight > 0 for row in range(n)[s.slice]]
    assert seen == list(range(n))
    assert all(s.first < s.stop for s in shares)  # everybody has something to compute


def test_a_rank_computes_its_rows_of_the_same_batch() -> None:
    options = TaskOptions(layers=1, width=16, heads=2, context=8, batch=5, held_out_bytes=1024)
    task = TextTask(options, None)
    task.load(None, task.held_out())
    torch.manual_seed(0)
    model = task.model().double()
    with torch.no_grad():
        whole = float(task.draw(model, 7)())
        for ranks in (2, 3, 7):
            shares = [float(task.draw(model, 7, rank, ranks)()) for rank in range(ranks)]
            assert sum(shares) / ranks == pytest.approx(whole, rel=1e-6)
            evaluated = [task.evaluate(model, rank, ranks) for rank in range(ranks)]
            assert sum(evaluated) / ranks == pytest.approx(task.evaluate(model), rel=1e-6)


def rows_of(tensor: Tensor, rank: int, ranks: int) -> tuple[Tensor, Part]:
    """As `fully_shard` deals them; scalars are whole everywhere."""
    shape = tuple(tensor.shape)
    if not shape:
        return tensor, Part.whole(shape)
    each = -(-shape[0] // ranks)
    first, stop = (min(each * r, shape[0]) for r in (rank, rank + 1))
    row = tensor[0].numel()
    return tensor[first:stop], Part(shape, first * row, stop * row)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_a_snapshot_in_parts_has_the_bytes_of_one_in_one_piece(tmp_path: Path, ranks: int) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = {"b": (5, 3), "a": (7,), "scalar": (), "one row": (1, 4), "b:moment": (5, 3)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    path = tmp_path / "data"
    for rank in reversed(range(ranks)):  # in any order
        both = {name: rows_of(t, rank, ranks) for name, t in tensors.items()}
        mine, parts = {n: t for n, (t, _) in both.items()}, {n: p for n, (_, p) in both.items()}
        write_parts(path, mine, parts, is_first=rank == 0)
    assert path.read_bytes() == b"".join(data_of(tensors)) == base_bytes(tensors)
    for rank in range(ranks):
        both = {name: rows_of(t, rank, ranks) for name, t in tensors.items()}
        read = read_parts(path, {n: p for n, (_, p) in both.items()})
        assert all(torch.equal(read[name], t) for name, (t, _) in both.items())


def test_parts_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"".join(data_of({"a": torch.zeros(4, 2)})))
    for other in ({"a": (4, 3)}, {"b": (4, 2)}, {"a": (4, 2), "b": (1,)}):
        with pytest.raises(ReplicaDiverged, match="layout"):
            read_parts(path, {name: Part.whole(shape) for name, shape in other.items()})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ReplicaDiverged, match="does not fit"):
        read_parts(path, {"a": Part.whole((4, 2))})


class _Two:
    """The other rank of two has answered already."""

    index, count = 1, 2

    def __init__(self, other: bytes) -> None:
        self.other = other
        self.own = b"nothing"

    def gather(self, data: bytes) -> list[bytes]:
        self.own = data
        return [self.other, data]


def test_what_fails_on_one_rank_fails_on_the_other() -> None:
    first: Any = _Two(b"")
    with pytest.raises(ReplicaDiverged, match="own"), collective_errors(first):
        raise ReplicaDiverged("its own")
    second: Any = _Two(first.own)
    with pytest.raises(ReplicaDiverged, match="rank 0: its own"), collective_errors(second):
        pass
    fine: Any = _Two(b"")
    with collective_errors(fine):
        pass
    assert fine.own == b""
    full: Any = _Two(b"")
    with pytest.raises(OSError, match="disk"), collective_errors(full):
        raise OSError(28, "the disk is full")
    with pytest.raises(OSError, match=r"rank 0: .*disk"), collective_errors(_Two(full.own)):  # type: ignore[arg-type]
        pass


def test_blocks_are_the_elements_of_the_outermost_lists_or_what_the_task_says() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Layer(), Layer()])
            self.activations = nn.ModuleList([nn.ReLU()])
            self.head = nn.Linear(2, 2)

    class Says:
        def blocks(self, model: Any) -> list[nn.Module]:
            return [model.head]

    net = Net()
    task: Any = object()
    says: Any = Says()
    assert blocks_of(task, net) == ["layers.0", "layers.1"]
    assert blocks_of(says, net) == ["head"]
    net._no_split_modules = ["Linear"]  # type: ignore[assignment]
    assert blocks_of(task, net) == [f"layers.{i}.experts.{j}" for i in (0, 1) for j in (0, 1)] + ["head"]


def test_a_block_that_shares_a_parameter_stays_with_the_root() -> None:
    net = nn.Module()
    net.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)])
    net.layers[2].weight = net.layers[0].weight
    assert blocks_of(object(), net) == ["layers.1"]  # type: ignore[arg-type]
    net.head = nn.Linear(3, 3)
    net.head.bias = net.layers[1].bias
    assert blocks_of(object(), net) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--ranks", "0"], "--ranks 0: between 1 and"),
        (["--cpu-offload"], "--cpu-offload: this node trains on the CPU"),
        (["--restart", "-1"], "--restart -1"),
        (["--ranks", "2", "--device", "mps"], "several ranks need cpu or cuda"),
    ],
)
def test_what_cannot_be_is_refused(
    args: list[str], why: str, capsys: pytest.CaptureFixture[str], ticket: str
) -> None:
    assert main(["join", ticket, *args]) == ConfigError.exit_code
    assert why in capsys.readouterr().err


@pytest.fixture
def ticket() -> str:
    peer_id = peer_id_of(new_key().public_key())
    address = "/ip4/127.0.0.1/tcp/1"
    return Ticket(peer_id=peer_id, run_id=bytes(32), token="t" * 32, addresses=(address,)).line()


# ----------------------------------------------------------------------------------------- real processes


@pytest.mark.swarm
@pytest.mark.timeout(200)
def test_nodes_of_one_and_of_two_ranks_have_the_same_replica(tmp_path: Path) -> None:
    """And the same bytes on disk; each begins from the other's snapshot, and from base weights. One that is
    wrong in a rank's rows is healed."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in (0, 1):
        with (tmp_path / f"{rank}.err").open("wb") as err:
            command = [sys.executable, "-m", "tests.support.node_ranks", str(rank), "2", str(tmp_path)]
            ranks.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, env=env, cwd=ROOT))
    try:
        out = [process.communicate(timeout=150)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    errors = [(tmp_path / f"{rank}.err").read_text() for rank in (0, 1)]
    assert [process.returncode for process in ranks] == [0, 0], errors
    results = json.loads(out[0])
    assert set(results) == {"decoupled", "spsa", "diloco", "healed"}
    assert "was wrong after round 6, in head.weight: healed" in errors[0]
    for name, result in results.items():
        rounds = 24 if name == "healed" else 6
        assert result["rounds"] == [rounds, rounds], name
        for what in ("fingerprints", "data", "weights", "loaded", "begun"):
            one, two = result[what]
            assert one == two, (name, what)
        assert result["loaded"] == result["fingerprints"], name
        assert result["begun"] != result["loaded"] or name != "diloco"  # its outer momentum begins at zero
        one, two = (dict(manifests) for manifests in result["manifests"])
        assert max(one) == max(two) == rounds
        assert {r: one[r] for r in one.keys() & two.keys()} == {r: two[r] for r in one.keys() & two.keys()}, (
            name
        )
        if name != "healed":  # who replays writes no snapshots until it is near the head again
            assert sorted(one) == sorted(two) == [rounds - 4, rounds - 2, rounds]
        assert result["local"] == [["local"], ["local.0-of-2", "local.1-of-2"]]
        assert result["local_is_taken"] == [False, True]
        of_one, of_two = result["agreements"]
        assert of_one == pytest.approx(of_two, abs=0.05), (name, "they audit together")
        if name != "diloco":  # overlapped inner steps leave no time to look
            assert len(of_one) == 2
            assert min(of_one) > 0.1
        assert 0 < sum(result["held_out"]) <= 1 + rounds // 3  # one who is behind when asked does not measure


Start = Callable[..., Any]


@pytest.mark.swarm
@pytest.mark.timeout(240)
def test_a_rank_is_killed_and_the_swarm_goes_on(thinwire: Start, tmp_path: Path) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text(RUN.format(rounds=1_000_000))
    coordinator = thinwire("coordinator", str(run_file), "--state", "coordinator", "--host", "127.0.0.1")
    ticket = coordinator.first_line()
    node = ("join", "-", "--host", "127.0.0.1", "--threads", "1")
    single = thinwire(*node, "--state", "single", line=ticket)
    several = thinwire(*node, "--state", "several", "--ranks", "2", line=ticket)
    several.wait_for("round 12/")
    leader, follower = ranks_of(several)
    os.kill(follower, signal.SIGKILL)
    assert several.wait(60) == 1
    told = several.stderr().split("thinwire: ")[-1]
    assert told.startswith("rank 1 failed: killed by SIGKILL"), several.stderr()
    assert "starts the node again from its snapshot" in told
    assert not psutil.pid_exists(leader)
    assert not list((tmp_path / "several").glob(".ranks-*"))

    round_ = last_round(single)
    wait_until(lambda: last_round(single) >= round_ + 20, 60, single.stderr)
    again = thinwire(*node, "--state", "several", "--ranks", "2", line=ticket)
    again.wait_for("from this node's disk", 60)
    again.wait_for("loss", 60)
    again.process.send_signal(signal.SIGINT)
    assert again.wait(60) == 130, again.stderr()
    assert "leaving cleanly" in again.stderr()
    assert not list((tmp_path / "several").glob(".ranks-*"))
    assert "failed" not in again.stderr()
    for program in (single, coordinator):
        program.process.send_signal(signal.SIGINT)
        assert program.wait(60) == 130, program.stderr()


def ranks_of(node: Any) -> list[int]:
    """Process ids of its ranks, rank 0 first."""
    children = psutil.Process(node.process.pid).children()
    ranks = [c for c in children if "thinwire.node.ranks.process" in c.cmdline()]
    return [c.pid for c in sorted(ranks, key=lambda c: c.create_time())]


def last_round(node: Any) -> int:
    return int(re.findall(r"round (\d+)/", node.stderr())[-1])
