"""Local work with gradients: backward passes, means of micro-batches, what is not finite."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite, sqrt

import torch
from torch import Tensor

from thinwire.optim.base import Closure, Parameter


class MeanGradient:
    """The mean gradient of a round's micro-batches. A gradient of None counts as zero."""

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        self._parameters = parameters
        self._sums: dict[str, Tensor] = {}
        self._n_batches = 0

    def take_in(self, loss: float) -> bool:
        """Takes the gradients that are in place; False, and nothing is taken, if anything is not finite."""
        grads = {p.name: dense(p.tensor.grad) for p in self._parameters if p.tensor.grad is not None}
        if not isfinite(loss) or not isfinite(norm(grads.values())):
            return False
        for name, grad in grads.items():
            # The first gradient is kept, not copied: `propose` takes it away from the parameter.
            self._sums[name] = self._sums[name].add_(grad) if name in self._sums else grad
        self._n_batches += 1
        return True

    def scale(self, max_norm: float) -> float:
        """From the sum to the mean, clipped to `max_norm` unless that is 0."""
        if self._n_batches == 0:
            return 0.0
        mean_norm = norm(self._sums.values()) / self._n_batches if max_norm > 0 else 0.0
        return min(1.0, max_norm / mean_norm if mean_norm > 0 else 1.0) / self._n_batches

    def add_to(self, momentum: Tensor, name: str, factor: float) -> None:
        """`momentum`: the flat one of the parameter."""
        if name in self._sums:
            # Local work: a fused multiply-add is welcome here.
            momentum.add_(self._sums[name].reshape(-1), alpha=factor)


def backward(closure: Closure) -> float:
    """The loss; its gradients are left in the parameters, unless it is not finite."""
    with torch.enable_grad():
        loss = closure()
        value = float(loss.detach())
        if isfinite(value):
            loss.backward()  # type: ignore[no-untyped-call]
    return value


def dense(grad: Tensor) -> Tensor:
    """float32, for embeddings with sparse gradients too."""
    return (grad.to_dense() if grad.is_sparse else grad).detach().float()


def norm(grads: Iterable[Tensor]) -> float:
    """The L2 norm over all gradients; not finite if a single element is not."""
    squares = [float(torch.linalg.vector_norm(g)) ** 2 for g in grads]
    return sqrt(sum(squares))
