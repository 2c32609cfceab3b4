"""A training loop of one's own, over links of this process: rounds, leaving, and what users get wrong."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.support.local_nodes import wait_for
from tests.support.loop_nodes import STRATEGIES, Net, examples, loss_of, node, other_node, status_of, swarm_of
from thinwire.compression.errors import ConfigError, Incompatible
from thinwire.node.links.local import LocalSwarm
from thinwire.node.loop.swarm import Outcome
from thinwire.node.snapshots.store import SnapshotStore


def saved_rounds(run: LocalSwarm, folder: Path) -> list[int]:
    """Of the snapshots in a node's folder."""
    return [stored.round for stored in SnapshotStore(folder / "snapshots", run.run_id).stored()]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_loops_train_the_same_replica(tmp_path: Path, strategy: str) -> None:
    model = Net()
    with (
        swarm_of(tmp_path, model, strategy, min_peers=2) as run,
        other_node(run.link("b")) as others,
        node(run.link("a"), model) as swarm,
    ):
        assert (swarm.round, swarm.rounds, swarm.is_over) == (0, 6, False)
        outcomes = list(swarm)
        assert swarm.is_over
        wait_for(lambda: len({p["fingerprint"] for p in status_of(run)["peers"]}) == 1)
        assert {p["fingerprint"] for p in status_of(run)["peers"]} == {swarm.fingerprint}
    assert [o.round for o in outcomes] == [o.round for o in others] == [1, 2, 3, 4, 5, 6]
    assert all(o.counted and o.peers == 2 and o.loss is not None and o.rounds == 6 for o in outcomes)
    assert [o.lr for o in outcomes[:-1]] == [o.lr for o in others[:-1]]
    assert swarm.result is not None
    assert swarm.result.counted == 6


def test_the_model_has_the_swarm_s_weights_when_it_is_entered(tmp_path: Path) -> None:
    """A late one, too, before its first round; and users may look at them in the loop, in any mode."""
    first, late = Net(), Net()
    with swarm_of(tmp_path, first, min_peers=1, rounds=5) as run, node(run.link("a"), first) as swarm:
        next(swarm)
        wait_for(lambda: run.service.head == 2)  # the offer was under way when `next` returned
        with node(run.link("b"), late) as second:
            assert second.round == 2
            assert next(swarm).round == 2
            there = dict(first.named_parameters())
            assert all(torch.equal(p, there[name]) for name, p in late.named_parameters())
        first.eval()
        with torch.no_grad():
            loss_of(first, examples(3)[0])
        for outcome in swarm:
            assert first.training == (outcome.round < 5), "set again for the next round's work"
            first.eval()


def test_leaving_in_the_middle_saves_the_replica_and_comes_back(tmp_path: Path) -> None:
    """`break`, and an error in the body: what the node had is on its disk, momentum and all."""
    model = Net()
    with swarm_of(tmp_path, model, min_peers=1) as run:
        with node(run.link("a"), model, folder=tmp_path / "a") as swarm:
            assert [next(swarm).round for _ in range(3)] == [1, 2, 3]
            wait_for(lambda: run.service.head == 4)
        assert saved_rounds(run, tmp_path / "a")[-1] == 3

        def breaks() -> None:
            with node(run.link("a"), Net(), folder=tmp_path / "a") as swarm:
                assert swarm.round == 4, "its last offer counted after it had left"
                next(swarm)
                1 / 0  # noqa: B018

        with pytest.raises(ZeroDivisionError):
            breaks()
        with node(run.link("a"), Net(), folder=tmp_path / "a") as swarm:
            assert swarm.round == 6
            assert list(swarm) == []
        with node(run.link("late"), model) as swarm:
            assert swarm.is_over
            assert list(swarm) == []
            swarm.save(tmp_path / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(p, saved[name]) for name, p in model.named_parameters())
    with pytest.raises(ConfigError, match=r"no-folder.* cannot be written"):
        swarm.save(tmp_path / "no-folder/model.safetensors")


@pytest.fixture
def _ctrl_c() -> Iterator[None]:
    """As in a terminal, also where the tests run in a background job."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c")
def test_ctrl_c_waits_until_the_replica_is_safe(tmp_path: Path) -> None:
    model = Net()

    def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if swarm.round == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return loss_of(model, batch)

    with swarm_of(tmp_path, model, min_peers=1) as run:
        swarm = node(run.link("a"), model, folder=tmp_path / "a", loss=loss)
        with pytest.raises(KeyboardInterrupt), swarm:
            list(swarm)
        assert saved_rounds(run, tmp_path / "a")[-1] == swarm.round == 2
        assert not run.members()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_in_the_loss_leaves_the_swarm(tmp_path: Path) -> None:
    """spsa moves the parameters while it asks for losses: the replica is not saved as it is then."""

    def breaks(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if swarm.round == 3:
            raise ZeroDivisionError
        return loss_of(model, batch)

    model = Net()
    with swarm_of(tmp_path, model, "spsa", min_peers=1, rounds=50) as run:
        swarm = node(run.link("a"), model, folder=tmp_path / "a", loss=breaks)
        with pytest.raises(ZeroDivisionError), swarm:
            list(swarm)
        assert not run.members()
        assert saved_rounds(run, tmp_path / "a")[-1] == 2, "the snapshot before"
        with node(run.link("a"), Net(), folder=tmp_path / "a") as swarm:
            assert swarm.round == 3
            assert [next(swarm).round, next(swarm).round] == [4, 5]


def test_a_model_that_was_changed_between_rounds_is_refused_and_not_saved(tmp_path: Path) -> None:
    model = Net()
    with swarm_of(tmp_path, model, min_peers=1) as run:

        def changes() -> None:
            with node(run.link("a"), model, folder=tmp_path / "a") as swarm:
                for _ in swarm:
                    torch.nn.init.ones_(model.down.bias)

        with pytest.raises(ConfigError, match=r"changed between rounds \(down.bias\).*Work on a copy"):
            changes()
        assert saved_rounds(run, tmp_path / "a") == []
        with node(run.link("a"), Net(), folder=tmp_path / "a") as swarm:
            assert [outcome.round for outcome in swarm][-1] == 6


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    other = nn.Sequential(nn.Linear(16, 4))
    with (
        swarm_of(tmp_path, Net(), min_peers=1) as run,
        pytest.raises(Incompatible, match=r"the run has no parameter 0\.weight"),
        node(run.link("a"), other),
    ):
        pass
    assert not run.members()


def test_the_held_out_loss_is_measured_by_the_node_s_own_function(tmp_path: Path) -> None:
    model, modes = Net(), []

    def evaluate(model: nn.Module) -> float:
        modes.append((model.training, torch.is_grad_enabled()))
        return 0.25

    with swarm_of(tmp_path, model, min_peers=1, eval_every=3, evaluated=True) as run:
        with pytest.raises(ConfigError, match=r"give join\(evaluate="), node(run.link("a"), model):
            pass
        with node(run.link("b"), model, evaluate=evaluate) as swarm:
            outcomes: list[Outcome] = list(swarm)
        wait_for(lambda: len(status_of(run)["held_out"]) == 2)
        assert status_of(run)["held_out"] == [[3, 0.25], [6, 0.25]]
    assert len(outcomes) == 6
    assert set(modes) == {(False, False)}


def test_a_swarm_says_how_it_is_used(tmp_path: Path) -> None:
    with swarm_of(tmp_path, Net(), min_peers=1) as run:
        swarm = node(run.link("a"), Net())
        with pytest.raises(RuntimeError, match="enter the swarm first"):
            next(swarm)
        with swarm:
            next(swarm)
        with pytest.raises(RuntimeError, match="call join"), swarm:
            pass
