"""Tasks of a user's own training loop: a model that is there already, batches from an iterable, a loss."""

from __future__ import annotations

import copy
import logging
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ...compression.errors import ConfigError
from ...optim.base import Closure
from ..tasks.base import Init, device_of
from ..tasks.buffers import INSTEAD

log = logging.getLogger("thinwire.node")

Loss = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> the batch's mean loss, 0-d, with a graph; it never calls `backward`."""

Evaluate = Callable[[nn.Module], float]
"""The mean held-out loss; called in eval mode without gradients."""


class ModelTask:
    """See `Task`. A model alone, for what needs no data: record 0, weights of a folder."""

    n_samples = 1
    n_tokens = 0

    def __init__(self, model: nn.Module) -> None:
        """Raises ConfigError."""
        _refuse_other_than_a_model(model)
        self._model = model

    def model(self) -> nn.Module:
        return self._model

    def init(self, name: str, shape: tuple[int, ...]) -> Init:
        return Init("zeros")  # record 0 has the run's; only names, shapes and dtypes are compared with it

    def held_out(self) -> bytes | None:
        return None

    def corpus(self) -> bytes | None:
        return None

    def load(self, corpus: bytes | None, held_out: bytes | None) -> None: ...

    def draw(self, model: nn.Module, seed: int, rank: int = 0, ranks: int = 1) -> Closure:
        raise NotImplementedError("a model alone is not trained")

    def evaluate(self, model: nn.Module, rank: int = 0, ranks: int = 1) -> float:
        raise NotImplementedError("a model alone is not evaluated")


class LoopRun(ModelTask):
    """The coordinator's side: a model without values, of which record 0 is made; `evaluated`: whether nodes
    are to measure a held-out loss."""

    def __init__(self, model: nn.Module, *, evaluated: bool) -> None:
        super().__init__(model)
        self._model = skeleton(model)
        self._evaluated = evaluated

    def held_out(self) -> bytes | None:
        return b"evaluate" if self._evaluated else None


class LoopTask(ModelTask):
    """See `Task`. `batches` is begun anew when it ends. `n_samples`: by which this node's work counts beside
    the others'; None: the `batch_size` of the batches, or the length of the first one.

    Batches are drawn while torch's CPU generator has a seed of this peer, round and batch, so that loaders
    which shuffle by it give every peer others, even where all of them begin with the same seed.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        loss: Loss,
        *,
        n_samples: int | None = None,
        evaluate: Evaluate | None = None,
    ) -> None:
        """Raises ConfigError."""
        super().__init__(model)
        _refuse_callers_mistakes(batches, loss)
        self._batches, self._loss, self._evaluate = batches, loss, evaluate
        self._iterator: Iterator[Any] | None = None
        self._is_proved = False
        self._first: list[Any] = []
        if n_samples is None:
            n_samples = _batch_size(batches) or _length(self._peek())
        self.n_samples = n_samples
        if not 1 <= self.n_samples <= 2**20:
            raise ConfigError(f"samples={self.n_samples}: between 1 and {2**20} in a batch")

    def load(self, corpus: bytes | None, held_out: bytes | None) -> None:
        if held_out is not None and self._evaluate is None:
            raise ConfigError(
                "this run measures a held-out loss, on each node in turn: give join(evaluate=...), a "
                "function of the model that returns it"
            )
        if held_out is None and self._evaluate is not None:
            log.warning("this run measures no held-out loss: `evaluate` is not called")

    def draw(self, model: nn.Module, seed: int, rank: int = 0, ranks: int = 1) -> Closure:
        """Raises ConfigError when there is not a single batch, and for a model that is sharded."""
        if ranks > 1:
            raise ConfigError("model: it is sharded over several processes; a training loop is one process")
        batch = on_device(self._next(seed), device_of(model))

        def closure() -> Tensor:
            with nullcontext() if self._is_proved else _buffers_stay(model):
                loss = _checked(self._loss(model, batch))
            self._is_proved = True
            return loss

        return closure

    def evaluate(self, model: nn.Module, rank: int = 0, ranks: int = 1) -> float:
        assert self._evaluate is not None, "load() refuses a run that evaluates"
        return float(self._evaluate(model))

    # ------------------------------------------------------------------------------------------ batches

    def _peek(self) -> Any:
        """The first batch, which stays the next one; of an order that no other node has."""
        self._first = [self._next(secrets.randbits(64))]
        return self._first[0]

    def _next(self, seed: int) -> Any:
        if self._first:
            return self._first.pop()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            for _ in range(2):
                if self._iterator is None:
                    self._iterator = iter(self._batches)
                for batch in self._iterator:
                    return batch
                self._iterator = None
        raise ConfigError(
            "`batches` has no batch (any more): give an iterable that can be begun anew, as a list or a "
            "DataLoader, or a generator without end"
        )


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of the model on the meta device: no memory for its tensors."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(model, memo)


@contextmanager
def _buffers_stay(model: nn.Module) -> Iterator[None]:
    """Raises ConfigError if they do not: swarms share parameters, each node would have statistics of its own.
    Counters in whole numbers may go on."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    yield
    now = dict(model.named_buffers())
    changed = [name for name, buffer in before.items() if not torch.equal(now[name], buffer)]
    if changed:
        raise ConfigError(
            f"model: computing the loss changes its buffers ({', '.join(changed[:3])}), which nobody shares: "
            f"each node would have others, and nobody those of the trained model. {INSTEAD}"
        )


def on_device(batch: Any, device: torch.device) -> Any:
    """The same with its tensors there, those inside of mappings, lists and tuples, too; all else stays."""
    if isinstance(batch, Mapping) and not hasattr(batch, "to"):
        return {key: on_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(on_device(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(on_device(value, device) for value in batch)
    return batch.to(device) if hasattr(batch, "to") else batch


def _checked(loss: Any) -> Tensor:
    """Raises ConfigError for what is no loss."""
    if not isinstance(loss, Tensor) or loss.ndim or not loss.is_floating_point():
        what = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ConfigError(
            f"`loss` returned {what}: it takes (model, batch) and returns the mean loss, a tensor without "
            "dimensions (not loss.item(), and with reduction='mean')"
        )
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise ConfigError(
            "`loss` returned a tensor without a graph: it may not detach it, nor run under torch.no_grad, "
            "and it has to use the model that it is given"
        )
    return loss.float()


def _refuse_other_than_a_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: a torch.nn.Module is needed, not {type(model).__name__}")
    devices = sorted({str(p.device) for p in model.parameters()})
    if len(devices) != 1:
        raise ConfigError(
            f"model: its parameters are on {', '.join(devices) or 'no device'}; all of them have to be on one"
        )


def _refuse_callers_mistakes(batches: object, loss: object) -> None:
    if not isinstance(batches, Iterable):
        raise ConfigError(f"batches: an iterable of batches is needed, not {type(batches).__name__}")
    if not callable(loss):
        raise ConfigError("loss: a function of (model, batch) is needed that returns the batch's mean loss")


def _batch_size(batches: object) -> int | None:
    size = getattr(batches, "batch_size", None)
    return size if isinstance(size, int) else None


def _length(batch: Any) -> int:
    """Samples in a batch: the length of the first tensor in it. Raises ConfigError without one."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    values: Iterable[Any] = ()
    if isinstance(batch, Mapping):
        values = batch.values()
    elif isinstance(batch, list | tuple):
        values = batch
    for value in values:
        if isinstance(value, Tensor | Mapping | list | tuple):
            return _length(value)
    raise ConfigError("how many samples are in a batch cannot be seen from it: say it with samples=")
