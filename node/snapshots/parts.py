"""A snapshot's data written and read by several ranks, each its own rows: the same bytes as from one.

Every tensor lies at an offset that follows from names, shapes and dtypes alone.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from ...compression.base import Part
from ...compression.errors import ReplicaDiverged
from ...compression.exact import byte_row
from ...optim.base import canonical_name
from ...optim.parts.ranks import is_sharded, local_of, parts_of, ranks_of
from ..tasks.buffers import persistent_buffers
from ..tasks.fedpara import plain_weights
from .format import TensorLayout, bytes_of, header_of, read_header, tensor_of


def layout_of(dtypes: Mapping[str, torch.dtype], parts: Mapping[str, Part]) -> TensorLayout:
    """That of the whole."""
    return [(name, dtypes[name], tuple(parts[name].shape)) for name in sorted(dtypes)]


def write_parts(
    path: Path, tensors: Mapping[str, Tensor], parts: Mapping[str, Part], *, is_first: bool
) -> None:
    """This rank's elements of every tensor into the file, which is made if need be; durable when it returns.
    `is_first`: rank 0, which also writes the header and what every rank has whole. Raises OSError."""
    layout = layout_of({name: t.dtype for name, t in tensors.items()}, parts)
    header = header_of(layout)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        if is_first:
            _write_at(fd, memoryview(header), 0)
        for name, dtype, start in _places(layout, len(header)):
            part = parts[name]
            if is_first or part != part.entire:
                _write_at(fd, bytes_of(tensors[name]), start + part.start * dtype.itemsize)
        os.fsync(fd)
    finally:
        os.close(fd)


def read_parts(path: Path, parts: Mapping[str, Part]) -> dict[str, Tensor]:
    """This rank's elements of every tensor, in the rows that they are. Raises ReplicaDiverged for a file of
    other tensors, OSError."""
    with path.open("rb") as file:
        n_bytes = os.fstat(file.fileno()).st_size
        head = file.read(8)
        if len(head) == 8:
            head += file.read(min(struct.unpack("<Q", head)[0], n_bytes))
        layout, first = read_header(head, n_bytes)
        if {name: shape for name, _, shape in layout} != {n: tuple(p.shape) for n, p in parts.items()}:
            raise ReplicaDiverged("the snapshot's tensors are not those of the run's layout")
        tensors = {}
        for name, dtype, start in _places(layout, first):
            part = parts[name]
            data = bytearray(part.n_local * dtype.itemsize)
            file.seek(start + part.start * dtype.itemsize)
            if file.readinto(data) != len(data):
                raise ReplicaDiverged("the snapshot's data is cut short")
            tensors[name] = tensor_of(data, 0, len(data), dtype).view(shape_of(part))
    return tensors


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's state by name (parameters by each of their names, and buffers), contiguous on the CPU, as
    `load_state_dict` takes it; of weights that have factors the weights. No two share memory. Of a model that
    is not sharded."""
    named = list(model.named_parameters(remove_duplicate=False))
    first = {id(p): name for name, p in reversed(named)}
    found = {canonical_name(n): p.detach().cpu().contiguous() for n, p in named if first[id(p)] == n}
    found |= {canonical_name(n): p.detach().cpu().clone() for n, p in named if first[id(p)] != n}
    return plain_weights(found) | {n: buffer.to("cpu", copy=True) for n, buffer in persistent_buffers(model)}


def weight_pieces(model: nn.Module) -> Iterator[bytes | memoryview]:
    """The same as a safetensors file, in pieces: one tensor whole on rank 0 at a time, empty pieces on the
    others. All ranks take all pieces."""
    named = {canonical_name(n): p for n, p in model.named_parameters(remove_duplicate=False)}
    ranks, parameters = ranks_of(named.values()), plain_weights(named)
    state: dict[str, Tensor] = {**parameters, **dict(persistent_buffers(model))}
    yield header_of([(name, state[name].dtype, tuple(state[name].shape)) for name in sorted(state)])
    for name in sorted(state):
        p = state[name]
        if name not in parameters:
            yield bytes_of(p) if ranks.index == 0 else b""
            continue
        own = byte_row(local_of(p))
        if not is_sharded(p) and ranks.index > 0:  # rank 0 has it, too
            own = own[:0]
        lengths = [0] * ranks.count
        if ranks.index == 0:
            own_parts = parts_of(p, ranks.count) if is_sharded(p) else parts_of(p, 1)
            lengths[: len(own_parts)] = [part.n_local * p.itemsize for part in own_parts]
        whole = ranks.all_to_all([own, *[own[:0]] * (ranks.count - 1)], lengths)
        yield whole.cpu().numpy().data


def shape_of(part: Part) -> tuple[int, ...]:
    """What `Parameter.local` has: whole rows."""
    shape = tuple(part.shape)
    if part == part.entire or not shape:
        return shape
    return part.n_local // max(1, prod(shape[1:])), *shape[1:]


def _places(layout: TensorLayout, start: int) -> Iterator[tuple[str, torch.dtype, int]]:
    """Where each tensor begins in the file."""
    for name, dtype, shape in layout:
        yield name, dtype, start
        start += prod(shape) * dtype.itemsize


def _write_at(fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):  # the last write before the disk is full is a short one
        done += os.pwrite(fd, data[done:], offset + done)
