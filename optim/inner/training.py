"""What strategies share whose peers train parameters of their own from one round to the next."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from ...compression.base import Payload, Turn
from ..base import Closure, Parameter, Strategy
from ..parts.gradients import backward
from .aside import Aside
from .muon import NAME as MUON
from .muon import refuse_split, split_in_words
from .optimizers import inner_table
from .phase import InnerPhase


class InnerTraining(Strategy):
    """Local steps in an `InnerPhase`. Reads the options `inner` and `lr`.

    `step()` without a closure is one inner step; between such steps the model has the inner parameters, and
    the replicated ones within `replica()`. Counters: `inner`, steps since the last round; `dropped_batches`
    whose loss or gradient was not finite.
    """

    _phase: InnerPhase
    _losses: list[float]
    """Of this round's steps."""

    @abstractmethod
    def _begin(self, turn: Turn) -> None:
        """Before the first step of a round."""

    @abstractmethod
    def _send(self, turn: Turn) -> Payload:
        """After the last one."""

    @abstractmethod
    def _leave(self) -> None:
        """The replicated parameters into the model again."""

    def _is_enough(self, n_steps: int) -> bool:
        """Whether the round has had all its inner steps."""
        return n_steps >= self.batches

    @property
    def _has_muon(self) -> bool:
        return bool(inner_table(self.option("inner"))["name"] == MUON)

    def _refuse_muon_alone(self) -> None:
        """Raises ConfigError where Muon would have nothing to take."""
        if self._has_muon:
            refuse_split(inner_table(self.option("inner")), self.parameters_in_order())

    def told(self) -> str | None:
        if not self._has_muon:
            return None
        inner = inner_table(self.option("inner"))
        return split_in_words(inner, self.parameters_in_order(), float(self.option("lr")))

    def replicated_value(self, parameter: Parameter) -> Tensor:
        value: Tensor = self._phase.entry(parameter, "outer", parameter.local)
        return value

    def absorb_gradients(self, turn: Turn) -> bool:
        n_done = self.counters.get("inner", 0)
        if n_done == 0 or not self._has_begun:
            self._begin(turn)
        if self._is_enough(n_done + 1):
            return False
        self._phase.enter()
        self._inner_step(0.0, turn)
        self.count("inner")
        return True

    @property
    def _has_begun(self) -> bool:
        """Whether what `_begin` makes is there, in a round that has had steps."""
        return True

    def propose_from_grad(self, turn: Turn) -> Payload:
        if self.counters.get("inner", 0) == 0:
            self._begin(turn)
        self._phase.enter()
        try:
            self._inner_step(0.0, turn)
            self.n_batches = self.counters.pop("inner", 0) + 1
            return self._send(turn)
        finally:
            self._leave()

    def resume(self) -> None:
        self._phase.enter()
        self._phase.set_out()

    @contextmanager
    def replica(self) -> Iterator[None]:
        with self._phase.outer_in_place():
            yield

    @contextmanager
    def _inner_training(self, aside: Aside | None = None, idle: str = "") -> Iterator[None]:
        """The model has the inner parameters meanwhile; no gradients are left. See `InnerPhase.enter`."""
        self._phase.enter(aside, idle)
        try:
            yield
        finally:
            self.zero_grad(set_to_none=True)
            self._leave()

    def _train_on(self, closure: Closure, turn: Turn) -> None:
        """One inner step."""
        self._phase.set_out()
        self.zero_grad(set_to_none=True)
        loss = backward(closure, self.ranks)
        if self._inner_step(loss, turn):
            self._losses.append(loss)

    def _inner_step(self, loss: float, turn: Turn) -> bool:
        """From the gradients in place; False, and nothing changes, if anything is not finite."""
        self._phase.set_out()
        done = self._phase.step(loss, turn.lr_factor)
        self.count("dropped_batches", not done)
        return done

    def _round_is_trained(self) -> None:
        """`last_loss` is the mean of its steps."""
        self.last_loss = sum(self._losses) / len(self._losses) if self._losses else None
        self._losses = []


class OwnTraining(InnerTraining):
    """Of peers whose parameters are models of their own, not on the way to the replica's."""

    @contextmanager
    def own_model(self) -> Iterator[None]:
        if self._phase.is_inside:
            yield
            return
        self._phase.enter()
        try:
            yield
        finally:
            self._leave()

    @property
    def has_own_model(self) -> bool:
        return any(self._phase.entry(p, "live") is not None for p in self.parameters_in_order())

    def _leave(self) -> None:
        self._phase.leave(is_kept=True)
