"""Packing parameters that are sharded over a node's ranks: each is brought together on one rank, its owner.

A node's payload thereby does not depend on the number of its ranks: compressors pack whole parameters, from
the same values. A rank holds one whole parameter at a time. Per round a node's ranks send each other their
part of what is packed once (inside the node, where links are fast), and everybody gets the packs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Final

import torch
from torch import Tensor

from ...compression import wire
from ...compression.base import Compressor, Payload, Turn
from ...compression.codecs.sparse import Sparse
from ...compression.kernels import use_numba
from ..base import Parameter
from .ranks import Ranks, is_sharded, parts_of

AT_ONCE: Final = 1 << 22
"""Elements that are packed together, about: what is made on the way to them is there at the same time."""

AT_ONCE_ON_GPU: Final = 1 << 28
"""The same on a GPU: `values` may be made for the purpose."""


def pack_all(
    ranks: Ranks,
    compressor: Compressor,
    parameters: Sequence[Parameter],
    values: Callable[[Parameter], Tensor],
    turn: Turn,
) -> Payload:
    """The same on every rank. `values`: flat float32, what this rank holds of what is to be packed."""
    if ranks.count == 1:
        return _pack_whole(compressor, parameters, values, turn)
    own: Payload = {}
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


def _pack_whole(
    compressor: Compressor, parameters: Sequence[Parameter], values: Callable[[Parameter], Tensor], turn: Turn
) -> Payload:
    """Small parameters together, where kernels can; on a GPU large ones, too."""
    if isinstance(compressor, Sparse):
        shapes, devices = [p.part.shape for p in parameters], [p.local for p in parameters]
        if compressor.packs_at_once(shapes, devices):
            return _pack_on_gpu(compressor, parameters, values)
    payload: Payload = {}
    waiting: list[tuple[Parameter, Tensor]] = []
    n_waiting = 0
    for p in parameters:
        x = values(p)
        if not _can_wait(compressor, p, x):
            payload[p.name] = compressor.pack(x, p.part, turn)
            continue
        waiting.append((p, x))
        n_waiting += x.numel()
        if n_waiting > AT_ONCE:
            payload |= _pack_together(compressor, waiting)
            waiting, n_waiting = [], 0
    payload |= _pack_together(compressor, waiting)
    return {p.name: payload[p.name] for p in parameters}


def _pack_on_gpu(
    compressor: Sparse, parameters: Sequence[Parameter], values: Callable[[Parameter], Tensor]
) -> Payload:
    """In a few launches; the host waits when the last of them is under way."""
    from ...compression.gpu.pack_triton import Sent, Source

    under_way: list[tuple[list[str], Sent]] = []
    sources: dict[str, Source] = {}
    for i, p in enumerate(parameters, 1):
        sources[p.name] = Source(p.part.shape, values(p).detach().float().contiguous())
        following = parameters[i].local.device if i < len(parameters) else None
        if following != p.local.device or sum(s.x.numel() for s in sources.values()) > AT_ONCE_ON_GPU:
            under_way.append(([*sources], Sent(compressor, [*sources.values()])))
            sources = {}
    return {
        name: packed for names, sent in under_way for name, packed in zip(names, sent.packs(), strict=True)
    }


def _can_wait(compressor: Compressor, p: Parameter, x: Tensor) -> bool:
    if x.dtype != torch.float32 or not x.is_contiguous() or not use_numba(x):
        return False
    from ...compression.cpu import batched_cpu

    return x.numel() > 0 and batched_cpu.takes(compressor, p.part.shape)


def _pack_together(compressor: Compressor, waiting: Sequence[tuple[Parameter, Tensor]]) -> Payload:
    if not waiting:
        return {}
    from ...compression.cpu import batched_cpu

    assert isinstance(compressor, Sparse)
    packs = batched_cpu.pack(compressor, [x for _, x in waiting], [p.part.shape for p, _ in waiting])
    return {p.name: packed for (p, _), packed in zip(waiting, packs, strict=True)}


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
    payload: Payload = {}
    for theirs, data in zip(fields, messages, strict=True):
        payload |= wire.decode(data, theirs, turn.round, layout, wire.max_bytes_of(theirs))
    return payload
