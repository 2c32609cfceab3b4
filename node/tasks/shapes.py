"""A model's shapes without its values: made on the meta device, and never initialised.

torch has no kernel for random numbers there and runs them through its decompositions, for which it loads its
compiler: seconds at every start of a coordinator, for values that nobody will see.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_FILLING: Final = frozenset({"normal_", "uniform_", "kaiming_uniform_", "trunc_normal_"})
"""In place, of `torch.nn.init` and of tensors. What else begins a parameter comes down to these."""


@contextmanager
def shapes_only() -> Iterator[None]:
    """Inside, new tensors are on the meta device, and filling one with random numbers does nothing."""
    with torch.device("meta"), _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    """Its torch.nn.init and tensor methods return the tensor as it is."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if getattr(func, "__name__", "") in _FILLING:
            target = args[0] if args else given.get("tensor")
            if isinstance(target, Tensor) and target.is_meta:
                return target
        return func(*args, **given)
