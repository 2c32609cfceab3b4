"""Four ranks of a gloo process group for tests/optim/test_group.py, and two pairs of them that are groups of
their own, through one scenario after another; see `rank_processes`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from thinwire.compression.errors import ConfigError, ReplicaDiverged
from thinwire.compression.fingerprint import fingerprint, parameter_sum
from thinwire.optim.base import Closure, Strategy
from thinwire.optim.group import group_optimizer, join_group, verify_group
from thinwire.optim.registry import build_strategy

CONFIGS: dict[str, dict[str, Any]] = {
    "decoupled": {"name": "decoupled", "lr": 3e-3, "beta": 0.9},
    "adamw": {
        "name": "decoupled", "base": "adamw", "sign": False, "lr": 3e-3, "weight_decay": 0.1,
        "replicate_every": 2, "compressor": {"name": "dense"},
    },
    "diloco": {
        "name": "diloco", "lr": 3e-3, "inner_steps": 2, "fragments": 2,
        "compressor": {"name": "dct_topk", "k": 8, "group_size": 64},
    },
    "spsa": {"name": "spsa", "lr": 1e-2, "probes": 3},
}  # fmt: skip


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))


def batch_loss(model: nn.Module, rank: int, step: int) -> Closure:
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(1000 * step + rank))
    y = x.view(16, 4, 4).sum(2).argmax(1)
    return lambda: F.cross_entropy(model(x), y)


def backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def print_of(strategy: Strategy) -> str:
    sums = {name: parameter_sum(t) for name, t in strategy.replicated_tensors().items()}
    return fingerprint(sums).hex()


def train(optimizer: Strategy, model: nn.Module, rank: int, steps: range) -> list[str]:
    """The loop of a user; the fingerprint after every step."""
    prints = []
    for step in steps:
        if optimizer.needs_grad:
            backward(batch_loss(model, rank, step)())
            optimizer.step()
            optimizer.zero_grad()
        else:
            optimizer.step(batch_loss(model, rank, step))
        prints.append(print_of(optimizer))
    return prints


# ------------------------------------------------------------------------------------------- scenarios
# `group`: of those that take part; None: the default one.


def scenario_train(group: dist.ProcessGroup | None, folder: Path) -> Any:
    """Every strategy, from models that only rank 0 has right; rank 0 saves what it has after six steps."""
    prints, rank = {}, dist.get_rank(group)
    for name, config in CONFIGS.items():
        model = net(seed=rank)
        optimizer = group_optimizer(config, model.named_parameters(), group)
        prints[name] = train(optimizer, model, rank, range(1, 7))
        verify_group(optimizer)
        if rank == 0:
            size = dist.get_world_size(group)
            torch.save((model.state_dict(), optimizer.state_dict()), folder / f"{name}-{size}.pt")
    return prints


def scenario_resume(group: dist.ProcessGroup | None, saved_by: int, folder: Path) -> Any:
    """Goes on from a state that a group of another size has saved."""
    prints = {}
    for name, config in CONFIGS.items():
        saved = torch.load(folder / f"{name}-{saved_by}.pt", weights_only=True)
        model = net()
        optimizer = build_strategy(config, model.named_parameters())
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        join_group(optimizer, group)
        prints[name] = [print_of(optimizer)]
        prints[name] += train(optimizer, model, dist.get_rank(group), range(7, 11))
        verify_group(optimizer)
    return prints


def scenario_loop(group: dist.ProcessGroup | None) -> Any:
    """A scheduler, clipping, two backward passes per step, and a layer that is added later."""
    model, head = net(), nn.Linear(4, 4)  # the head differs from rank to rank
    config = CONFIGS["adamw"] | {"replicate_every": 1}
    optimizer = group_optimizer(config, model.named_parameters(), group)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    rates, prints = [], []
    for step in range(1, 7):
        whole = nn.Sequential(model, head) if step > 3 else model
        if step == 4:
            named = [(f"head.{name}", p) for name, p in head.named_parameters()]
            optimizer.add_param_group({"params": named, "weight_decay": 0.0})
        for micro_batch in range(2):
            backward(batch_loss(whole, dist.get_rank(group), 10 * step + micro_batch)() / 2)
        nn.utils.clip_grad_norm_(whole.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step()
        verify_group(optimizer)
        prints.append(print_of(optimizer))
    return {"rates": rates, "prints": prints, "n_tensors": len(optimizer.replicated_tensors())}


def scenario_refuse(group: dist.ProcessGroup) -> Any:
    """What cannot work is refused by name, by every rank alike."""
    from torch.distributed.tensor import Shard, distribute_tensor

    said: dict[str, str] = {}
    rank = dist.get_rank(group)

    def expect(what: str, error: type[Exception], act: Callable[[], object]) -> None:
        try:
            act()
        except error as e:
            said[what] = str(e)
        else:
            said[what] = "nothing"

    config = CONFIGS["decoupled"]
    other = {**config, "beta": 0.5} if rank == 1 else config
    expect("options", ConfigError, lambda: group_optimizer(other, net().named_parameters(), group))
    wider = nn.Linear(3, 2 + rank)
    expect("shapes", ConfigError, lambda: group_optimizer(config, wider.named_parameters(), group))
    more = nn.Sequential(nn.Linear(2, 2), *([nn.Linear(2, 2)] if rank == 1 else []))
    expect("names", ConfigError, lambda: group_optimizer(config, more.named_parameters(), group))

    model = net()
    optimizer = group_optimizer(config, model.named_parameters(), group)
    if rank == 1:
        optimizer.param_groups[0]["lr"] = 1.0
    expect("rate", ConfigError, lambda: train(optimizer, model, rank, range(1, 2)))
    model = net()
    optimizer = group_optimizer(config, model.named_parameters(), group)
    if rank == 1:
        with torch.no_grad():
            model.get_parameter("0.weight")[0, 0] += 1e-6
    expect("bits", ReplicaDiverged, lambda: verify_group(optimizer))
    mesh = dist.device_mesh.DeviceMesh.from_group(group, "cpu")
    sharded = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
    expect("sharded", ConfigError, lambda: group_optimizer(config, [("w", sharded)], group))
    columns = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)]))
    expect("columns", ConfigError, lambda: group_optimizer(config, [("w", columns)], group))
    return said


def scenario_pairs(pair: dist.ProcessGroup) -> Any:
    """Two groups of two that know nothing of each other; and a rank with a payload that `check` refuses."""
    rank = dist.get_rank()
    model = net(seed=rank)
    optimizer = group_optimizer(CONFIGS["decoupled"], model.named_parameters(), pair)
    prints = train(optimizer, model, rank, range(1, 4))
    pack = optimizer.propose_from_grad

    def spoilt(turn: Any) -> Any:
        payload = pack(turn)
        scales = payload["0.weight"][0]
        payload["0.weight"] = (torch.full_like(scales, float("nan")), *payload["0.weight"][1:])
        return payload

    if rank == 3:
        optimizer.propose_from_grad = spoilt  # type: ignore[method-assign]
    prints += train(optimizer, model, rank, range(4, 6))
    verify_group(optimizer)
    return {"prints": prints, "bad": optimizer.counters.get("bad_payloads", 0)}


def load() -> None:
    """What one scenario needs and none of the others."""
    import torch.distributed.tensor  # noqa: F401


def work(loaded: None, rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """What came of the scenarios, by name; those of one pair are left out by the other."""
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    found = {"train 4": scenario_train(None, folder)}
    if rank in (0, 2):
        found |= {
            "train 2": scenario_train(pairs[0], folder),
            "loop": scenario_loop(pairs[0]),
            "refuse": scenario_refuse(pairs[0]),
            "resume 2": scenario_resume(pairs[0], 4, folder),
        }
    found["pairs"] = scenario_pairs(pairs[rank % 2])
    dist.barrier()
    found["resume 4"] = scenario_resume(None, 2, folder)
    return found
