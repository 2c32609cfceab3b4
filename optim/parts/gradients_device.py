"""`gradients` for a fused send: what is finite is decided on the device; the host does not wait to know it.

A gradient that does not count has been taken in nowhere; how many there were, the losses tell later.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..base import Closure, Parameter
from .gradients import MeanGradient, local_gradients
from .ranks import ALONE


def backward_at_once(closure: Closure) -> Tensor:
    """The batch's loss, 0-d on its device; its gradients are left in the parameters, whatever they are."""
    with torch.enable_grad():
        loss = closure()
        loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach().reshape(())


class DeviceGradient:
    """The mean gradient of `n_batches` micro-batches of one rank, as `MeanGradient`."""

    def __init__(self, parameters: Sequence[Parameter], n_batches: int) -> None:
        self._parameters = parameters
        self._device = parameters[0].local.device
        self._n_batches = n_batches
        self._sums: dict[str, Tensor] = {}
        self._norm = torch.zeros((), device=self._device)
        self._n_counted = torch.zeros((), device=self._device)
        self.losses: list[Tensor] = []
        """Of all micro-batches, 0-d; NaN where one does not count."""

    @classmethod
    def of_mean(cls, found: MeanGradient, loss: float) -> DeviceGradient:
        """What was taken in elsewhere; `loss`: of all, not finite if none counts."""
        gradient = cls(found.parameters, n_batches=2)  # more than one: the norm is that of the sum
        gradient._sums = found.sums
        gradient._n_counted.fill_(found.n_batches)
        gradient.losses = [torch.tensor(loss, device=gradient._device)]
        return gradient

    @torch.no_grad()
    def take_in(self, loss: Tensor) -> None:
        """Takes the gradients that are in place, unless anything is not finite."""
        grads = local_gradients(self._parameters, ALONE)
        self._norm = torch.nn.utils.get_total_norm(list(grads.values())).to(self._device)
        loss = loss.to(self._device)
        counts = loss.isfinite() & self._norm.isfinite()
        if self._n_batches > 1 and (loss.is_cuda or not counts):  # a single one is left out by its scale
            grads = {name: g.where(counts.to(g.device), 0.0) for name, g in grads.items()}
        for name, grad in grads.items():
            self._sums[name] = self._sums[name].add_(grad) if name in self._sums else grad
        self._n_counted += counts
        self.losses.append(loss.float().where(counts, float("nan")))

    @torch.no_grad()
    def scale(self, max_norm: float) -> Tensor:
        """From the sum to the mean, clipped to `max_norm` unless that is 0: float32; 0 if none counts."""
        n = self._n_counted.clamp(min=1.0)
        clip = torch.ones_like(n)
        if max_norm > 0 and self._sums:
            total = self._norm
            if self._n_batches > 1:
                total = torch.nn.utils.get_total_norm(list(self._sums.values())).to(self._device)
            clip = (max_norm * n / total.clamp(min=1e-30)).clamp(max=1.0)
        return (clip / n).where(self._n_counted > 0, 0.0)

    def of(self, parameter: Parameter) -> Tensor | None:
        """The sum, flat contiguous float32."""
        total = self._sums.get(parameter.name)
        return None if total is None else total.reshape(-1)

    @torch.no_grad()
    def add_to(self, momentum: Tensor, parameter: Parameter, decay: float, factor: Tensor) -> None:
        """momentum = decay momentum + factor gradient. `factor`: 0 leaves it out, whatever it is."""
        momentum.mul_(decay)
        if (total := self.of(parameter)) is not None:
            factor = factor.to(total.device)
            momentum.add_((total * factor).where(factor != 0, 0.0))
