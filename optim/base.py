"""The contract of strategies: how local work becomes a payload and how a commit changes the replica.

A strategy is a `torch.optim.Optimizer` that knows no swarm. A swarm calls `propose`, moves the payload,
and calls `apply` with what the ledger counted; a plain training loop calls `step`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from thinwire.compression.base import Fields, Payload, Turn
from torch import Tensor

Closure = Callable[[], Tensor]
"""float32 loss of one fixed batch; never calls backward; repeated calls give identical bits in eval mode."""

Draw = Callable[[], Closure]
"""Takes the next batch, seeded by (run, peer, round, micro-batch)."""

Own = Literal["counted", "missed"] | None
"""What became of this replica's own offer of a round; None: it made none."""


@dataclass(frozen=True, slots=True)
class Share:
    """One counted offer, as a strategy sees it. `seed`: that peer's unsigned 64-bit seed of the round."""

    seed: int
    n_samples: int
    payload: Payload


@dataclass(frozen=True, slots=True)
class Parameter:
    """One replicated parameter: its canonical name, its index in name order and the tensor."""

    name: str
    index: int
    tensor: torch.nn.Parameter
    group: dict[str, Any]


def canonical_name(name: str) -> str:
    """The parameter's name without what `compile`, DDP and checkpoint wrappers put into it."""
    for wrapper in ("_orig_mod.", "module.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "") if wrapper != "module." else name.removeprefix(wrapper)
    return name


class Strategy(torch.optim.Optimizer):
    """Base of all strategies; see the module's docstring.

    Subclasses implement `fields`, `propose` and `apply`, keep their per-parameter state in `self.state`
    and their counters in `self.counters` (both are part of `state_dict`), and set `needs_grad`.
    """

    needs_grad: ClassVar[bool] = True
    """False: closures are evaluated without gradients, with the model in eval mode."""

    last_loss: float | None = None
    """Mean loss of the local work of the last `propose`; None before it or if every batch was dropped."""

    def __init__(
        self, named_parameters: Iterable[tuple[str, torch.nn.Parameter]], defaults: dict[str, Any]
    ) -> None:
        named = [(canonical_name(name), p) for name, p in named_parameters if p.requires_grad]
        self.counters: dict[str, int] = {}
        super().__init__(named, defaults)

    def parameters_in_order(self) -> list[Parameter]:
        """Every parameter, by name: the order of payloads, noise counters and fingerprints."""
        found = [
            (name, p, group)
            for group in self.param_groups
            for name, p in zip(group["param_names"], group["params"], strict=True)
        ]
        found.sort(key=lambda entry: entry[0])
        return [Parameter(name, i, p, group) for i, (name, p, group) in enumerate(found)]

    @abstractmethod
    def fields(self) -> Fields:
        """What a payload of this strategy looks like to a receiver."""

    @abstractmethod
    def propose(self, draw: Draw, turn: Turn) -> Payload:
        """The local work of one round. Does not change a parameter."""

    @abstractmethod
    def check(self, payload: Payload, turn: Turn) -> None:
        """Raises `BadPayload` for a payload that `apply` must not see; as exact as `apply`."""

    @abstractmethod
    def apply(self, shares: Sequence[Share], turn: Turn, own: Own) -> None:
        """Exact: one committed round. `shares` in the ledger's order, each one already checked."""
