"""Where the inner parameters of local training live, and one step of them.

The model's own parameters are trained, and the outer ones are put aside meanwhile, in the state's entry
`outer`; when they are back, inner parameters that are needed again are put aside as `live`. The inner
optimizer's state is in the entry `inner`. All of it is local state, per parameter.

Inner steps need neither the outer parameters nor what a strategy keeps for its sends: where memory is short
both may wait elsewhere meanwhile (`aside`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from ...compression.base import Compressor, Moved, Packed
from ...compression.kernels import use_numba
from ...compression.scratch import scratch
from ..base import Parameter, Strategy
from ..parts.gradients import local_gradients, norm
from .aside import Aside
from .optimizers import inner_step, inner_table
from .schedule_free import NAME as SCHEDULE_FREE
from .schedule_free import to_average, to_gradients


def is_finite(x: Tensor) -> bool:
    """Whether every element is. Mostly one sum tells, in one pass and without scratch."""
    return isfinite(float(x.sum())) or bool(x.isfinite().all())


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """On a CPU in one piece of memory that is used again."""
    if any(t.device.type != "cpu" or t.dtype != torch.float32 or not t.is_contiguous() for t in tensors):
        return [t.clone() for t in tensors]
    pieces = torch.split(scratch(sum(t.numel() for t in tensors)), [t.numel() for t in tensors])
    return [piece.view(t.shape).copy_(t) for piece, t in zip(pieces, tensors, strict=True)]


class InnerPhase:
    """See the module's docstring. Reads the strategy's options `inner` and `max_grad_norm`."""

    def __init__(self, strategy: Strategy) -> None:
        self._strategy = strategy
        self._aside: Aside | None = None
        self._idle = "outer", ""

    def entry(self, parameter: Parameter, entry: str, default: Any = None) -> Any:
        """Of the state; looking makes none."""
        states = self._strategy.state
        return states[parameter.tensor].get(entry, default) if parameter.tensor in states else default

    @torch.no_grad()
    def enter(self, aside: Aside | None = None, idle: str = "") -> None:
        """The inner parameters into the model, the outer ones aside; nothing, where they are already.

        `aside`: the outer parameters and this entry of the state wait there, until `bring_back` or `leave`.
        Only where inner parameters are not kept. Raises ConfigError, and nothing has changed.
        """
        if aside is not None and not self.is_inside:
            self._put_aside(aside, idle)
            return
        parameters, states = self._strategy.parameters_in_order(), self._strategy.state
        new = [p for p in parameters if "outer" not in states[p.tensor]]
        for p, outer in zip(new, _copies([p.local for p in new]), strict=True):
            state = states[p.tensor]
            state["outer"] = outer
            if "live" in state:
                p.local.copy_(state.pop("live"))

    def _put_aside(self, aside: Aside, idle: str) -> None:
        self._aside, self._idle = aside, ("outer", idle)
        parameters, states = self._strategy.parameters_in_order(), self._strategy.state
        for p in parameters:
            aside.put(f"{p.name}:outer", p.local)
            if idle in states[p.tensor]:
                aside.put(f"{p.name}:{idle}", states[p.tensor][idle])
        for p in parameters:
            states[p.tensor].pop(idle, None)

    @torch.no_grad()
    def bring_back(self, parameter: Parameter) -> None:
        """What waits aside of it, into the state again."""
        for entry in self._idle:
            if self._aside is not None and (key := f"{parameter.name}:{entry}") in self._aside:
                self._strategy.state[parameter.tensor][entry] = self._aside.take(key, parameter.local)

    @torch.no_grad()
    def leave(self, is_kept: bool) -> None:
        """The outer parameters into the model, bit for bit; the inner ones aside, or they are forgotten."""
        for p in self._strategy.parameters_in_order():
            if is_kept:
                self._strategy.state[p.tensor]["live"] = p.local.clone()
            self.put_outer_back(p)
        self._aside = None

    @torch.no_grad()
    def put_outer_back(self, parameter: Parameter) -> None:
        """Into the model; the inner ones are forgotten. Nothing, where that has been done."""
        self.bring_back(parameter)
        outer = self._strategy.state[parameter.tensor].pop("outer", None)
        if outer is not None:
            parameter.local.copy_(outer)

    @property
    def is_inside(self) -> bool:
        """Whether the model has the inner parameters."""
        return any(self.entry(p, "outer") is not None for p in self._strategy.parameters_in_order())

    @contextmanager
    def fresh(self, with_past: bool = False) -> Iterator[None]:
        """A phase of its own that leaves nothing behind: from the outer parameters, by an inner optimizer
        that begins, or that goes on from a copy of the state that it has. Everything is as it was in the end.
        Only outside of a phase."""
        parameters = self._strategy.parameters_in_order()
        states = [self._strategy.state[p.tensor] for p in parameters]
        aside = [{k: s.pop(k) for k in ("inner", "live") if k in s} for s in states]
        if with_past:
            for state, kept in zip(states, aside, strict=True):
                state["inner"] = deepcopy(kept.get("inner", {}))
        self.enter()
        try:
            yield
        finally:
            self.leave(is_kept=False)
            for state, kept in zip(states, aside, strict=True):
                state.pop("inner", None)
                state.update(kept)

    @contextmanager
    def outer_in_place(self) -> Iterator[None]:
        """The model has the outer parameters meanwhile."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for p in self._strategy.parameters_in_order():
            if (outer := self.entry(p, "outer")) is not None:
                values = p.local.clone()
                p.local.copy_(outer)
                outer.copy_(values)

    def moved(self, parameter: Parameter) -> Tensor:
        """theta - theta_i, flat; to be called between `enter` and `leave`."""
        outer: Tensor = self._strategy.state[parameter.tensor]["outer"]
        if outer.device.type != "cpu" or not outer.is_contiguous():
            return (outer - parameter.local).reshape(-1)
        return torch.sub(outer, parameter.local, out=scratch(outer.numel()).view(outer.shape)).view(-1)

    def send_moved(
        self, parameter: Parameter, leftover: Tensor, decay: float, compressor: Compressor
    ) -> Packed:
        """Packs decay leftover + `moved` and takes what was packed away; the model has the outer parameters
        then. Where the compressor `takes_moved`."""
        outer: Tensor = self._strategy.state[parameter.tensor].pop("outer")
        moved = Moved(parameter.part, leftover, outer.view(-1), parameter.local.view(-1))
        return compressor.send_moved(moved, decay)

    def add_moved(self, parameter: Parameter, residual: Tensor, decay: float) -> None:
        """residual = decay residual + `moved`. One rounding per operation."""
        outer: Tensor = self._strategy.state[parameter.tensor]["outer"]
        inner = parameter.local
        if use_numba(outer, inner, residual) and outer.is_contiguous() and inner.is_contiguous():
            from ..parts.outer_cpu import add_moved

            add_moved(residual, outer.view(-1), inner.view(-1), decay)
        else:
            residual.mul_(decay).add_(self.moved(parameter))

    def forget(self, parameters: Sequence[Parameter]) -> None:
        """These start from the outer parameters."""
        for p in parameters:
            if self.entry(p, "live") is not None:
                del self._strategy.state[p.tensor]["live"]

    @torch.no_grad()
    def restart(self, parameter: Parameter, mix: float) -> None:
        """The next phase starts from mix theta_i + (1 - mix) theta."""
        live = self.entry(parameter, "live")
        if live is not None and mix > 0:
            live.mul_(mix).add_(parameter.local * (1.0 - mix))
        else:
            self.forget([parameter])

    @torch.no_grad()
    def step(self, loss: float, lr_factor: float) -> bool:
        """From the gradients in place, clipped; False, and nothing changes, if anything is not finite."""
        strategy = self._strategy
        grads = local_gradients(strategy.parameters_in_order(), strategy.ranks)
        parameters = [p for p in strategy.parameters_in_order() if p.name in grads]
        total, limit = norm(parameters, grads, strategy.ranks), strategy.option("max_grad_norm")
        if not isfinite(loss) or not isfinite(total):
            return False
        if 0 < limit < total:
            for grad in grads.values():
                grad.mul_(limit / total)
        trained = {p.name: p.local for p in parameters}
        for name, local in trained.items():
            local.grad = grads[name]
        states = {trained[p.name]: strategy.state[p.tensor].get("inner", {}) for p in parameters}
        inner = inner_table(strategy.option("inner"))
        after = inner_step(inner, parameters, trained, lr_factor, states, strategy.ranks)
        for p in parameters:
            strategy.state[p.tensor]["inner"] = after[trained[p.name]]
        return True

    @torch.no_grad()
    def set_out(self) -> None:
        """The model has the parameters that gradients are taken at: others than those that a phase ended
        with, for an inner optimizer that averages."""
        if (inner := self._averaging) is not None:
            to_gradients(inner, self._trained())

    @torch.no_grad()
    def finish(self) -> None:
        """The model has what the phase's steps have come to."""
        if (inner := self._averaging) is not None:
            to_average(inner, self._trained())

    @property
    def _averaging(self) -> Mapping[str, Any] | None:
        """The inner optimizer, if its steps are not what is learnt."""
        inner = inner_table(self._strategy.option("inner"))
        return inner if inner["name"] == SCHEDULE_FREE else None

    def _trained(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """With what the inner optimizer keeps of each."""
        return ((p.local, self.entry(p, "inner", {})) for p in self._strategy.parameters_in_order())

    @torch.no_grad()
    def start_over_unless_finite(self) -> bool:
        """Local training that went wrong starts anew from the outer parameters: True, if it had to."""
        parameters = self._strategy.parameters_in_order()
        n_broken = sum(not is_finite(p.local) for p in parameters)
        if not any(self._strategy.ranks.sums([float(n_broken)])):
            return False
        for p in parameters:
            self.bring_back(p)
            p.local.copy_(self._strategy.state[p.tensor]["outer"])
            self._strategy.state[p.tensor].pop("inner", None)
        return True
