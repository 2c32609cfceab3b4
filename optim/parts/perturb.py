"""A forward pass with theta + eps z in place of theta, without touching theta.

Perturbing in place and restoring is no option: (x + e) - 2e + e is not x. Instead every torch function that
is handed a parameter gets a perturbed scratch tensor; the scratch lives for that one use, so the memory
needed is that of inference and the largest tensor.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...compression.errors import ConfigError
from ...compression.exact import to_float32
from ...compression.numerics.noise import perturb, update_
from ...compression.numerics.noise_layout import NoiseKind, Probe
from ..base import Closure, Parameter
from .gradients import mean_loss
from .ranks import ALONE, Ranks, is_sharded
from .unsharded import parameter_behind

_VALUE_PROPERTIES: Final = frozenset(
    getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag", "data")
)
"""Properties that hand out values; all others (shape, dtype, grad, ...) describe the tensor."""

_DESCRIPTIONS: Final = frozenset(
    [
        *("__set__", "__delete__", "__len__", "size", "dim", "ndimension", "numel", "nelement", "stride"),
        *("storage_offset", "element_size", "get_device", "is_contiguous", "is_floating_point", "is_complex"),
        *("is_signed", "is_pinned", "is_same_size", "requires_grad_", "register_hook"),
    ]
)
"""Functions that need no values: perturbing for them would be wasted."""


_HIDING: Final = {torch.float32: (torch.int32, 1 << 30), torch.bfloat16: (torch.int16, 1 << 14)}
"""The top bit of the exponent: with it the other way round 0 is 2, and what was small is infinite, or nearly
so. No loss that depends on such a value stays what it is."""


class NotSubstituted(ConfigError):
    """The loss reads parameters past the substitution, or does not depend on them: SPSA cannot train it."""


@dataclass(frozen=True, slots=True)
class Direction:
    """Which noise, and how far along it. `eps` may be negative."""

    kind: NoiseKind
    seed: int
    probe: int
    eps: float


class Substitution(TorchFunctionMode):
    """While active, parameters are read as theta + eps z. Nothing is written to them."""

    def __init__(
        self, parameters: Sequence[Parameter], direction: Direction, hidden: Sequence[Parameter] = ()
    ) -> None:
        """`hidden`: those of them whose values are, see `dry_run`."""
        super().__init__()
        self._parameters = {id(p.tensor): p for p in parameters}
        self._direction = direction
        self._hidden = {p.name for p in hidden}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _reads_values(func):
            return func(*args, **kwargs)
        # torch takes this mode off while it is in here: `func` sees the scratch and nothing else.
        return func(*self._replaced(args), **self._replaced(kwargs))

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            parameter = self._parameters.get(id(parameter_behind(value)))
            if parameter is None or is_sharded(value):  # what is sharded is not evaluated
                return value
            return perturbed(value, parameter, self._direction, parameter.name in self._hidden)
        if isinstance(value, dict):
            return {k: self._replaced(v) for k, v in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(self._replaced, value))
        if isinstance(value, list | tuple):
            return type(value)(map(self._replaced, value))
        return value


def _reads_values(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return func in _VALUE_PROPERTIES
    return name not in _DESCRIPTIONS


@torch.no_grad()
def perturbed(whole: Tensor, parameter: Parameter, direction: Direction, is_hidden: bool = False) -> Tensor:
    """theta + eps z in a new tensor with all that kernels choose their order of sums by. `whole`: the values
    of the parameter, all of them; `is_hidden`: see `dry_run`."""
    if whole.dtype != parameter.tensor.dtype:
        raise NotSubstituted(
            f"{parameter.name} is evaluated as {whole.dtype}, which rounds perturbations away: no mixed "
            "precision of fully_shard with spsa"
        )
    theta, d = whole.detach(), direction
    if theta.device.type == "cpu" and parameter_behind(whole) is not whole:
        theta = theta.clone()  # fully_shard frees this memory: numpy, once it has seen it, forbids that
    if is_hidden:
        theta = _bits_turned_(theta.clone())
    wide = theta.contiguous().float()
    if is_hidden:  # in memory of its own already; theta - (-eps) z has the same bits
        update_(wide, [Probe(d.seed, d.probe, to_float32(-d.eps))], d.kind, parameter.index)
    else:
        wide = perturb(wide, d.eps, d.kind, d.seed, parameter.index, d.probe)
    scratch = wide.to(theta.dtype)
    if not theta.is_contiguous():  # channels_last, say
        scratch = torch.empty_like(theta).copy_(scratch)
    # Even under no_grad, torch's matmul folds batches or not by whether the weight (or what it is a view of)
    # requires a gradient. A view it shall be: autocast keeps casts of leaves that are none in a cache.
    base = scratch.detach().requires_grad_(whole.requires_grad)
    return base.view_as(base)


def perturbed_loss(
    closure: Closure, parameters: Sequence[Parameter], direction: Direction, ranks: Ranks = ALONE
) -> float:
    """The batch's loss at theta + eps z, the same on every rank; NaN and infinity are passed on."""
    return mean_loss(evaluated(closure, parameters, direction), ranks)


def evaluated(closure: Closure, parameters: Sequence[Parameter], direction: Direction) -> Tensor:
    """The same of this rank, 0-d, still on its device: the host does not wait for it."""
    with torch.no_grad(), _UNCOMPILED, Substitution(parameters, direction):
        loss = closure()
    return loss.detach().reshape(()).clone()  # whatever the next evaluation does with its memory


class _Uncompiled:
    """Compiled models run as plain Python meanwhile: a compiled graph does not see the substitution.

    torch's switch holds for the whole process: the first thread to come sets it, the last to go restores it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_inside = 0
        self._stance: Any = None

    def __enter__(self) -> None:
        with self._lock:
            # Without dynamo nothing is compiled, and importing it takes seconds.
            if self._n_inside == 0 and "torch._dynamo" in sys.modules:
                self._stance = torch.compiler.set_stance("force_eager")
                self._stance.__enter__()
            self._n_inside += 1

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._n_inside -= 1
            if self._n_inside == 0 and self._stance is not None:
                self._stance.__exit__(*exc)
                self._stance = None


_UNCOMPILED: Final = _Uncompiled()


# ------------------------------------------------------------------------------------------- dry run


def dry_run(
    closure: Closure, parameters: Sequence[Parameter], direction: Direction, ranks: Ranks = ALONE
) -> None:
    """Raises NotSubstituted unless the substituted loss stays, bit for bit, what it is while the parameters'
    own values are hidden, so that nobody but the substitution can read them."""
    loss = perturbed_loss(closure, parameters, direction, ranks)
    if not _same(loss, perturbed_loss(closure, parameters, direction, ranks)):
        raise NotSubstituted(
            "two evaluations of one batch differ: the model must be in eval mode, the batch fixed"
        )
    if _same(loss, _hidden_loss(closure, parameters, parameters, direction, ranks)):
        return
    names = [
        p.name
        for p in parameters
        if not _same(loss, _hidden_loss(closure, parameters, [p], direction, ranks))
    ]
    raise NotSubstituted(
        f"the model reads parameters past the perturbation: {', '.join(names) or 'unclear which'}. Use them "
        "through torch functions on the parameters themselves (no aliases kept elsewhere, no caches, no "
        "scripted modules, after fully_shard a mark_unsharded), or train with the strategy 'decoupled'"
    )


def _hidden_loss(
    closure: Closure,
    parameters: Sequence[Parameter],
    hidden: Sequence[Parameter],
    direction: Direction,
    ranks: Ranks,
) -> float:
    """With a bit of every value of `hidden` turned round in its own memory: that needs no copy to be put back
    from. The substitution knows."""
    turned: list[Tensor] = []
    try:
        turned.extend(_bits_turned_(p.local) for p in hidden)
        torch.clear_autocast_cache()
        with torch.no_grad(), _UNCOMPILED, Substitution(parameters, direction, hidden):
            return mean_loss(closure(), ranks)
    finally:
        for values in turned:
            _bits_turned_(values)
        torch.clear_autocast_cache()


def _bits_turned_(values: Tensor) -> Tensor:
    """The same memory, with a bit of every value the other way round."""
    bits, bit = _HIDING[values.dtype]
    values.view(bits).bitwise_xor_(bit)
    return values


def _same(a: float, b: float) -> bool:
    return a == b or (isnan(a) and isnan(b))
