"""Muon inside of `diloco`: against torch's own, which weights it trains, what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinwire.compression.codecs.dense import Dense
from thinwire.compression.errors import ConfigError
from thinwire.optim.base import Closure
from thinwire.optim.diloco import Diloco
from thinwire.optim.registry import build_strategy

pytestmark = pytest.mark.usefixtures("one_thread")


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def blocks() -> nn.Module:
    """Hidden matrices among embeddings, norms, biases and a head."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)) for _ in range(2))
        return nn.ModuleDict({"embed": nn.Embedding(16, 8), "blocks": layers, "head": nn.Linear(8, 4)})


def blocks_loss(model: nn.Module, seed: int) -> Closure:
    """Which quarter a byte is in."""
    x_N = torch.randint(0, 16, (32,), generator=torch.Generator().manual_seed(seed))

    def loss() -> Tensor:
        h_NC = model.embed(x_N)
        for block in model.blocks:
            h_NC = h_NC + block(h_NC)
        return F.cross_entropy(model.head(h_NC), x_N // 4)

    return loss


@pytest.mark.parametrize(
    ("inner", "hidden", "torchs"),
    [
        ("muon", "blocks.", {"adjust_lr_fn": "match_rms_adamw"}),
        (
            {
                "name": "Muon",
                "lr_ratio": 4.0,
                "adjust_lr_fn": "original",
                "momentum": 0.9,
                "hidden": ["*1*.weight"],
            },
            "blocks.1",
            {"adjust_lr_fn": "original", "momentum": 0.9},
        ),
    ],
)
def test_muon_inside_is_torchs_muon_and_adamw_bit_for_bit(
    inner: Any, hidden: str, torchs: dict[str, Any]
) -> None:
    """Also after the state was saved in the middle of a round and restored."""
    ours, theirs = blocks(), blocks()
    options: dict[str, Any] = {
        "lr": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.0,
        "inner": inner,
        "inner_steps": 3,
    }
    alone = {"outer_lr": 1.0, "outer_momentum": 0.0, "error_feedback": False, "compressor": Dense(bits=32)}
    strategy = Diloco(ours.named_parameters(), **options, **alone)
    named = dict(theirs.named_parameters())
    matrices = [p for name, p in named.items() if name.startswith(hidden) and p.ndim == 2]
    rest = [p for p in named.values() if all(p is not m for m in matrices)]
    ratio = inner["lr_ratio"] if isinstance(inner, dict) else 1.0
    groups = [
        {"params": [p for p in rest if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers = [
        torch.optim.Muon(matrices, lr=1e-2 * ratio, weight_decay=0.1, **torchs),
        torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True),
    ]
    assert len(matrices) == (4 if hidden == "blocks." else 2)
    assert f"Muon trains {len(matrices)} matrices" in str(strategy.told())
    for step in range(8):  # the third and the sixth end a round
        strategy.zero_grad()
        blocks_loss(ours, step)().backward()  # type: ignore[no-untyped-call]
        strategy.step()
        if step == 3:
            saved = copy.deepcopy((strategy.state_dict(), ours.state_dict()))
            ours = blocks()
            ours.load_state_dict(saved[1])
            strategy = Diloco(ours.named_parameters(), **options, **alone)
            strategy.load_state_dict(saved[0])
        theirs.zero_grad()
        blocks_loss(theirs, step)().backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
        if step in (2, 5):  # theta - (theta - theta_i) is theta_i but for its rounding
            assert torch.allclose(flat(ours), flat(theirs), atol=1e-6)
            theirs.load_state_dict(ours.state_dict())
        else:
            assert torch.equal(flat(ours), flat(theirs))


@pytest.mark.parametrize(
    ("make", "inner", "words"),
    [
        (lambda: nn.Linear(4, 4), "muon", "no matrix in a numbered block: name those that Muon is to train"),
        (blocks, {"name": "Muon", "hidden": ["layers.*"]}, "no matrix is called 'layers.*'; there are "),
        (blocks, {"name": "Muon", "hidden": "blocks"}, "inner.hidden = 'blocks': write patterns"),
        (blocks, {"name": "Muon", "lr_ratio": 0}, "inner.lr_ratio = 0: must be a number > 0"),
        (blocks, {"name": "Muon", "lr": 0.02}, "inner.lr: lr is an option of the strategy itself"),
        (blocks, {"name": "Muon", "momentun": 0.9}, "inner optimizer Muon: "),
        (blocks, {"name": "Muon", "betas": [2.0, 0.9]}, "inner optimizer Muon: Invalid beta"),
        (blocks, {"name": "Muon", "betas": [0.9]}, "inner.betas = [0.9]: must be two numbers"),
        (blocks, {"name": "Muon", "ns_steps": 100}, "inner optimizer Muon: Number of steps must be less"),
        (blocks, {"name": "Muon", "ns_coefficients": [1.0]}, "inner optimizer Muon: Coefficients must be"),
        (blocks, {"name": "Muon", "eps": "1e-7"}, "inner optimizer Muon: clamp()"),
        (blocks, {"name": ["Muon"]}, "inner optimizer ['Muon']: "),
    ],
)
def test_what_muon_cannot_do_is_refused_in_clear_words(
    make: Callable[[], nn.Module], inner: Any, words: str
) -> None:
    with pytest.raises(ConfigError) as e:
        build_strategy({"name": "diloco", "inner": inner}, make().named_parameters())
    assert words in str(e.value)
