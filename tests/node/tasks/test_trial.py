"""Models of users' own tasks: buffers, memory that is shared, views, other types; at the coordinator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from tests.support.local_nodes import KEY, run_all
from thinwire.compression.errors import ConfigError
from thinwire.coordinator.protocol.identity import peer_id_of
from thinwire.node.config import RunConfig
from thinwire.node.genesis import Genesis, make_genesis
from thinwire.node.links.local import local_swarm
from thinwire.node.runner import Runner
from thinwire.node.tasks.base import Init

SPSA = {"name": "spsa", "lr": 1e-2, "probes": 2}
DECOUPLED = {"name": "decoupled", "lr": 1e-2, "compressor": {"name": "dense"}}
DILOCO = {"name": "diloco", "inner_steps": 2}


class OwnTask:
    """Regression of rows of 4 numbers by the model that `make` makes."""

    n_samples = n_tokens = 8

    def __init__(self, make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> None:
        self._make, self._dtype = make, dtype

    def model(self) -> nn.Module:
        return self._make()

    def init(self, name: str, shape: tuple[int, ...]) -> Init:
        return Init("normal", 0.3)

    def held_out(self) -> bytes | None:
        return b"yes"

    def corpus(self) -> bytes | None:
        return None

    def load(self, corpus: bytes | None, held_out: bytes | None) -> None: ...

    def draw(self, model: nn.Module, seed: int) -> Callable[[], Tensor]:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed % 2**62)).to(self._dtype) + 3
        return lambda: functional.mse_loss(model(x).float(), x.float().sum(1, keepdim=True))

    def evaluate(self, model: nn.Module) -> float:
        with torch.no_grad():
            return float(self.draw(model, 1)())


class Normed(nn.Module):
    """With statistics that training changes and a buffer that stays; its head has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.register_buffer("factor", torch.tensor([2.0]))
        self.head = nn.Linear(4, 1)
        self.tail = self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.inner(x)) * self.factor  # type: ignore[no-any-return]


class Frozen(Normed):
    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.inner[1].eval()
        return self


def run_of(strategy: dict[str, Any], **run: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"rounds": 3, "verify_every": 1, "snapshot_every": 1, "eval_every": 1, **run},
            "task": {"name": "custom"},
            "strategy": strategy,
            "policy": {"name": "all"},
        }
    )


def genesis_of(task: OwnTask, strategy: dict[str, Any], **run: Any) -> Genesis:
    return make_genesis(run_of(strategy, **run), task, peer_id_of(KEY.public_key()), 1)


# -------------------------------------------------------------------------------------------- buffers


@pytest.mark.parametrize("strategy", [DECOUPLED, DILOCO, {"name": "gossip"}], ids=lambda s: str(s["name"]))
def test_buffers_that_training_changes_are_refused_by_name(strategy: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"inner\.1\.running_mean.*GroupNorm.*spsa"):
        genesis_of(OwnTask(Normed), strategy)
    genesis_of(OwnTask(Frozen), strategy)


def test_without_a_batch_at_the_coordinator_torch_s_own_layers_are_known() -> None:
    class Elsewhere(OwnTask):
        def draw(self, model: nn.Module, seed: int) -> Callable[[], Tensor]:
            raise FileNotFoundError("data that nodes have")

    with pytest.raises(ConfigError, match=r"inner\.1\.running_mean"):
        genesis_of(Elsewhere(Normed), DECOUPLED)
    genesis_of(Elsewhere(Frozen), DECOUPLED)


def test_spsa_keeps_statistics_of_the_base_and_files_load_strictly(tmp_path: Path) -> None:
    """The late joiner begins with a snapshot, in which there are no buffers."""
    base = {n: t.clone() for n, t in Normed().state_dict().items() if not n.startswith("tail.")}
    base["inner.1.running_mean"] += 5
    save_file(base, tmp_path / "base.safetensors")
    genesis = genesis_of(OwnTask(Normed), SPSA, base=str(tmp_path / "base.safetensors"), min_peers=2)
    with local_swarm(tmp_path, genesis.body, KEY, blobs=genesis.blobs) as swarm:
        runners = [Runner(swarm.link(f"peer-{i}"), task=OwnTask(Normed)) for i in range(2)]
        run_all(runners)
        runners[0].replica.save_weights(tmp_path / "saved.safetensors")
    saved = load_file(tmp_path / "saved.safetensors")
    assert saved.keys() == runners[1].replica.weights().keys()
    assert all(torch.equal(saved[n], w) for n, w in runners[1].replica.weights().items())
    model = Normed()
    model.load_state_dict(saved, strict=True)
    assert torch.equal(saved["inner.1.running_mean"], base["inner.1.running_mean"])
    assert not torch.equal(saved["head.weight"], base["head.weight"])
    assert OwnTask(Normed).evaluate(model.eval()) == runners[0].work.evaluate()


def test_a_base_with_another_buffer_s_shape_or_an_unknown_type_is_named(tmp_path: Path) -> None:
    base = {n: t.clone() for n, t in Normed().state_dict().items() if not n.startswith("tail.")}
    path = tmp_path / "base.safetensors"
    save_file({**base, "factor": torch.zeros(2)}, path)
    with pytest.raises(ConfigError, match=r"buffer factor is \[2\]"):
        genesis_of(OwnTask(Normed), SPSA, base=str(path))
    save_file({**base, "factor": torch.tensor([torch.inf])}, path)

    def narrow() -> nn.Module:
        model = Normed()
        model.factor = model.factor.to(torch.float8_e4m3fn)  # torch 2.13 makes 448 of infinity
        return model

    genesis_of(OwnTask(Normed), SPSA, base=str(path))
    with pytest.raises(ConfigError, match=r"buffer factor has values that are not finite"):
        genesis_of(OwnTask(narrow), SPSA, base=str(path))
    save_file({**base, "scale": torch.zeros(2, dtype=torch.uint8)}, path)
    path.write_bytes(path.read_bytes().replace(b'"U8"', b'"F4"'))
    with pytest.raises(ConfigError, match=r"base\.safetensors: .*(read|type)"):
        genesis_of(OwnTask(Normed), SPSA, base=str(path))


# ----------------------------------------------------------------------------------- memory and types


class Viewed(nn.Module):
    """Parameters that are views: a transposed one, and one of stride 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 3).t())
        self.bias = nn.Parameter(torch.zeros(1).expand(3))
        self.head = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.linear(x, self.weight, self.bias))  # type: ignore[no-any-return]


@pytest.mark.parametrize("strategy", [SPSA, DECOUPLED, DILOCO], ids=["spsa", "decoupled", "diloco"])
def test_parameters_that_are_views_train(tmp_path: Path, strategy: dict[str, Any]) -> None:
    genesis = genesis_of(OwnTask(Viewed), strategy, min_peers=2)
    with local_swarm(tmp_path, genesis.body, KEY, blobs=genesis.blobs) as swarm:
        runners = [Runner(swarm.link(f"peer-{i}"), task=OwnTask(Viewed)) for i in range(2)]
        results = run_all(runners)
    assert len({r.fingerprint for r in results}) == 1
    assert runners[0].replica.weights()["bias"].unique().numel() == 3


def test_parameters_over_the_same_memory_are_named() -> None:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
        model.other = nn.Parameter(model[0].weight.detach().t())
        return model

    with pytest.raises(ConfigError, match=r"0\.weight and other share memory|other and 0\.weight share"):
        genesis_of(OwnTask(make), DECOUPLED)


@pytest.mark.parametrize("strategy", [SPSA, DECOUPLED], ids=["spsa", "decoupled"])
def test_a_task_in_bfloat16_trains_or_is_told_why_not(strategy: dict[str, Any]) -> None:
    task = OwnTask(lambda: nn.Linear(4, 1).bfloat16(), torch.bfloat16)
    with pytest.raises(ConfigError, match=r"parameter weight in bfloat16, .*float32 by run\.dtype"):
        genesis_of(task, strategy)
    genesis_of(task, strategy, dtype="bfloat16")
    genesis_of(OwnTask(lambda: nn.Linear(4, 1).bfloat16()), strategy)


# ------------------------------------------------------------------------------- nodes that go wrong


class Broken(OwnTask):
    """Has nothing but NaN to train on, or fails at its first batch on a node."""

    def __init__(self, error: Exception | None) -> None:
        super().__init__(Viewed)
        self._error = error

    def draw(self, model: nn.Module, seed: int) -> Callable[[], Tensor]:
        if self._error is not None:
            raise self._error
        closure = super().draw(model, seed)
        return lambda: closure() * float("nan")


@pytest.mark.parametrize("strategy", [SPSA, DECOUPLED, DILOCO], ids=["spsa", "decoupled", "diloco"])
def test_a_node_with_nothing_but_nan_hears_it_and_is_not_counted(
    tmp_path: Path, strategy: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    genesis = genesis_of(OwnTask(Viewed), strategy, min_peers=2)
    with local_swarm(tmp_path, genesis.body, KEY, blobs=genesis.blobs) as swarm:
        tasks = [OwnTask(Viewed), Broken(None)]
        runners = [Runner(swarm.link(f"peer-{i}"), task=task) for i, task in enumerate(tasks)]
        results = run_all(runners)
        counted = {
            p["peer_id"]: p["offers_counted"]
            for p in swarm.call(lambda service, now_s: service.status(now_s))["peers"]
        }
    assert results[0].counted > results[1].counted == 0
    assert counted == {"peer-0": results[0].counted, "peer-1": 0}
    assert len({r.fingerprint for r in results}) == 1
    (warned,) = [r.getMessage() for r in caplog.records if "contributes nothing" in r.getMessage()]
    assert "round 1" in warned


def test_the_coordinator_shows_the_error_that_all_nodes_end_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    genesis = genesis_of(OwnTask(Viewed), DECOUPLED, min_peers=1)
    with local_swarm(tmp_path, genesis.body, KEY, blobs=genesis.blobs) as swarm:
        with pytest.raises(RuntimeError, match="shapes"):
            Runner(swarm.link("peer-0"), task=Broken(RuntimeError("shapes\ndiffer" + "!" * 5000))).run()
        errors = swarm.call(lambda service, now_s: service.status(now_s))["errors"]
        with pytest.raises(ConfigError):
            Runner(swarm.link("peer-1"), task=Broken(ConfigError("no data"))).run()
        assert "no data" in swarm.call(lambda service, now_s: service.status(now_s))["errors"][-1]
    assert len(errors) == 1
    assert "RuntimeError: shapes differ!" in errors[0]
    assert len(errors[0]) < 250
    assert any(r.levelname == "ERROR" and "RuntimeError" in r.getMessage() for r in caplog.records)
