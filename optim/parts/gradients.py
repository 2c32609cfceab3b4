"""Local work with gradients: backward passes, means of micro-batches, what is not finite.

With parameters that are sharded over ranks, gradients are so, too; every rank evaluates its rows of a batch,
and losses are such that their mean over the ranks is the batch's (`fully_shard` takes the mean of gradients).
Whatever decides something is the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite, sqrt

import torch
from torch import Tensor

from ...compression.kernels import use_numba
from ..base import Closure, Parameter
from .ranks import ALONE, Ranks, is_sharded, local_of


class MeanGradient:
    """The mean gradient of a round's micro-batches. A gradient of None counts as zero. `sums`, over
    `n_batches`: by name, what there is of it so far."""

    def __init__(
        self,
        parameters: Sequence[Parameter],
        ranks: Ranks = ALONE,
        sums: Mapping[str, Tensor] | None = None,
        n_batches: int = 0,
    ) -> None:
        self.parameters = parameters
        self._ranks = ranks
        self.sums = dict(sums or {})
        self.n_batches = n_batches

    def take_in(self, loss: float) -> bool:
        """Takes the gradients that are in place; False, and nothing is taken, if anything is not finite."""
        grads = local_gradients(self.parameters, self._ranks)
        if not isfinite(loss) or not isfinite(norm(self.parameters, grads, self._ranks)):
            return False
        for name, grad in grads.items():
            # The first gradient is kept, not copied: `propose` takes it away from the parameter.
            self.sums[name] = self.sums[name].add_(grad) if name in self.sums else grad
        self.n_batches += 1
        return True

    def scale(self, max_norm: float) -> float:
        """From the sum to the mean, clipped to `max_norm` unless that is 0."""
        if self.n_batches == 0:
            return 0.0
        mean_norm = 0.0
        if max_norm > 0:
            mean_norm = norm(self.parameters, self.sums, self._ranks) / self.n_batches
        return min(1.0, max_norm / mean_norm if mean_norm > 0 else 1.0) / self.n_batches

    def add_to(self, momentum: Tensor, name: str, decay: float, factor: float) -> None:
        """momentum = decay momentum + factor gradient; flat, what this rank holds of the parameter."""
        if name not in self.sums:
            momentum.mul_(decay)
            return
        grad = self.sums[name].reshape(-1)
        if use_numba(momentum, grad):
            from .gradients_cpu import decay_and_add

            decay_and_add(momentum, grad, decay, factor)
        else:
            # Local work: a fused multiply-add is welcome here.
            momentum.mul_(decay).add_(grad, alpha=factor)


def backward(closure: Closure, ranks: Ranks = ALONE) -> float:
    """The batch's loss; its gradients are left in the parameters, unless it is not finite."""
    with torch.enable_grad():
        loss = closure()
        value = mean_loss(loss, ranks)
        if isfinite(value):
            loss.backward()  # type: ignore[no-untyped-call]
    return value


def mean_loss(loss: Tensor, ranks: Ranks) -> float:
    """Of all ranks; not finite if a single one is not."""
    return ranks.sums([float(loss.detach())])[0] / ranks.count


def read_losses(losses: Sequence[Tensor], ranks: Ranks) -> list[float]:
    """`mean_loss` of each: the host waits once for all of them."""
    return [total / ranks.count for total in ranks.sums(_values_of(losses))]


def local_gradients(parameters: Iterable[Parameter], ranks: Ranks) -> dict[str, Tensor]:
    """Name -> gradient of what this rank holds, float32; those of parameters that every rank has whole are
    the mean over the ranks. Without those that have none."""
    grads = {p.name: dense(local_of(p.tensor.grad)) for p in parameters if p.tensor.grad is not None}
    if ranks.count > 1:
        for p in parameters:
            if not is_sharded(p.tensor):
                grads[p.name] = _mean(grads.get(p.name, torch.zeros_like(p.local)), ranks)
    return grads


def _mean(grad: Tensor, ranks: Ranks) -> Tensor:
    """Scalars and the like: few and small."""
    sums = ranks.sums(grad.flatten().tolist())
    return torch.tensor(sums, device=grad.device).div_(ranks.count).view(grad.shape)


def dense(grad: Tensor) -> Tensor:
    """float32, for embeddings with sparse gradients too."""
    return (grad.to_dense() if grad.is_sparse else grad).detach().float()


def norm(parameters: Iterable[Parameter], grads: Mapping[str, Tensor], ranks: Ranks = ALONE) -> float:
    """The L2 norm over all gradients, everywhere; not finite if a single element is not."""
    # What every rank has whole is counted once.
    counted = [p for p in parameters if p.name in grads and (ranks.index == 0 or is_sharded(p.tensor))]
    norms = [torch.linalg.vector_norm(grads[p.name]) for p in counted]
    squares = sum(x**2 for x in _values_of(norms))
    return sqrt(ranks.sums([squares])[0])


def _values_of(scalars: Sequence[Tensor]) -> list[float]:
    """0-d tensors: the host waits once for all of them."""
    if not scalars:
        return []
    found: list[float] = torch.stack([x.to(scalars[0].device) for x in scalars]).tolist()
    return found
