"""Packing parameters that are sharded over a node's ranks: each is brought together on one rank, its owner.

A node's payload thereby does not depend on the number of its ranks: compressors pack whole parameters, from
the same values. A rank holds one whole parameter at a time. Per round a node's ranks send each other their
part of what is packed once (inside the node, where links are fast), and everybody gets the packs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from ...compression import wire
from ...compression.base import Compressor, Packed, Payload, Source, Turn
from ..base import Parameter
from .ranks import Ranks, is_sharded, parts_of


def pack_all(
    ranks: Ranks,
    compressor: Compressor,
    parameters: Sequence[Parameter],
    values: Callable[[Parameter], Tensor],
    turn: Turn,
) -> Payload:
    """The same on every rank. `values`: flat float32, what this rank holds of what is to be packed."""
    if ranks.count == 1:
        packs = compressor.pack_many((Source(p.part, values(p)) for p in parameters), turn)
        return {p.name: packed for p, packed in zip(parameters, packs, strict=True)}
    own: dict[str, Packed] = {}
    by_owner = owned(parameters, ranks.count)
    for row in zip_longest(*by_owner):
        # Row i has the i-th parameter of every owner: all of them pack at the same time.
        pieces = [_piece(p, values, to, ranks) for to, p in enumerate(row)]
        mine: Parameter | None = row[ranks.index]
        lengths = [0] * ranks.count if mine is None else _lengths(mine, ranks)
        whole = ranks.all_to_all(pieces, lengths)
        if mine is not None:
            own[mine.name] = compressor.pack(whole, mine.part.entire, turn)
    payload = _shared(ranks, compressor, by_owner, own, turn)
    return {p.name: payload[p.name] for p in parameters}


def owned(parameters: Sequence[Parameter], count: int) -> list[list[Parameter]]:
    """Which parameters each rank owns: the largest first, each to the rank that has least so far."""
    lists: list[list[Parameter]] = [[] for _ in range(count)]
    loads = [0] * count
    for p in sorted(parameters, key=lambda p: (-p.part.n_global, p.index)):
        owner = loads.index(min(loads))
        lists[owner].append(p)
        loads[owner] += p.part.n_global
    return lists


def _piece(p: Parameter | None, values: Callable[[Parameter], Tensor], to: int, ranks: Ranks) -> Tensor:
    """What this rank has for the owner. A parameter that every rank has whole is not sent."""
    if p is None:
        return torch.empty(0)
    x = values(p)
    return x if is_sharded(p.tensor) or to == ranks.index else x[:0]


def _lengths(p: Parameter, ranks: Ranks) -> list[int]:
    parts = enumerate(parts_of(p.tensor, ranks.count))
    return [part.n_local if is_sharded(p.tensor) or r == ranks.index else 0 for r, part in parts]


def _shared(
    ranks: Ranks, compressor: Compressor, by_owner: list[list[Parameter]], own: Payload, turn: Turn
) -> Payload:
    """Every owner's packs, on every rank."""
    fields = [{p.name: compressor.fields(p.part.entire) for p in list_} for list_ in by_owner]
    layout = wire.layout_hash(b"packs of a node's ranks")
    messages = ranks.gather(wire.encode(own, fields[ranks.index], turn.round, layout))
    payload: dict[str, Packed] = {}
    for theirs, data in zip(fields, messages, strict=True):
        payload |= wire.decode(data, theirs, turn.round, layout, wire.max_bytes_of(theirs))
    return payload
