"""`thinwire bench memory`: what a rank of a sharded node holds at most in a round of decoupled momentum, and
what strategies hold on one machine, beside AdamW."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from ...compression.base import Turn
from ...compression.codecs.dense import Dense
from ...compression.numerics.noise import initial_values
from ...optim.base import Closure, Share, Strategy
from ...optim.diloco import Diloco
from ...optim.inner.aside import Aside
from ...optim.parts.ranks import local_of, parts_of
from ...optim.registry import build_strategy
from ...optim.spsa import Spsa
from .. import config
from ..tasks.gpt import ByteGPT
from ..tasks.shapes import shapes_only
from ..tasks.text import TextTask
from .live_bytes import LiveBytes

RANKS: Final = (1, 2, 4)
LAYERS: Final = 32
"""As in models of seven billion parameters: a block is a small part of the whole."""

OTHERS: Final = {"subspace": {"dimension": 16}, "gossip": {"inner_steps": 2}}

ALONE: Final = ("inference", "spsa", "adamw", "diloco", "diloco_offload_idle", *OTHERS)

STRATEGY: Final = {"name": "decoupled", "beta": 0.9}


def bench_memory(n_params: int, n_repeats: int, device: str) -> dict[str, Any]:
    """Peak of live tensor bytes per rank, over two rounds (gradients, momentum, pack, decode, update), for
    nodes of 1, 2 and 4 gloo ranks on the CPU. Four tokens: parameters dominate, not activations.

    Baseline: parameters, momentum and gradients, evenly shared out; the bytes of one whole block, which every
    rank has while it computes it, come on top.

    Beside it, of one rank in this process, bytes per parameter at most: torch's AdamW, `diloco` without and
    with `--offload-idle`, `spsa` with its dry run, `subspace`, `gossip` without neighbours, and a forward
    pass alone.
    """
    nodes = {count: _node(count, n_params) for count in RANKS}
    whole = nodes[1][0]
    alone = {name: _alone(name, n_params) for name in ALONE}
    return {
        "n_params": whole["n_params"],
        "n_state_bytes": whole["n_state_bytes"],
        "n_block_bytes": whole["n_block_bytes"],
        **{f"ranks_{count}": _verdict(ranks, whole["n_block_bytes"]) for count, ranks in nodes.items()},
        "alone": {name: {"peak_bytes_per_parameter": peak} for name, peak in alone.items()},
    }


def _verdict(ranks: list[dict[str, int]], n_block_bytes: int) -> dict[str, Any]:
    peak = max(r["peak_bytes"] for r in ranks)
    even = ranks[0]["n_state_bytes"] / len(ranks)
    return {
        "peak_bytes": peak,
        "even_share_bytes": round(even),
        "ratio_to_even_share": peak / even,
        "ratio_beyond_one_block": (peak - n_block_bytes) / even,
    }


def _node(count: int, n_params: int) -> list[dict[str, int]]:
    """What each rank found."""
    from torch.multiprocessing.spawn import spawn

    with tempfile.TemporaryDirectory(prefix="thinwire-bench-") as folder:
        spawn(_rank, args=(count, n_params, folder), nprocs=count)  # type: ignore[no-untyped-call]
        return [json.loads((Path(folder) / f"rank-{r}").read_text()) for r in range(count)]


def _rank(rank: int, count: int, n_params: int, folder: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    result = _measured(rank, count, n_params, Path(folder) / "meeting" if count > 1 else None)
    (Path(folder) / f"rank-{rank}").write_text(json.dumps(result))
    if count > 1:
        torch.distributed.destroy_process_group()


def _measured(rank: int, count: int, n_params: int, meeting: Path | None) -> dict[str, int]:
    from ..ranks.sharding import Sharding, join_node, sharded_model

    task = _task(n_params)
    device = torch.device("cpu")
    if meeting is not None:
        join_node(device, rank, count, meeting)
        model = sharded_model(task, device, Sharding(ranks=count), config.RunConfig())
    else:
        model = task.model()
    _fill(model, rank, count)
    strategy = build_strategy(STRATEGY, model.named_parameters())
    with LiveBytes(local_of(p) for p in model.parameters()) as live:
        for round in (1, 2):
            turn = Turn(round, round, round, 1.0)
            payload = strategy.propose(lambda: _closure(model), turn)
            strategy.check(payload, turn)
            strategy.apply([Share(1, 1, payload)], turn, "counted")
    n_exactly = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in _whole_block(task).parameters())
    return {
        "n_params": n_exactly,
        "n_state_bytes": 3 * 4 * n_exactly,
        "n_block_bytes": 4 * block,
        "peak_bytes": live.peak_bytes,
    }


def _alone(name: str, n_params: int, layers: int = LAYERS) -> float:
    """Bytes per parameter, over three rounds of two batches; all state is there in the second."""
    model = _task(n_params, layers).model()
    _fill(model, 0, 1)
    named = dict(model.named_parameters())
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3) if name == "adamw" else None
    strategy = _strategy(name, named)
    with LiveBytes(p.detach() for p in named.values()) as live:
        for round in (1, 2, 3):
            if strategy is not None:
                turn = Turn(round, round, round, 1.0)
                payload = strategy.propose(lambda: _closure(model), turn)
                strategy.check(payload, turn)
                strategy.apply([Share(1, 1, payload)], turn, "counted")
                del payload
            elif adamw is not None:
                adamw.zero_grad()
                _closure(model)().backward()  # type: ignore[no-untyped-call]
                adamw.step()
            else:
                with torch.no_grad():
                    _closure(model)()
    return float(live.peak_bytes / sum(p.numel() for p in named.values()))


def _strategy(name: str, named: dict[str, nn.Parameter]) -> Strategy | None:
    """None: of a row without one."""
    if name == "spsa":
        return Spsa(named.items(), lr=1e-6)
    if name in OTHERS:
        return build_strategy({"name": name, **OTHERS[name]}, named.items())
    if not name.startswith("diloco"):
        return None
    diloco = Diloco(named.items(), compressor=Dense(bits=4, group_size=128), inner_steps=2)
    diloco.aside = Aside() if name == "diloco_offload_idle" else None
    return diloco


def _task(n_params: int, layers: int = LAYERS) -> TextTask:
    width = max(64, round((n_params / (12 * layers)) ** 0.5 / 64) * 64)
    return TextTask(config.Task(layers=layers, width=width, heads=4, context=16, batch=1), data=None)


def _whole_block(task: TextTask) -> nn.Module:
    with shapes_only():
        model = task.model()
    assert isinstance(model, ByteGPT)
    return model.blocks[0]


def _fill(model: nn.Module, rank: int, count: int) -> None:
    for i, p in enumerate(model.parameters()):
        part = parts_of(p, count)[rank]
        values = initial_values(1, i, part.start, part.stop, 0.02)
        local_of(p).copy_(values.view(local_of(p).shape))


def _closure(model: nn.Module) -> Closure:
    bytes_BT = torch.arange(5)[None]

    def loss() -> torch.Tensor:
        logits = model(bytes_BT[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), bytes_BT[:, 1:].flatten())

    return loss
