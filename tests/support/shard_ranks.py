"""One rank of a node for parts/test_sharded.py: the same rounds on parameters that are sharded over ranks.

See `rank_processes`. With one rank nothing is sharded, and no process group is needed: that is what the
others are compared with.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from thinwire.compression import wire
from thinwire.compression.base import Turn
from thinwire.compression.fingerprint import fingerprint, parameter_sum
from thinwire.compression.numerics.noise import initial_values
from thinwire.compression.registry import build_compressor
from thinwire.optim.base import Closure, Parameter, Share, Strategy, canonical_name
from thinwire.optim.parts.packing import pack_all
from thinwire.optim.parts.perturb import Direction, evaluated
from thinwire.optim.parts.ranks import GroupRanks, local_of, parts_of
from thinwire.optim.parts.unsharded import mark_unsharded
from thinwire.optim.registry import build_strategy

SMALL = {"name": "dct_topk", "k": 8, "group_size": 64}
STRATEGIES: dict[str, dict[str, Any]] = {
    "decoupled": {
        "name": "decoupled", "compressor": SMALL, "beta": 0.9, "weight_decay": 0.1, "max_grad_norm": 1.0,
    },
    "adamw": {
        "name": "decoupled", "base": "adamw", "sign": False, "accumulate": 2, "beta": 0.9,
        "compressor": {"name": "topk", "k": 16, "group_size": 64, "bits": 8, "indices": "rice"},
    },
    "diloco": {
        "name": "diloco", "inner_steps": 3, "fragments": 2, "mix": 0.5, "overlap": 1, "lr": 3e-3,
        "compressor": {"name": "dense", "bits": 8},
    },
    "sparse diloco": {
        "name": "diloco", "inner_steps": 2, "feedback_decay": 0.95, "outer_momentum": 0.0, "lr": 3e-3,
        "compressor": {"name": "random_k", "rate": 0.3},
    },
    "muloco": {
        "name": "diloco", "inner": "muon", "inner_steps": 2, "lr": 3e-3,
        "compressor": {"name": "dense", "bits": 8},
    },
    "bounded": {
        "name": "decoupled", "compressor": SMALL, "sign": False, "weights": "samples", "bound": 1.0,
    },
    "bounded diloco": {
        "name": "diloco", "inner_steps": 2, "compressor": {"name": "dense", "bits": 8}, "bound": 1.0,
    },
    "subspace": {"name": "subspace", "dimension": 24, "weight_decay": 0.1, "max_grad_norm": 1.0},
    "trimmed": {"name": "decoupled", "compressor": SMALL, "beta": 0.9, "aggregate": "trimmed"},
    "centred diloco": {
        "name": "diloco", "inner_steps": 2, "aggregate": "centred", "compressor": {"name": "slicing"},
    },
    "spsa": {"name": "spsa", "lr": 1e-2, "probes": 3, "weight_decay": 0.1},
    "spsa gauss": {"name": "spsa", "lr": 1e-2, "probes": 2, "noise": "gauss", "params": "blocks*"},
}  # fmt: skip
STRATEGIES |= {
    f"{name} bfloat16": {k: v for k, v in STRATEGIES[name].items() if k != "max_grad_norm"}
    for name in ("decoupled", "adamw", "spsa", "subspace")
}
COMPRESSORS: dict[str, dict[str, Any]] = {
    "dct_topk": SMALL,
    "tiles": {"name": "dct_topk", "k": 4, "group_size": 64, "layout": "tiles", "bits": 4},
    "topk": {"name": "topk", "k": 5, "group_size": 32, "indices": "rice"},
    "dense": {"name": "dense"},
    "dense e3m0": {"name": "dense", "bits": "e3m0"},
    "striding": {"name": "striding", "rate": 0.25},
    "slicing": {"name": "slicing", "rate": 0.25, "bits": 16},
    "random_k": {"name": "random_k", "rate": 0.25},
}
GROUPS = ("blocks and root", "root", "blocks")
N_ROUNDS = 4
LAYOUT = wire.layout_hash(b"sharded")
ROWS, TOKENS, WORDS = 6, 5, 13


class Block(nn.Module):
    """Sizes that no number of ranks divides, a scalar, and a matrix of one row."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 17)
        self.down = nn.Linear(17, 8)
        self.gate = nn.Linear(8, 1)
        self.scale = nn.Parameter(torch.empty(()))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(x))) * torch.sigmoid(self.gate(x)) * self.scale
        return x + y


class Net(nn.Module):
    """Its embedding is its head as well."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(8)

    def forward(self, words_BT: Tensor) -> Tensor:
        x = self.words(words_BT)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.words.weight)


def built(world_size: int, name: str = "", groups: str = "blocks and root") -> nn.Module:
    """On the meta device, sharded, and with exact values in each rank's rows. `groups`: what is brought
    together by itself."""
    with torch.device("meta"):
        model = Net().to(torch.bfloat16 if name.endswith("bfloat16") else torch.float32)
    if world_size > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world_size,))
        scalars = {p for p in model.parameters() if p.ndim == 0}
        blocks = model.blocks if "blocks" in groups else ()
        for module in (*blocks, *([model] if "root" in groups else [])):
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=scalars)
    model.to_empty(device="cpu")
    mark_unsharded(model)
    rank = dist.get_rank() if world_size > 1 else 0
    named = sorted((canonical_name(n), p) for n, p in model.named_parameters())
    for index, (full_name, p) in enumerate(named):
        part = parts_of(p, world_size)[rank]
        values = initial_values(5, index, part.start, part.stop, 0.3)
        local_of(p).copy_(values.view(local_of(p).shape) + (full_name.endswith(("norm.weight", "scale"))))
    return model


def draws(model: nn.Module, seed: int, rank: int, world_size: int) -> Callable[[], Closure]:
    """This rank's rows of each batch; the mean of what the ranks' closures return is the batch's loss."""
    numbers = iter(range(1000))

    def draw() -> Closure:
        generator = torch.Generator().manual_seed(1000 * seed + next(numbers))
        words_BT = torch.randint(0, WORDS, (ROWS, TOKENS + 1), generator=generator)
        mine = words_BT[rank::world_size]

        def loss() -> Tensor:
            logits = model(mine[:, :-1]).float()
            total = F.cross_entropy(logits.flatten(0, 1), mine[:, 1:].flatten(), reduction="sum")
            return total * (world_size / (ROWS * TOKENS))

        return loss

    return draw


def turn_of(round: int, peer: int = 0) -> Turn:
    return Turn(round, 77 + round, 1000 * peer + round, 1.0 / round)


def print_of(strategy: Strategy) -> str:
    """The fingerprint of the whole, from every rank's part."""
    ranks, parts = strategy.ranks, strategy.replicated_parts()
    sums = {
        name: parameter_sum(t.contiguous(), parts[name].start)
        for name, t in strategy.replicated_tensors().items()
        if ranks.index == 0 or parts[name] != parts[name].entire
    }
    total: dict[str, int] = {}
    for theirs in ranks.gather(json.dumps(sums).encode()):
        for name, n in json.loads(theirs).items():
            total[name] = (total.get(name, 0) + n) % 2**64
    return fingerprint(total).hex()


# --------------------------------------------------------------------------------------------- rounds


def recorded(name: str) -> list[list[str]]:
    """What two nodes of one rank offer, as hex, round by round; node 0's offer misses the third commit."""
    models = [built(1, name), built(1, name)]
    strategies = [build_strategy(STRATEGIES[name], m.named_parameters()) for m in models]
    rounds = []
    for round in range(1, N_ROUNDS + 1):
        offers = []
        for peer, (model, strategy) in enumerate(zip(models, strategies, strict=True)):
            turn = turn_of(round, peer)
            payload = strategy.propose(draws(model, 10 * round + peer, 0, 1), turn)
            offers.append(wire.encode(payload, strategy.fields(turn), round, LAYOUT).hex())
        rounds.append(offers)
        for peer, strategy in enumerate(strategies):
            apply(strategy, offers, round, peer)
    return rounds


def apply(strategy: Strategy, offers: list[str], round: int, peer: int = 0) -> None:
    turn = turn_of(round, peer)
    fields = strategy.fields(turn)
    counted = [p for p in range(2) if not (p == 0 and round == 3)]
    shares = []
    for p in counted:
        payload = wire.decode(bytes.fromhex(offers[p]), fields, round, LAYOUT, wire.max_bytes_of(fields))
        strategy.check(payload, turn)
        shares.append(Share(turn_of(round, p).own_seed, 1 + p, payload))
    strategy.apply(shares, turn, "counted" if peer in counted else "missed")


def train(name: str, rounds: list[list[str]], rank: int, world_size: int) -> dict[str, Any]:
    """Local work, then the recorded commits: what does not depend on the number of ranks, and what nearly."""
    config = STRATEGIES[name]
    model = built(world_size, name)
    strategy = build_strategy(config, model.named_parameters())
    prints, losses, codes = [], [], []
    for round, offers in enumerate(rounds, start=1):
        turn = turn_of(round)
        payload = strategy.propose(draws(model, 10 * round, rank, world_size), turn)
        data = wire.encode(payload, strategy.fields(turn), round, LAYOUT)
        losses.append(strategy.last_loss)
        codes.append(data.hex())
        if round == 2:
            strategy = moved(strategy, config, model)
        strategy.work_ahead(draws(model, 10 * round + 5, rank, world_size), turn)
        apply(strategy, offers, round)
        prints.append(print_of(strategy))
    return {"prints": prints, "losses": losses, "payloads": codes}


def moved(strategy: Strategy, config: dict[str, Any], model: nn.Module) -> Strategy:
    """Another one that goes on from its state, which torch's own tools have moved."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    successor = build_strategy(config, model.named_parameters())
    successor.load_state_dict(strategy.state_dict())
    last = build_strategy(config, model.named_parameters())
    set_optimizer_state_dict(model, last, get_optimizer_state_dict(model, successor))
    assert last.counters == strategy.counters
    return last


def through_tools(folder: Path, rank: int, world_size: int) -> dict[str, bool]:
    """Whether a strategy's state is the same on this rank when a distributed checkpoint has held it, and when
    rank after rank has had the whole of it."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    model = built(world_size)
    strategy = build_strategy(STRATEGIES["adamw"], model.named_parameters())
    turn = turn_of(1)
    payload = strategy.propose(draws(model, 10, rank, world_size), turn)
    strategy.apply([Share(1, 1, payload)], turn, "counted")

    def successor() -> Strategy:
        return build_strategy(STRATEGIES["adamw"], model.named_parameters())

    whole = StateDictOptions(full_state_dict=True)
    saved = get_optimizer_state_dict(model, strategy, options=whole)
    fresh = successor()
    set_optimizer_state_dict(model, fresh, saved, options=whole)
    dcp.save({"o": get_optimizer_state_dict(model, strategy)}, checkpoint_id=folder / "checkpoint")
    from_files = successor()
    template = {"o": get_optimizer_state_dict(model, from_files)}
    dcp.load(template, checkpoint_id=folder / "checkpoint")
    set_optimizer_state_dict(model, from_files, template["o"])
    plain = {name: p.shape for name, p in model.named_parameters()}
    return {
        "whole": all(saved["state"][n]["momentum"].shape == shape for n, shape in plain.items()),
        "gathered": same_state(fresh, strategy),
        "files": same_state(from_files, strategy),
    }


def same_state(a: Strategy, b: Strategy) -> bool:
    """But for empty dicts, which not every tool keeps."""
    pairs = zip(a.parameters_in_order(), b.parameters_in_order(), strict=True)
    states = [(a.state[p.tensor], b.state[q.tensor]) for p, q in pairs]
    return a.counters == b.counters and all(
        {name for name in x if x[name] != {}} == {name for name in y if y[name] != {}}
        and all(torch.equal(x[name], y[name]) for name in x if isinstance(x[name], Tensor))
        for x, y in states
    )


def packed(name: str, world_size: int) -> str:
    """The digest of what is packed of given values."""
    compressor = build_compressor(COMPRESSORS[name])
    model = built(world_size)
    strategy = build_strategy(STRATEGIES["decoupled"], model.named_parameters())

    def values(p: Parameter) -> Tensor:
        return initial_values(9, p.index, p.part.start, p.part.stop, 1.0)

    payload = pack_all(strategy.ranks, compressor, strategy.parameters_in_order(), values, turn_of(2))
    fields = {p.name: compressor.fields(p.part.entire) for p in strategy.parameters_in_order()}
    return sha256(wire.encode(payload, fields, 2, LAYOUT)).hexdigest()


def results(rounds: dict[str, list[list[str]]], rank: int, world_size: int) -> dict[str, Any]:
    return {
        "train": {name: train(name, rounds[name], rank, world_size) for name in STRATEGIES},
        "packed": {name: packed(name, world_size) for name in COMPRESSORS},
    }


def collectives(ranks: GroupRanks) -> dict[str, Any]:
    """Every method of the contract, on numbers that tell who sent them."""
    me, n = ranks.index, ranks.count
    pieces = [torch.full((me + to,), float(10 * me + to)) for to in range(n)]
    return {
        "sums": ranks.sums([1.0, float(me)]),
        "gather": [len(data) for data in ranks.gather(b"x" * (3 * me))],
        "broadcast": [len(ranks.broadcast(b"y" * size if me == 0 else None)) for size in (0, 7)],
        "all_to_all": ranks.all_to_all(pieces, [r + me for r in range(n)]).tolist(),
        "all_to_all of others": {name: exchanged(ranks, pieces, name) for name in PIECES},
        "broadcast_tensor": {name: broadcast(ranks, name) for name in TENSORS},
    }


TENSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.reshape(3, 4).T,
    "strided": lambda t: t[::2],
    "a number": lambda t: t[3],
    "bfloat16": lambda t: t.bfloat16().reshape(3, 4).T,
    "float8": lambda t: t.to(torch.float8_e5m2),
    "uint16": lambda t: t.to(torch.uint16),
    "bool": lambda t: t.remainder(3) == 0,
}


PIECES: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": lambda t: t.repeat_interleave(2)[::2],
    "bfloat16": lambda t: t.bfloat16(),
    "float8": lambda t: t.to(torch.float8_e5m2),
    "uint16": lambda t: t.to(torch.uint16),
}


def exchanged(ranks: GroupRanks, pieces: list[Tensor], name: str) -> list[float]:
    """What `all_to_all` brings of such pieces, as other types and with other strides."""
    made = [PIECES[name](piece) for piece in pieces]
    found = ranks.all_to_all(made, [r + ranks.index for r in range(ranks.count)])
    assert found.dtype == made[0].dtype
    values: list[float] = found.float().tolist()
    return values


def broadcast(ranks: GroupRanks, name: str) -> list[float]:
    """What a tensor of this kind is afterwards; rank 0's counts up from 1."""
    tensor = TENSORS[name](torch.arange(1.0, 13.0) if ranks.index == 0 else torch.zeros(12))
    ranks.broadcast_tensor(tensor)
    found: list[float] = tensor.float().flatten().tolist()
    return found


def substituted(rank: int, world_size: int) -> dict[str, list[float]]:
    """The loss at theta + eps z, before and after a forward pass, by what is sharded together; of this rank's
    rows alone."""
    found = {}
    for groups in ("nothing", *GROUPS):
        model = built(1 if groups == "nothing" else world_size, groups=groups)
        parameters = build_strategy(STRATEGIES["spsa"], model.named_parameters()).parameters_in_order()
        closure = draws(model, 3, rank, world_size)()

        def at(direction: Direction) -> float:
            return float(evaluated(closure, parameters, direction))  # noqa: B023

        found[groups] = [at(Direction("sign", 5, 0, 1e-2))]
        with torch.no_grad():
            found[groups].append(float(closure()))
        found[groups].append(at(Direction("sign", 5, 0, 1e-2)))
    return found


def load() -> dict[str, list[list[str]]]:
    """The rounds that all go through."""
    import torch.distributed.checkpoint.state_dict
    import torch.distributed.fsdp  # noqa: F401

    return {name: recorded(name) for name in STRATEGIES}


def work(rounds: dict[str, list[list[str]]], rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    found = results(rounds, rank, world_size)
    if world_size > 1:
        tools = through_tools(folder / f"tools-{world_size}", rank, world_size)
        found |= {"collectives": collectives(GroupRanks()), "tools": tools}
        found |= {"substituted": substituted(rank, world_size)}
    return found
