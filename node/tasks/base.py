"""Tasks: what is trained. A task names a model, its exact initial values, its batches and its evaluation.

`text` is built in, `hf` (a model of transformers, see `hf_task`) an extra. A task of the user's own is given
by import path on the user's own command line (`--task package.module:function`), never by the network.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ...optim.base import Closure
from ...optim.sapo import Policy
from .. import config


@dataclass(frozen=True, slots=True)
class Init:
    """How a parameter starts: zeros, ones, or exact normal noise times `scale`; torch's own differ by CPU."""

    rule: Literal["zeros", "ones", "normal"]
    scale: float = 0.0


def loss_unit_of(task: object) -> str:
    """What people are told that a task's losses are measured in."""
    return str(getattr(task, "loss_unit", "nats"))


class Task(Protocol):
    """What a run trains. All methods but `model` are called with the model that `model` made.

    It may have a `loss_unit` for people, a short text; without one, losses are "nats".
    """

    n_samples: int
    """Samples in one batch that `draw` gives."""
    n_tokens: int
    """Tokens (`text`: bytes) in the batch that `draw` gave last."""

    def model(self) -> nn.Module:
        """The model with parameters of any value; called on the meta device too."""
        ...

    def init(self, name: str, shape: tuple[int, ...]) -> Init:
        """The rule for one parameter."""
        ...

    def held_out(self) -> bytes | None:
        """What `evaluate` is given on every node; the coordinator's goes to all. None: no evaluation."""
        ...

    def corpus(self) -> bytes | None:
        """Training data that the coordinator hands to nodes which bring none; None: they have it already."""
        ...

    def load(self, corpus: bytes | None, held_out: bytes | None) -> None:
        """Before the first `draw`: what `corpus` and `held_out` gave at the coordinator."""
        ...

    def draw(self, model: nn.Module, seed: int, rank: int = 0, ranks: int = 1) -> Closure:
        """The batch of this unsigned 64-bit seed as a closure that returns its mean loss (float32, 0-d).

        On a node of several ranks each has some of its rows (see `Rows`), and the mean of what their closures
        return is the batch's mean loss. Every rank's closure calls the model as often as the others'.
        """
        ...

    def evaluate(self, model: nn.Module, rank: int = 0, ranks: int = 1) -> float:
        """Mean held-out loss, of several ranks the mean of what they return, after as many calls of the model
        on each; the caller has set eval mode and no_grad."""
        ...


@runtime_checkable
class Pretrained(Protocol):
    """What a task has besides whose model brings weights, so that a run needs no `run.base`."""

    def public(self, options: config.Task) -> config.Task:
        """The options for record 0: all that a node needs to build the model, no path of this machine. Those
        that come from a record 0 stay what they are."""
        ...

    def base(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights by parameter name; what is not among them begins by its rule. At the coordinator."""
        ...

    def base_in(self, folder: Path, model: nn.Module) -> dict[str, Tensor]:
        """The same from a folder of this machine's user, wherever the run began."""
        ...

    def export(self, model: nn.Module, held_out: bytes, folder: Path) -> None:
        """The model as its library reads it."""
        ...


@runtime_checkable
class Mergeable(Pretrained, Protocol):
    """What a task has besides whose model may be trained by adapters."""

    def export_merged(self, model: nn.Module, held_out: bytes, folder: Path) -> None:
        """The model with its adapters in its weights, as its library reads it. Raises ConfigError where it
        has none, or computes something else then. `model` is of no use afterwards."""
        ...


@runtime_checkable
class Writes(Protocol):
    """What a task for the strategy `sapo` has besides."""

    def policy(self, model: nn.Module) -> Policy:
        """How this model writes, and what that is worth."""
        ...


@dataclass(frozen=True, slots=True)
class Rows:
    """A rank's rows [first, stop) of a batch, and the factor by which the mean over them counts, so that the
    mean over the ranks is that of the batch. A rank without a row computes one that counts 0."""

    first: int
    stop: int
    weight: float

    @classmethod
    def of(cls, n: int, rank: int, ranks: int) -> Rows:
        """As even as can be. `n`: rows of the batch, at least one."""
        first, stop = n * rank // ranks, n * (rank + 1) // ranks
        if first == stop:
            return cls(0, 1, 0.0)
        return cls(first, stop, (stop - first) * ranks / n)

    @property
    def slice(self) -> slice:
        return slice(self.first, self.stop)


def device_of(model: nn.Module) -> torch.device:
    """Where the model computes; its parameters may be kept elsewhere (see `ranks.sharding`)."""
    device: torch.device | None = getattr(model, "thinwire_device", None)
    return next(model.parameters()).device if device is None else device
