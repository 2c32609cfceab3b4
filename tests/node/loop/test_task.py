"""Batches, losses and models of a user's own, as a swarm asks for them."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from tests.support.loop_nodes import Net, examples, loss_of
from thinwire.compression.errors import ConfigError
from thinwire.node.loop.task import LoopTask, on_device, skeleton

NUMBERS = list(range(64))


def drawn(batches: Any, seeds: list[int]) -> list[list[int]]:
    """What the loss is given for these seeds."""
    seen: list[list[int]] = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        seen.append(batch.tolist())
        return next(model.parameters()).sum()

    model = Net()
    before = torch.random.get_rng_state()
    task = LoopTask(model, batches, loss)
    for seed in seeds:
        task.draw(model, seed)()
    assert torch.equal(torch.random.get_rng_state(), before), "the generator is the user's"
    return seen


def test_loaders_that_shuffle_give_every_peer_other_batches() -> None:
    """Scripts set the same seed on every node, for the model: its data would be the same, too."""
    loader: DataLoader[int] = DataLoader(NUMBERS, batch_size=8, shuffle=True)  # type: ignore[arg-type]
    first, other, again = (drawn(loader, [seed, *range(9)]) for seed in (5, 6, 5))
    assert first == again != other
    assert sorted(n for batch in first[:8] for n in batch) == NUMBERS, "an epoch"
    assert first[8] != first[0], "the next one has another order"


def test_an_order_that_is_looked_at_for_its_size_is_nobody_else_s() -> None:
    sampler = BatchSampler(RandomSampler(NUMBERS), 8, drop_last=False)
    loader: DataLoader[int] = DataLoader(NUMBERS, batch_sampler=sampler)  # type: ignore[arg-type]
    assert drawn(loader, [1, 2]) != drawn(loader, [1, 2])


def test_a_list_is_begun_anew_and_a_generator_ends_with_words() -> None:
    batches = [torch.tensor([i]) for i in range(3)]
    assert drawn(batches, list(range(5))) == [[0], [1], [2], [0], [1]]
    with pytest.raises(ConfigError, match=r"no batch \(any more\)"):
        drawn((b for b in batches), list(range(5)))


@pytest.mark.parametrize(
    ("batches", "samples", "expected"),
    [
        (DataLoader(NUMBERS, batch_size=7), None, 7),  # type: ignore[arg-type]
        (DataLoader(NUMBERS, batch_size=7), 3, 3),  # type: ignore[arg-type]
        (examples(0), None, 4),
        ([(torch.zeros(5, 2), torch.zeros(5))], None, 5),
        ([["text", {"ids": torch.zeros(6, 2)}]], None, 6),
    ],
)
def test_how_many_samples_a_batch_has(batches: Any, samples: int | None, expected: int) -> None:
    assert LoopTask(Net(), batches, loss_of, n_samples=samples).n_samples == expected


def test_tensors_inside_of_anything_go_to_the_model_s_device() -> None:
    pair = namedtuple("pair", "x, name")

    class Encoding:
        """As transformers' BatchEncoding: it moves itself."""

        def to(self, device: torch.device) -> str:
            return f"moved to {device}"

    batch = {"a": [torch.zeros(1), 3], "b": pair(torch.zeros(2), "n"), "c": (Encoding(), None)}
    there = on_device(batch, torch.device("meta"))
    assert there["a"][0].device.type == there["b"].x.device.type == "meta"
    assert (there["a"][1], there["b"].name, there["c"]) == (3, "n", ("moved to meta", None))
    assert isinstance(there["b"], pair)


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (lambda model, batch: loss_of(model, batch).item(), "returned float"),
        (lambda model, batch: model(batch["x"]).mean(1), r"of shape \[4\]"),
        (lambda model, batch: loss_of(model, batch).detach(), "without a graph"),
        (lambda model, batch: None, "NoneType"),
    ],
)
def test_what_is_no_loss_is_said(loss: Any, text: str) -> None:
    model = Net()
    with pytest.raises(ConfigError, match=text):
        LoopTask(model, examples(0), loss).draw(model, 0)()


def test_a_loss_of_half_precision_is_taken() -> None:
    model = Net().to(torch.bfloat16)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return loss_of(model, {name: t.to(torch.bfloat16) for name, t in batch.items()})

    assert LoopTask(model, examples(0), loss).draw(model, 0)().dtype == torch.float32


def test_a_skeleton_has_everything_but_values() -> None:
    """Frozen and shared parameters, too; the model itself stays as it is."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), Net())
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    bones = skeleton(model)
    named, there = dict(model.named_parameters()), dict(bones.named_parameters())
    assert list(named) == list(there)
    assert all(p.device.type == "meta" for p in bones.parameters())
    assert {name: p.requires_grad for name, p in there.items()} == {
        name: p.requires_grad for name, p in named.items()
    }
    assert bones[1].weight is bones[0].weight
    assert all(p.device.type == "cpu" for p in model.parameters())


@pytest.mark.parametrize("momentum", [0.1, 0.0])
def test_statistics_that_nobody_shares_are_refused(momentum: float) -> None:
    model = nn.Sequential(nn.Linear(16, 4), nn.BatchNorm1d(4, momentum=momentum))
    closure = LoopTask(model, examples(0), loss_of).draw(model, 0)
    if momentum:
        with pytest.raises(ConfigError, match=r"\(1.running_mean, 1.running_var\).*GroupNorm"):
            closure()
    else:
        assert closure().requires_grad
