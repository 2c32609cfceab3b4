"""Models without values."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import nn

from thinwire.node.tasks.gpt import ByteGPT
from thinwire.node.tasks.shapes import shapes_only

AS_A_COORDINATOR_DOES = """
import sys
from thinwire.node.config import load_config
from thinwire.node.genesis import make_genesis
from thinwire.node.tasks.registry import make_task
config = load_config(None, {"task.layers": 1, "task.width": 16}, environ={})
make_genesis(config, make_task(config.task, None, None), "12D3KooW", 1)
sys.exit("torch._dynamo" in sys.modules)
"""


def test_record_0_is_made_without_torch_s_compiler() -> None:
    """Which takes seconds to load."""
    subprocess.run([sys.executable, "-c", AS_A_COORDINATOR_DOES], check=True, timeout=60)


def test_they_have_the_shapes_and_types_of_those_with_values() -> None:
    def make() -> nn.Module:
        model = nn.ModuleList([ByteGPT(1, 16, 2, 8), nn.Conv2d(3, 4, 3), nn.LSTM(4, 5), nn.Bilinear(2, 3, 4)])
        for p in model[1].parameters():
            nn.init.trunc_normal_(p)
        nn.init.orthogonal_(model[1].weight)
        nn.init.xavier_normal_(model[1].weight)
        return model

    with shapes_only():
        empty = make()
    whole = make()
    assert all(p.is_meta for p in empty.parameters())
    assert [(n, p.shape, p.dtype) for n, p in empty.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in whole.named_parameters()
    ]


def test_what_has_values_is_filled_as_ever() -> None:
    with shapes_only():
        x = torch.zeros(1000, device="cpu").normal_()
        nn.init.uniform_(x[:10], 2, 3)
    assert 0.5 < float(x[10:].std()) < 1.5
    assert bool((x[:10] >= 2).all())
