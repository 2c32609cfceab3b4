"""Of 2025 and 2026, in plain torch: what makes more of steps that are taken anyway, and sends nothing.

SNOO (arXiv 2510.15830), a Nesterov step by what K steps have changed:

    s     = w - (theta after K steps from w)
    b     = mu b + s
    w     = w - lr (mu b + s);   theta = w

GPA (arXiv 2512.17131), Nesterov's primal averaging with a constant each for where steps are taken (y, which
the model has) and for what is evaluated (x):

    z = z + (the step at y)
    x = mu_x x + (1 - mu_x) z
    y = mu_y x + (1 - mu_y) z
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn


class Averaging(Protocol):
    """Of one model, between an optimizer's steps."""

    def restart(self) -> None:
        """The model has been given other parameters, to go on from."""
        ...

    def stepped(self) -> None:
        """A step has been taken: changes the parameters."""
        ...

    def finish(self) -> None:
        """The model gets the parameters that are to be evaluated, or sent."""
        ...


MakeAveraging = Callable[[nn.Module], Averaging]


class Snoo:
    """`every`: K."""

    def __init__(self, model: nn.Module, *, every: int, lr: float, momentum: float) -> None:
        self._model, self._every, self._lr, self._momentum = model, every, lr, momentum
        self._kept = [torch.zeros_like(p) for p in model.parameters()]
        self.restart()

    def restart(self) -> None:
        self._n_steps, self._slow = 0, _copies(self._model)

    @torch.no_grad()
    def stepped(self) -> None:
        self._n_steps += 1
        if self._n_steps % self._every != 0:
            return
        for p, w, b in zip(self._model.parameters(), self._slow, self._kept, strict=True):
            s = w - p
            b.mul_(self._momentum).add_(s)
            w.sub_(s + self._momentum * b, alpha=self._lr)
            p.copy_(w)

    def finish(self) -> None:
        pass


class Gpa:
    """`rate`: what steps are taken times."""

    def __init__(self, model: nn.Module, *, mu_x: float, mu_y: float, rate: float = 1.0) -> None:
        self._model, self._mu_x, self._mu_y, self._rate = model, mu_x, mu_y, rate
        self.restart()

    def restart(self) -> None:
        self._x, self._y, self._z = (_copies(self._model) for _ in range(3))

    @torch.no_grad()
    def stepped(self) -> None:
        for p, x, y, z in zip(self._model.parameters(), self._x, self._y, self._z, strict=True):
            z.add_(p - y, alpha=self._rate)
            x.lerp_(z, 1 - self._mu_x)
            y.copy_(z.lerp(x, self._mu_y))
            p.copy_(y)

    @torch.no_grad()
    def finish(self) -> None:
        for p, x in zip(self._model.parameters(), self._x, strict=True):
            p.copy_(x)


def no_averaging(_model: nn.Module) -> Averaging:
    return _Nothing()


class _Nothing:
    def restart(self) -> None:
        pass

    def stepped(self) -> None:
        pass

    def finish(self) -> None:
        pass


@contextmanager
def finished(averaging: Averaging, model: nn.Module) -> Iterator[None]:
    """The model has the parameters that are to be evaluated meanwhile."""
    before = _copies(model)
    averaging.finish()
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(model.parameters(), before, strict=True):
                p.copy_(value)


def _copies(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]
