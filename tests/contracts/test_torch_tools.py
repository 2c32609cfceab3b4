"""What torch, transformers and accelerate do with an optimizer works with every strategy, bit for bit: its
state through their hands, schedulers, hooks, loss scaling, copies. Without a swarm and without processes;
sharded parameters are in tests/optim/parts/test_sharded.py.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.group_ranks import CONFIGS, backward, batch_loss, net, print_of
from thinwire.compression.errors import ConfigError
from thinwire.optim.base import Strategy
from thinwire.optim.registry import build_strategy

WITH_GRADIENTS = [name for name in CONFIGS if name != "spsa"]
WHOLE = 4
"""Steps, after which no round of any of them is under way."""


@pytest.fixture(params=CONFIGS)
def row(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def made(row: str, seed: int = 0) -> tuple[nn.Module, Strategy]:
    model = net(seed)
    return model, build_strategy(CONFIGS[row], model.named_parameters())


def train(model: nn.Module, optimizer: Strategy, steps: range) -> str:
    for step in steps:
        loss = batch_loss(model, 0, step)
        if optimizer.needs_grad:
            backward(loss())
            optimizer.step()
            optimizer.zero_grad()
        else:
            optimizer.step(loss)
    return print_of(optimizer)


def assert_same(a: Any, b: Any) -> None:
    """Types, keys and bits."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert (
            a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8)) if a.ndim else a.equal(b)
        )
    else:
        assert a == b


# ------------------------------------------------------------------------ torch.distributed.checkpoint


@pytest.mark.parametrize("n_steps", [3, WHOLE], ids=["within a round", "between rounds"])
def test_the_checkpoint_tools_carry_all_of_a_state(row: str, n_steps: int) -> None:
    """By the names of parameters, through a file of tensors; what goes on from it ends with the same bits."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optimizer = made(row)
    train(model, optimizer, range(1, n_steps + 1))
    expected = copy.deepcopy(optimizer.state_dict())
    weights, found = get_state_dict(model, optimizer)
    assert set(found) == {"state", "param_groups"}
    assert set(found["state"]) <= {name for name, _ in model.named_parameters()}
    file = io.BytesIO()
    torch.save((weights, found), file)
    file.seek(0)
    weights, found = torch.load(file, weights_only=True)
    other, successor = made(row, seed=1)
    train(other, successor, range(5, 7))  # it had a state of its own
    set_state_dict(other, successor, model_state_dict=weights, optim_state_dict=found)
    assert successor.counters == optimizer.counters
    assert_same(successor.state_dict(), expected)
    assert "counters" not in successor.param_groups[0]
    steps = range(n_steps + 1, n_steps + 4)
    assert train(other, successor, steps) == train(model, optimizer, steps)


def test_the_tools_make_no_round_of_their_own(row: str) -> None:
    """Of an optimizer without a state they would make a step of zero gradients."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model, optimizer = made(row)
    before = copy.deepcopy(model.state_dict())
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.counters == {}
    assert all(p.grad is None for p in model.parameters())
    assert_same(dict(model.state_dict()), dict(before))
    assert train(model, optimizer, range(1, 4)) == train(*made(row), range(1, 4))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # it is meant to be
def test_a_distributed_checkpoint_holds_it_between_rounds(row: str, tmp_path: Path) -> None:
    """A loader fills in what a new optimizer has; what it cannot fill in is refused, never forgotten."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def through_files(optimizer: Strategy, model: nn.Module, name: str) -> Strategy:
        dcp.save({"o": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path / name)
        successor = build_strategy(CONFIGS[row], model.named_parameters())
        template = {"o": get_optimizer_state_dict(model, successor)}
        dcp.load(template, checkpoint_id=tmp_path / name)
        set_optimizer_state_dict(model, successor, template["o"])
        return successor

    model, optimizer = made(row)
    train(model, optimizer, range(1, WHOLE + 1))
    if row == "diloco":  # it has an inner optimizer's state, that a new one has not
        with pytest.raises(
            ConfigError, match=r"an incomplete state: .* save after a whole round, or with torch"
        ):
            through_files(optimizer, model, "a")
        return
    successor = through_files(optimizer, model, "a")
    assert_same(successor.state_dict(), optimizer.state_dict())


def test_a_state_that_was_cut_is_refused(row: str) -> None:
    model, optimizer = made(row)
    train(model, optimizer, range(1, WHOLE + 1))
    whole = optimizer.state_dict()
    cut = {"state": whole["state"], "param_groups": [dict(g) for g in whole["param_groups"]]}
    assert json.loads(cut["param_groups"][0]["counters"])["counters"] == optimizer.counters
    for bad in ("no json", "[]", "{}", 7, '{"counters": {"steps": "x"}}'):
        cut["param_groups"][0]["counters"] = bad
        with pytest.raises(ConfigError, match="a state without its counters"):
            optimizer.load_state_dict(cut)
    with pytest.raises(ConfigError, match=r"the state of another model: \['nobody'\]"):
        optimizer.load_state_dict({**whole, "state": {"nobody": {}}})
    plain = torch.optim.SGD(model.parameters(), lr=0.1).state_dict()
    with pytest.raises(ConfigError, match="the state of another optimizer: it"):
        optimizer.load_state_dict(plain)


# --------------------------------------------------------------------------------- files and copies


def test_a_state_goes_through_a_file_of_tensors(row: str) -> None:
    model, optimizer = made(row)
    train(model, optimizer, range(1, 4))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    successor = build_strategy(CONFIGS[row], other.named_parameters())
    successor.load_state_dict(torch.load(file, weights_only=True))
    assert_same(successor.state_dict(), optimizer.state_dict())
    assert train(other, successor, range(4, 7)) == train(model, optimizer, range(4, 7))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_goes_on_alone(row: str, how: str) -> None:
    model, optimizer = made(row)
    train(model, optimizer, range(1, 4))
    pair = (model, optimizer)
    other, twin = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert_same(twin.state_dict(), optimizer.state_dict())
    expected = train(model, optimizer, range(4, 7))
    assert print_of(twin) != expected
    assert train(other, twin, range(4, 7)) == expected


# ------------------------------------------------------------------------------------- training loops


@pytest.mark.parametrize("row", WITH_GRADIENTS)
def test_schedulers_move_the_rate(row: str) -> None:
    from torch.optim import lr_scheduler

    model, optimizer = made(row)
    warmup = lr_scheduler.LinearLR(optimizer, 0.5, total_iters=2)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    schedule = lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[2])
    rates = []
    for step in range(1, 7):
        train(model, optimizer, range(step, step + 1))
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step()
    assert rates[0] == pytest.approx(1.5e-3)
    assert max(rates) == pytest.approx(3e-3)
    assert rates[-1] < rates[2]
    assert "initial_lr" in optimizer.state_dict()["param_groups"][0]
    successor = build_strategy(CONFIGS[row], net().named_parameters())
    successor.load_state_dict(optimizer.state_dict())
    assert successor.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


def test_hooks_are_called(row: str) -> None:
    model, optimizer = made(row)
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "mine": 1})
    train(model, optimizer, range(1, 2))
    assert called == ["before", "after"]
    assert optimizer.state_dict()["mine"] == 1
    successor = build_strategy(CONFIGS[row], net().named_parameters())
    successor.load_state_dict(optimizer.state_dict())
    assert successor.counters == optimizer.counters


@pytest.mark.parametrize("row", WITH_GRADIENTS)
def test_a_grad_scaler_scales_and_skips(row: str) -> None:
    model, optimizer = made(row)
    plain_model, plain = made(row)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step in range(1, 4):
        scaled: Any = scaler.scale(batch_loss(model, 0, step)())
        scaled.backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert print_of(optimizer) == train(plain_model, plain, range(1, 4)), "powers of two change no bit"
    before = dict(optimizer.counters)
    spoilt: Any = scaler.scale(batch_loss(model, 0, 9)() * float("inf"))
    spoilt.backward()
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.counters == before
    assert scaler.get_scale() == 2.0**7


# ------------------------------------------------------------------------- accelerate and transformers


@pytest.mark.parametrize("row", WITH_GRADIENTS)
def test_accelerate_saves_and_resumes(row: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="nothing of ours needs it")
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(*made(row))
    ours: Strategy = optimizer.optimizer

    def go(steps: range) -> str:
        for step in steps:
            accelerator.backward(batch_loss(model, 0, step)())
            optimizer.step()
            optimizer.zero_grad()
        return print_of(ours)

    go(range(1, 4))
    accelerator.save_state(str(tmp_path / "saved"), safe_serialization=True)
    saved = copy.deepcopy(ours.state_dict())
    expected = go(range(4, 7))
    accelerator.load_state(str(tmp_path / "saved"))
    assert_same(ours.state_dict(), saved)
    assert go(range(4, 7)) == expected
    assert expected == train(*made(row), range(1, 7))


class Regression(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        x = torch.randn(16, generator=torch.Generator().manual_seed(i))
        return {"x": x, "labels": x.view(4, 4).sum(1).argmax()}


class WithLoss(nn.Module):
    """As transformers' Trainer calls a model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("row", WITH_GRADIENTS)
def test_the_trainer_of_transformers_resumes(row: str, tmp_path: Path) -> None:
    """From a checkpoint after 4 of 8 steps it ends where one that went through does."""
    transformers = pytest.importorskip("transformers", reason="an extra")
    pytest.importorskip("accelerate", reason="the Trainer needs it")

    def trainer(folder: Path) -> tuple[Any, Strategy]:
        model = WithLoss()
        optimizer = build_strategy(CONFIGS[row], model.named_parameters())
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
        arguments = transformers.TrainingArguments(
            output_dir=str(folder), max_steps=8, per_device_train_batch_size=8, save_steps=4, seed=3,
            use_cpu=True, report_to=[], disable_tqdm=True, max_grad_norm=0.5, logging_strategy="no",
            dataloader_pin_memory=False,
        )  # fmt: skip
        return transformers.Trainer(
            model, arguments, train_dataset=Regression(), optimizers=(optimizer, schedule)
        ), optimizer

    through, expected = trainer(tmp_path)
    through.train()
    resumed, optimizer = trainer(tmp_path / "again")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert optimizer.counters == expected.counters
    assert print_of(optimizer) == print_of(expected)
    assert_same(optimizer.state_dict(), expected.state_dict())
