"""Reinforcement learning in a swarm (SAPO): peers share what they have written, and check what others have.

    cd deploy/examples
    thinwire coordinator ../runs/sapo.toml --task arithmetic:make
    thinwire join TICKET --task arithmetic:make
    thinwire export STATE --own -o DIR --task arithmetic:make       (a node's own policy; STATE: its folder)

The task is to add two digits: "7 + 8" is to be completed by "15". Every node has a small policy of its own,
which begins by writing any two digits, one pair of a hundred. It is told nothing but whether a sum is right,
and finds that out by itself, for others' completions, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from thinwire.compression.errors import ConfigError
from thinwire.node import config
from thinwire.node.tasks.base import Init, device_of
from thinwire.optim.api import Closure
from thinwire.optim.sapo import Group

DIGITS = 10
LENGTH = 2
"""Of a sum: tens, ones."""

WIDTH = 64
NOTHING = DIGITS
"""In place of the tens, before they are written."""


class Adder(nn.Module):
    """Which digit comes next: a, b, and the tens, if they are there, (N, 3) int64 -> logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.digits = nn.ModuleList(nn.Embedding(DIGITS + 1, WIDTH) for _ in range(3))
        self.up = nn.Linear(3 * WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, DIGITS)

    def forward(self, x_N3: Tensor) -> Tensor:
        embedded = [digit(x_N3[:, i]) for i, digit in enumerate(self.digits)]
        logits: Tensor = self.down(functional.gelu(self.up(torch.cat(embedded, dim=1))))
        return logits


class Adding:
    """See `thinwire.optim.sapo.Policy`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def sample(self, seed: int, prompts: int, samples: int) -> Tensor:
        prompt_N2 = prompts_of(seed, prompts).repeat_interleave(samples, dim=0)
        rng = torch.Generator().manual_seed(seed % 2**63)
        tens_N = torch.full((len(prompt_N2),), NOTHING)
        for _ in range(LENGTH):
            p_ND = self._next(prompt_N2, tens_N).softmax(dim=1).cpu()
            before_N, tens_N = tens_N, torch.multinomial(p_ND, 1, generator=rng)[:, 0]
        return torch.stack([before_N, tens_N], dim=1).to(torch.uint8).view(prompts, samples, LENGTH)

    def rewards(self, seed: int, tokens_PGC: Tensor) -> Tensor:
        sum_P1 = prompts_of(seed, len(tokens_PGC)).sum(dim=1, keepdim=True)
        said_PG = tokens_PGC.long() @ torch.tensor([10, 1])
        return (said_PG == sum_P1).float()

    def loss(self, groups: Sequence[Group]) -> Tensor:
        prompts = [prompts_of(g.seed, g.prompt + 1)[-1:].expand(len(g.tokens_GC), 2) for g in groups]
        prompt_N2, token_N2 = torch.cat(prompts), torch.cat([g.tokens_GC for g in groups]).long()
        advantage_N = torch.cat([g.advantage_G for g in groups])
        seen_N2 = torch.stack([torch.full((len(token_N2),), NOTHING), token_N2[:, 0]], dim=1)
        log_p_N = torch.zeros(len(token_N2), device=device_of(self._model))
        for i in range(LENGTH):
            logits_ND = self._next(prompt_N2, seen_N2[:, i])
            log_p_N = log_p_N - functional.cross_entropy(
                logits_ND, token_N2[:, i].to(logits_ND.device), reduction="none"
            )
        return -(log_p_N * advantage_N.to(log_p_N.device)).mean()

    def _next(self, prompt_N2: Tensor, tens_N: Tensor) -> Tensor:
        x_N3 = torch.cat([prompt_N2, tens_N[:, None]], dim=1)
        logits: Tensor = self._model(x_N3.to(device_of(self._model))).float()
        return logits


def prompts_of(seed: int, n: int) -> Tensor:
    """int64 (n, 2): whoever knows a peer's seed knows what it was asked."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    return torch.from_numpy(rng.integers(0, DIGITS, (n, 2)))


class Arithmetic:
    """See `Task`. What is evaluated is the share of all hundred sums that come out wrong."""

    loss_unit = "wrong"

    def __init__(self, options: config.Task) -> None:
        self.n_samples = self.n_tokens = options.batch

    def model(self) -> nn.Module:
        return Adder()

    def policy(self, model: nn.Module) -> Adding:
        return Adding(model)

    def init(self, name: str, shape: tuple[int, ...]) -> Init:
        return Init("zeros") if name.endswith("bias") else Init("normal", shape[1] ** -0.5)

    def held_out(self) -> bytes:
        return b"all sums"

    def corpus(self) -> None:
        return None

    def load(self, corpus: bytes | None, held_out: bytes | None) -> None:
        pass

    def draw(self, model: nn.Module, seed: int, rank: int = 0, ranks: int = 1) -> Closure:
        """For strategies that train on answers, not on what is written: the cross entropy of right sums."""
        prompt_N2 = prompts_of(seed, self.n_samples)
        sum_N = prompt_N2.sum(dim=1)
        tokens_NC = torch.stack([sum_N // 10, sum_N % 10], dim=1).to(torch.uint8)
        right = [Group(seed, i, t[None], torch.ones(1)) for i, t in enumerate(tokens_NC)]
        return lambda: Adding(model).loss(right)

    def evaluate(self, model: nn.Module, rank: int = 0, ranks: int = 1) -> float:
        prompt_N2 = torch.cartesian_prod(torch.arange(DIGITS), torch.arange(DIGITS))
        said, tens_N = torch.zeros(len(prompt_N2), dtype=torch.int64), torch.full((len(prompt_N2),), NOTHING)
        for _ in range(LENGTH):
            tens_N = Adding(model)._next(prompt_N2, tens_N).argmax(dim=1).cpu()
            said = 10 * said + tens_N
        return float((said != prompt_N2.sum(dim=1)).float().mean())


def make(options: config.Task, data: Path | None) -> Arithmetic:
    """What `--task arithmetic:make` calls."""
    if data is not None:
        raise ConfigError("--data: sums need none, leave it out")
    return Arithmetic(options)
