"""Which whole tensors stand in for sharded parameters while `fully_shard` has them together for a forward.

SPSA reads parameters as theta + eps z where they are used, and there the model has other tensors than those
that it was built with.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from torch import Tensor, nn

from .ranks import is_sharded

_MARK: Final = "_thinwire_sharded"


def mark_unsharded(model: nn.Module) -> None:
    """Once, after `fully_shard` and once the parameters are on their device: the whole tensors know from now
    on which parameter they are of."""
    for module in model.modules():
        if _is_group(module):
            places = [(m, name, p) for m in _members(module) for name, p in m._parameters.items()]
            sharded = [(m, name, p) for m, name, p in places if p is not None and is_sharded(p)]
            module.register_forward_pre_hook(_Marker(sharded))


def parameter_behind(tensor: Tensor) -> Tensor:
    """The sharded parameter of which this is the whole; itself for any other tensor."""
    behind: Tensor = getattr(tensor, _MARK, tensor)
    return behind


class _Marker:
    """Runs after `fully_shard`'s own hook, which comes first."""

    def __init__(self, places: list[tuple[nn.Module, str, nn.Parameter]]) -> None:
        self._places = places

    def __call__(self, _module: nn.Module, _args: Any) -> None:
        for module, name, sharded in self._places:
            whole = module._parameters[name]
            if whole is not None and not is_sharded(whole):
                setattr(whole, _MARK, sharded)


def _is_group(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on it."""
    return hasattr(module, "set_reshard_after_forward")


def _members(module: nn.Module) -> Iterator[nn.Module]:
    """The modules whose parameters are brought together with this one's."""
    yield module
    for child in module.children():
        if not _is_group(child):
            yield from _members(child)
