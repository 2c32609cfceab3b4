"""A node's local state as bytes: what a strategy keeps for itself, without pickle, exact to the last bit.

    magic | u64 length of the structure | structure (JSON) | tensors (safetensors) | BLAKE3 of all before

The structure is the state with every tensor replaced by its number. Nothing in it can import or run code.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from blake3 import blake3
from torch import Tensor

from ...compression.errors import ReplicaDiverged, ThinwireError
from .format import data_of, tensors_of

MAGIC: Final = b"thinwire local state 1\n\0"
MAX_STRUCTURE_BYTES: Final = 256 * 2**20
_N_DIGEST: Final = 32


class BadLocalState(ThinwireError):
    """A local state that cannot be used: go on without one, as a joiner does."""


@dataclass(frozen=True, slots=True)
class LocalState:
    """What a node has beside its replica after `round`. `strategy`: a strategy's `state_dict`; `buffers`: the
    model's, by name.

    Values may be tensors of any dtype that safetensors knows, dicts with str or int keys, lists, tuples, str,
    int, float, bool and None.
    """

    round: int
    strategy: dict[str, Any]
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def copied(self) -> LocalState:
        """A copy that training does not change, with all tensors on the CPU."""
        return LocalState(self.round, _copied(self.strategy), _copied(self.buffers))


def encode(local: LocalState) -> Iterator[bytes | memoryview]:
    """The bytes in pieces. Raises TypeError, naming the place, for a value of another type."""
    tensors: dict[str, Tensor] = {}
    whole = {"round": local.round, "strategy": local.strategy, "buffers": local.buffers}
    structure = json.dumps(_plain(whole, "state", tensors), separators=(",", ":"), allow_nan=False).encode()
    padding = b" " * (-len(structure) % 8)  # tensors lie at multiples of 8
    digest = blake3()
    for piece in (MAGIC + struct.pack("<Q", len(structure)) + structure + padding, *data_of(tensors)):
        digest.update(piece)
        yield piece
    yield digest.digest()


def decode(data: bytes | bytearray) -> LocalState:
    """Raises BadLocalState, saying what is wrong, for anything but what `encode` gave."""
    if not data.startswith(MAGIC):
        raise BadLocalState("not a local state of this version")
    view = memoryview(data)
    if len(data) < len(MAGIC) + 8 + _N_DIGEST:
        raise BadLocalState("cut short")
    if blake3(view[:-_N_DIGEST]).digest() != view[-_N_DIGEST:]:
        raise BadLocalState("the bytes do not match their digest")
    (n_structure,) = struct.unpack_from("<Q", data, len(MAGIC))
    start = len(MAGIC) + 8
    if n_structure > min(MAX_STRUCTURE_BYTES, len(data) - start - _N_DIGEST):
        raise BadLocalState("the structure is longer than the bytes")
    try:
        plain = json.loads(bytes(view[start : start + n_structure]))
        after = start + n_structure + -n_structure % 8
        tensors = tensors_of(bytearray(view[after:-_N_DIGEST]))
        whole = _restored(plain, tensors)
        return LocalState(_int(whole["round"]), _dict(whole["strategy"]), _dict(whole["buffers"]))
    except (ValueError, KeyError, TypeError, RecursionError, ReplicaDiverged) as e:
        raise BadLocalState(f"cannot be read: {type(e).__name__}: {e}") from e


def _plain(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """What JSON can hold: containers as {kind: entries}, floats by their bits, tensors by their number."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return {"int": hex(value)}  # as text: of any length
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, Tensor):
        name = f"{len(tensors):09d}"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [_plain_entry(k, v, where, tensors) for k, v in value.items()]}
    if isinstance(value, list | tuple):
        entries = [_plain(v, f"{where}[{i}]", tensors) for i, v in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": entries}
    raise TypeError(f"{where}: a {type(value).__name__} cannot be stored")


def _plain_entry(key: Any, value: Any, where: str, tensors: dict[str, Tensor]) -> list[Any]:
    if isinstance(key, bool) or not isinstance(key, int | str):
        raise TypeError(f"{where}: the key {key!r} is neither text nor a whole number")
    return [_plain(key, where, tensors), _plain(value, f"{where}[{key!r}]", tensors)]


def _restored(plain: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(plain, dict):
        if plain is None or isinstance(plain, bool | str):
            return plain
        raise ValueError(f"a bare {type(plain).__name__}")
    ((kind, content),) = plain.items()
    if kind == "int":
        return int(content, 16)
    if kind == "float":
        return float.fromhex(content)
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {_restored(k, tensors): _restored(v, tensors) for k, v in content}
    if kind not in ("list", "tuple"):
        raise ValueError(f"an unknown kind {kind!r}")
    entries = [_restored(v, tensors) for v in content]
    return entries if kind == "list" else tuple(entries)


def _int(value: Any) -> int:
    if isinstance(value, int):
        return value
    raise ValueError("the round is not a number")


def _dict(value: Any) -> dict[Any, Any]:
    if isinstance(value, dict):
        return value
    raise ValueError("not a dict")


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(torch.device("cpu"), copy=True)
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_copied(v) for v in value]
    return tuple(_copied(v) for v in value) if isinstance(value, tuple) else value
