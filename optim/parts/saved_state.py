"""A strategy's state as it is saved and restored: dtypes and containers as they are, bit for bit.

torch's `load_state_dict` would cast every tensor to the dtype of its parameter.

torch's own tools (`torch.distributed.checkpoint.state_dict`, and whoever builds on it) keep `state` and
`param_groups` only, call parameters by name, and take a tensor that is no DTensor for one that every rank has
alike. So the counters stand among the options of the first group, too, and what is sharded says so.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...compression.base import Part
from ...compression.errors import ConfigError
from .ranks import is_sharded, local_of

COUNTERS = "counters"
"""What a state dict calls them; in the first group as JSON, which tools move as one value."""

_ENTRIES = "entries of all parameters"


class State(defaultdict[Any, Any]):
    """Of all parameters, an empty dict at first. True even when it is empty: torch's tools make a step of
    zero gradients for an optimizer whose state is not, and that would be a round."""

    def __init__(self, *args: Any) -> None:
        super().__init__(dict, *args)

    def __bool__(self) -> bool:
        return True

    def __reduce__(self) -> Any:
        return type(self), (dict(self),)


def refuse_other_model(saved: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]) -> None:
    """Raises ConfigError unless both lists of parameter groups have the same names in the same order."""
    if any("param_names" not in group for group in saved):
        raise ConfigError("the state of another optimizer: its parameters have no names")
    theirs = [name for group in saved for name in group["param_names"]]
    ours = [name for group in own for name in group["param_names"]]
    if theirs != ours:
        strange = sorted(set(theirs) ^ set(ours))[:3] or "the same names in another order"
        raise ConfigError(f"the state of another model: {strange}")


def by_position(state: Mapping[Any, Any], groups: Sequence[Mapping[str, Any]]) -> dict[int, Any]:
    """The entries of parameters in their order: saved by number, or by the names that the groups list them
    under. Raises ConfigError for a key that no group lists."""
    places = {key: i for i, key in enumerate(key for group in groups for key in group["params"])}
    if strange := [key for key in state if key not in places]:
        raise ConfigError(f"the state of another model: {strange[:3]}")
    return {places[key]: entries for key, entries in state.items()}


def counters_as_option(counters: Mapping[str, int], state: Mapping[Any, Any]) -> str:
    """What `counters_of` reads where only the groups are left, and finds `state` to be whole by."""
    return json.dumps({COUNTERS: dict(counters), _ENTRIES: _n_entries(state)}, sort_keys=True)


def counters_of(state_dict: Mapping[str, Any]) -> dict[str, int]:
    """Raises ConfigError where there are none: a state that somebody else has saved, or cut."""
    try:
        if COUNTERS in state_dict:
            return {str(name): int(n) for name, n in state_dict[COUNTERS].items()}
        told = json.loads(state_dict["param_groups"][0][COUNTERS])
        n_saved, n_here = int(told[_ENTRIES]), _n_entries(state_dict["state"])
        counters = {str(name): int(n) for name, n in told[COUNTERS].items()}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as e:
        raise ConfigError(f"a state without its counters, not of a strategy or cut: {e!r}") from e
    if n_saved != n_here:
        raise ConfigError(
            f"an incomplete state: {n_saved} entries were saved, {n_here} are here. A loader that fills in "
            f"what a new optimizer has knows nothing of a round under way: save after a whole round, or with "
            f"torch.save, a file for each rank"
        )
    return counters


def _n_entries(state: Mapping[Any, Any]) -> int:
    """Those with something in them: not every tool keeps an empty dict."""
    return sum(
        not (isinstance(value, dict) and not value)
        for entries in state.values()
        for value in entries.values()
    )


def shared(state: Mapping[int, Any], parameters: Sequence[Tensor]) -> dict[int, Any]:
    """The entries of each parameter, by number; of those that are sharded as DTensors."""
    return {
        i: _shared(entries, p, local_of(p)) if is_sharded(p := parameters[i]) else entries
        for i, entries in state.items()
    }


def _shared(value: Any, parameter: Tensor, local: Tensor) -> Any:
    """What is shaped like this rank's part of a sharded parameter as a DTensor of the whole; dicts alike.
    Packed tensors, in tuples, are of this rank alone."""
    if isinstance(value, dict):
        return {k: _shared(v, parameter, local) for k, v in value.items()}
    if not isinstance(value, Tensor) or value.ndim == 0 or value.shape != local.shape:
        return value
    from torch.distributed.tensor import DTensor

    whole: Any = parameter
    return DTensor.from_local(
        value, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def part_of(value: Any, part: Part, local: Tensor) -> Any:
    """Of a whole tensor this rank's part, as whoever gathers DTensors leaves them; dicts alike."""
    if isinstance(value, dict):
        return {k: part_of(v, part, local) for k, v in value.items()}
    is_whole = isinstance(value, Tensor) and not is_sharded(value) and tuple(value.shape) == part.shape
    return value.reshape(-1)[part.start : part.stop].view(local.shape) if is_whole else value


def restored(value: Any, device: torch.device) -> Any:
    """A deep copy: `device` for tensors here, the CPU for those further down; of a DTensor what is here."""
    if isinstance(value, Tensor):
        value = local_of(value) if is_sharded(value) else value
        return value.detach().to(device, copy=True)
    cpu = torch.device("cpu")
    if isinstance(value, dict):
        return {k: restored(v, cpu) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(restored(v, cpu) for v in value)
    return value
