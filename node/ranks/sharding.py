"""A model that is sharded over the ranks of a node (FSDP2): no rank ever has more of it than its rows and the
block that it computes.

`fully_shard` with "reshard after forward" everywhere, the root included: what a rank edits between two
forwards would be lost in a whole copy that is still there.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from ...compression.errors import ConfigError
from ...optim.parts.unsharded import mark_unsharded
from ..config import RunConfig
from ..genesis import in_dtype
from ..precision import Precision
from ..tasks.base import Task

log = logging.getLogger("thinwire.node")

STEP_TIMEOUT: Final = timedelta(minutes=10)
"""How far behind the others a rank may be within one operation. (One that ended is noticed at once.)"""


@dataclass(frozen=True, slots=True)
class Sharding:
    """A node's own choices about its ranks; none of them changes the replica."""

    ranks: int = 1
    precision: Precision = "auto"
    activation_checkpointing: bool = False
    cpu_offload: bool = False


def join_node(device: torch.device, rank: int, ranks: int, meeting: Path) -> None:
    """This process becomes a rank. `meeting`: a file for the ranks to find each other by."""
    import torch.distributed as dist

    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
    store = dist.FileStore(str(meeting), ranks)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=STEP_TIMEOUT)


def sharded_model(task: Task, device: torch.device, sharding: Sharding, run: RunConfig) -> nn.Module:
    """The task's model over all ranks, its parameters still to be filled in; buffers have their values."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    if sharding.cpu_offload and device.type == "cpu":
        raise ConfigError("--cpu-offload: this node trains on the CPU, its parameters are there already")
    with _parameters_on_meta():
        model = in_dtype(task.model(), run)
    blocks = blocks_of(task, model)
    if sharding.activation_checkpointing:
        _checkpoint(model, [model.get_submodule(name) for name in blocks])
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (sharding.ranks,)),
        "reshard_after_forward": True,
        "ignored_params": {p for p in model.parameters() if p.ndim == 0},  # they have no rows
    }
    if sharding.precision == "bf16":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if sharding.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy()
    for name in blocks:  # with the wrapper that may be around it by now
        fully_shard(model.get_submodule(name), **options)
    fully_shard(model, **options)
    _allocate(model, torch.device("cpu") if sharding.cpu_offload else device, device)
    mark_unsharded(model)
    model.thinwire_device = device  # type: ignore[assignment]
    return model


def blocks_of(task: Task, model: nn.Module) -> list[str]:
    """Names of what is brought together at a time: the task's `blocks(model)`, or the kinds of modules that a
    model of transformers names, or the elements of the outermost lists of modules."""
    modules = dict(model.named_modules())
    kinds = {kind for m in modules.values() for kind in getattr(m, "_no_split_modules", None) or ()}
    if hasattr(task, "blocks"):
        chosen = {id(block) for block in task.blocks(model)}
        found = [name for name, m in modules.items() if id(m) in chosen]
    elif kinds:
        found = [name for name, m in modules.items() if type(m).__name__ in kinds]
    else:
        lists = [name for name, m in modules.items() if isinstance(m, nn.ModuleList)]
        found = [f"{name}.{i}" for name in _outermost(lists) for i, _ in modules[name].named_children()]
    chosen_blocks = [n for n in _outermost(found) if any(p.ndim > 0 for p in modules[n].parameters())]
    return [name for name in chosen_blocks if not _shares(model, name)]


def _shares(model: nn.Module, block: str) -> bool:
    """Whether a parameter of the block is another module's too. Such a block stays with the root, where a
    parameter may have several places: a group of its own may not have it."""
    own = {id(p) for p in model.get_submodule(block).parameters()}
    for name, module in model.named_modules():
        is_inside = name == block or name.startswith(f"{block}.")
        if not is_inside and any(id(p) in own for p in module._parameters.values() if p is not None):
            log.info("%s shares a parameter with %s: it is not brought together by itself", block, name)
            return True
    return False


def _outermost(names: list[str]) -> list[str]:
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules that this thread makes meanwhile have parameters without memory; their buffers have values.

    (Under torch.device("meta") buffers would have no values either, and those of transformers' rotary
    embeddings are in no file.)
    """
    register, own_thread = nn.Module.register_parameter, threading.get_ident()

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta and threading.get_ident() == own_thread:
            meta = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
            module._parameters[name] = meta

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _checkpoint(model: nn.Module, blocks: list[nn.Module]) -> None:
    """Blocks are computed again in the backward pass instead of keeping their activations."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    chosen = {id(block) for block in blocks}
    apply_activation_checkpointing(model, check_fn=lambda m: id(m) in chosen)


def _allocate(model: nn.Module, home: torch.device, device: torch.device) -> None:
    """Memory for each rank's rows, at home; buffers where the work is done."""
    places = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    model.to_empty(device=home)
    for module, name, buffer in places:
        module._buffers[name] = buffer.to(device)
