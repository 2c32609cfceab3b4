"""A second replica of a run in this process: to replay the ledger beside the one that trains."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ...coordinator.protocol.messages import GenesisBody
from ..config import parse_config
from ..genesis import in_dtype
from ..replica import Replica, strategy_for
from ..tasks.base import Task


def spare_replica(run_id: bytes, genesis: GenesisBody, task: Task) -> Replica:
    """On the CPU, whole, and without values yet, whatever the node's own is like: the same bits come out.
    Takes as much memory as the model, and its optimizer's replicated state. Raises as `build_replica`
    does."""
    with torch.device("meta"):
        model = task.model()
    model = in_dtype(_on_cpu(model), parse_config(genesis.config))
    return Replica(run_id, genesis, model, strategy_for(genesis, task, model), "")


def _on_cpu(model: nn.Module) -> nn.Module:
    """A copy of the model, which may be one that is being trained; its parameters have no values."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        empty = torch.empty_like(p.detach(), device="cpu")
        memo[id(p)] = nn.Parameter(empty, requires_grad=p.requires_grad)
    for buffer in model.buffers():
        is_empty = buffer.device.type == "meta"
        memo[id(buffer)] = torch.zeros_like(buffer, device="cpu") if is_empty else buffer.detach().cpu()
    return copy.deepcopy(model, memo)
