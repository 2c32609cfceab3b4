"""In plain torch: AdamW, DiLoCo (arXiv 2311.08105), SparseLoCo (2025), MuLoCo (arXiv 2505.23725).

theta_i = theta after H inner steps of peer i
e       = decay e + theta - theta_i;   q = select(e);   e = e - q
theta   = theta - outer_lr * Nesterov(mean of q)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal

import torch
from torch import Tensor, nn

from .averaging import MakeAveraging, finished, no_averaging
from .text import Schedule, Text

BETAS: Final = (0.9, 0.95)
GROUP: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Loco:
    """A method of the family. `k`: of 4096 elements, in 2 bits each; 0: all of them, whole."""

    lr: float
    outer_lr: float
    outer_momentum: float
    inner_steps: int
    k: int = 0
    decay: float = 0.95
    mean: Literal["all", "senders"] = "all"
    muon: bool = False


def train_data_parallel(
    text: Text,
    lr: float,
    *,
    n_peers: int,
    n_steps: int,
    schedule: Schedule,
    seen: Callable[[int, nn.Module], object] | None = None,
    averaging: MakeAveraging = no_averaging,
) -> nn.Module:
    """AdamW on the mean gradient of all peers' batches; one peer: what it learns alone. `seen`: is told the
    step and the model after each; `averaging`: of AdamW's steps."""
    model = text.model()
    average = averaging(model)
    adamw = torch.optim.AdamW(model.parameters(), lr=lr, betas=BETAS, weight_decay=0.0)
    for step in range(1, n_steps + 1):
        adamw.param_groups[0]["lr"] = lr * schedule(step)
        adamw.zero_grad()
        for peer in range(n_peers):
            (text.batch(model, peer, step)() / n_peers).backward()  # type: ignore[no-untyped-call]
        adamw.step()
        average.stepped()
        if seen is not None:
            with finished(average, model):
                seen(step, model)
    average.finish()
    return model


def train_loco(
    text: Text,
    loco: Loco,
    *,
    n_peers: int,
    n_rounds: int,
    schedule: Schedule,
    averaging: MakeAveraging = no_averaging,
) -> nn.Module:
    """`schedule`: over rounds; `averaging`: of each peer's inner steps."""
    outer = text.model()
    sgd = torch.optim.SGD(
        outer.parameters(), loco.outer_lr, momentum=loco.outer_momentum, nesterov=loco.outer_momentum > 0
    )
    peers = [_Peer(text, loco, i, averaging) for i in range(n_peers)]
    for round_ in range(1, n_rounds + 1):
        sent = [peer.train(outer, loco.lr * schedule(round_)) for peer in peers]
        for p, *values in zip(outer.parameters(), *sent, strict=True):
            p.grad = _mean(values, loco.mean)
        sgd.step()
    return outer


class _Peer:
    """Keeps its inner optimizers and what it did not send."""

    def __init__(self, text: Text, loco: Loco, number: int, averaging: MakeAveraging) -> None:
        self._text, self._loco, self._number, self._n_drawn = text, loco, number, 0
        self._model = text.model()
        self._inner = _inner_optimizers(self._model, loco)
        self._average = averaging(self._model)
        self._kept = [torch.zeros_like(p) for p in self._model.parameters()]

    def train(self, outer: nn.Module, lr: float) -> list[Tensor]:
        """What it sends of a round, decoded."""
        self._model.load_state_dict(outer.state_dict())
        self._average.restart()
        for _ in range(self._loco.inner_steps):
            self._step(lr)
            self._average.stepped()
        self._average.finish()
        moved = [
            (p - own).detach() for p, own in zip(outer.parameters(), self._model.parameters(), strict=True)
        ]
        if self._loco.k == 0:
            return moved
        sent = []
        for kept, delta in zip(self._kept, moved, strict=True):
            kept.mul_(self._loco.decay).add_(delta)
            sent.append(_select(kept, self._loco.k))
            kept.sub_(sent[-1])
        return sent

    def _step(self, lr: float) -> None:
        self._n_drawn += 1
        self._model.zero_grad()
        self._text.batch(self._model, self._number, self._n_drawn)().backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        for optimizer in self._inner:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()


def _inner_optimizers(model: nn.Module, loco: Loco) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, at AdamW's rate by the RMS of its updates; AdamW for the rest."""
    named = dict(model.named_parameters())
    hidden = [p for name, p in named.items() if loco.muon and p.ndim == 2 and name.startswith("blocks.")]
    rest = [p for p in named.values() if all(p is not h for h in hidden)]
    adamw = torch.optim.AdamW(rest, lr=loco.lr, betas=BETAS, weight_decay=0.0)
    if not hidden:
        return [adamw]
    return [torch.optim.Muon(hidden, lr=loco.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"), adamw]


def _select(x: Tensor, k: int) -> Tensor:
    """The k largest of every 4096 elements, rounded to two magnitudes of each sign; zeros elsewhere."""
    found = torch.zeros(x.numel(), device=x.device)
    flat = x.reshape(-1)
    for start, stop in pairwise([*range(0, x.numel(), GROUP), x.numel()]):
        group = flat[start:stop]
        index = group.abs().topk(-(-k * len(group) // GROUP)).indices
        found[start:stop][index] = _two_bits(group[index])
    return found.view(x.shape)


def _two_bits(value: Tensor) -> Tensor:
    """Each to the mean magnitude of its half, the larger or the smaller, of the group."""
    magnitude = value.abs()
    is_large = magnitude > magnitude.median()
    low = magnitude[~is_large].mean()
    high = magnitude[is_large].mean() if bool(is_large.any()) else low
    return value.sign() * torch.where(is_large, high, low)


def _mean(values: Sequence[Tensor], mean: str) -> Tensor:
    total = torch.stack(list(values)).sum(0)
    if mean == "all":
        return total / len(values)
    n_senders = torch.stack([v != 0 for v in values]).sum(0)
    return total / n_senders.clamp(min=1)
