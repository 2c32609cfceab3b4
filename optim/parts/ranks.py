"""The ranks of one node, over which its parameters may be sharded (FSDP2), as strategies see them.

A strategy works on the elements that its rank holds, a `Part` of the flattened parameter. What has to be the
same on every rank (sums of squares, losses, decisions) comes from `Ranks.sums`; `packing` brings every
parameter together on one rank at a time. All ranks call the same methods in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from torch import Tensor

from ...compression.base import Part
from ...compression.errors import ConfigError
from ...compression.exact import byte_row

if TYPE_CHECKING:
    import torch.distributed as dist


class Ranks(Protocol):
    """`index`: this one's, from 0 to `count` - 1."""

    index: int
    count: int

    def sums(self, values: Sequence[float]) -> list[float]:
        """Elementwise over all ranks, in their order: the same bits on every rank."""
        ...

    def gather(self, data: bytes) -> list[bytes]:
        """Everybody's bytes, by rank."""
        ...

    def broadcast(self, data: bytes | None) -> bytes:
        """Rank 0's bytes; the others give None."""
        ...

    def all_to_all(self, pieces: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
        """Piece r (flat, of one dtype) goes to rank r. Returns those for this rank, `lengths[r]` elements
        from rank r, one after the other."""
        ...


class Alone:
    """A node of one rank: every parameter is whole."""

    index = 0
    count = 1

    def sums(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def gather(self, data: bytes) -> list[bytes]:
        return [data]

    def broadcast(self, data: bytes | None) -> bytes:
        assert data is not None
        return data

    def all_to_all(self, pieces: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
        return pieces[0]


ALONE: Final = Alone()


class GroupRanks:
    """The ranks of a process group (None: the default one). Raises ConfigError outside of it."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        import torch.distributed as dist

        self._dist, self._group = dist, group
        self.index = dist.get_rank(group)
        self.count = dist.get_world_size(group)
        if self.index < 0:
            raise ConfigError("this process is not a rank of the group")
        self.members = dist.get_process_group_ranks(group)
        # NCCL and its like move tensors of their own device only; gloo is at home on the CPU.
        on_cpu = dist.get_backend(group) in ("gloo", "mpi")
        self.device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())

    def sums(self, values: Sequence[float]) -> list[float]:
        rows = self._all_gather(torch.tensor(values, dtype=torch.float64))
        return [sum(column) for column in zip(*(row.tolist() for row in rows), strict=True)]

    def gather(self, data: bytes) -> list[bytes]:
        n_bytes = [int(n) for n in self._all_gather(torch.tensor([len(data)], dtype=torch.int64))]
        padded = torch.zeros(max(n_bytes), dtype=torch.uint8)
        padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else padded[:0]
        rows = self._all_gather(padded)
        return [row[:n].numpy().tobytes() for row, n in zip(rows, n_bytes, strict=True)]

    def broadcast(self, data: bytes | None) -> bytes:
        n = torch.tensor([0 if data is None else len(data)], dtype=torch.int64)
        self.broadcast_tensor(n)
        if not int(n):
            return b""
        row = torch.frombuffer(bytearray(data or int(n)), dtype=torch.uint8)
        self.broadcast_tensor(row)
        return row.numpy().tobytes()

    def all_to_all(self, pieces: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
        size = pieces[0].itemsize
        sent = torch.cat([self._bytes(p) for p in pieces])
        received = torch.empty(sum(lengths) * size, dtype=torch.uint8, device=self.device)
        from_each, to_each = [n * size for n in lengths], [p.numel() * size for p in pieces]
        self._dist.all_to_all_single(received, sent, from_each, to_each, group=self._group)
        return received.view(pieces[0].dtype).to(pieces[0].device)

    def broadcast_tensor(self, t: Tensor) -> None:
        """Every rank's `t`, of any shape, strides and dtype, becomes rank 0's, bit for bit."""
        with torch.no_grad():
            row = self._bytes(t)
            self._dist.broadcast(row, group=self._group, group_src=0)
            t.copy_(row.view(t.dtype).view(t.shape))

    def _all_gather(self, x: Tensor) -> list[Tensor]:
        row = self._bytes(x)
        rows = [torch.empty_like(row) for _ in range(self.count)]
        self._dist.all_gather(rows, row, group=self._group)
        return [r.cpu().view(x.dtype) for r in rows]

    def _bytes(self, t: Tensor) -> Tensor:
        """All that goes into a collective: a flat row of uint8 on the group's device, maybe in memory of `t`.

        gloo (torch 2.13) moves memory as it lies, so that a transposed tensor arrives scrambled, without an
        error, and it knows neither float8 nor unsigned numbers of 16 bits and more.
        """
        return byte_row(t.to(self.device))


# ------------------------------------------------------------------------------------- sharded parameters


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, as `fully_shard` makes them."""
    return hasattr(tensor, "placements")


def refuse_placement(name: str, tensor: Tensor) -> None:
    """Raises ConfigError for a DTensor that is not in rows over the ranks of one node."""
    if not is_sharded(tensor):
        return
    dtensor: Any = tensor
    rows = len(dtensor.placements) == 1 and (dtensor.placements[0].is_shard(dim=0))
    if not rows:
        raise ConfigError(
            f"parameter {name!r} is placed as {dtensor.placements}: strategies know whole parameters and "
            "those sharded along their first dimension over a mesh of one dimension (fully_shard's default)"
        )


def ranks_of(tensors: Iterable[Tensor]) -> Ranks:
    """Those over which the tensors are sharded; `ALONE` where none is. Raises ConfigError for two meshes."""
    sharded: list[Any] = [t for t in tensors if is_sharded(t)]
    if not sharded:
        return ALONE
    if any(t.device_mesh != sharded[0].device_mesh for t in sharded):
        raise ConfigError("parameters are sharded over different meshes: strategies need one")
    return GroupRanks(sharded[0].device_mesh.get_group())


def local_of(tensor: Tensor) -> Tensor:
    """The elements that this rank holds, detached, in the parameter's own memory: (rows here, ...)."""
    if not is_sharded(tensor):
        return tensor.detach()
    with torch.no_grad():
        local: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return local.detach()


def parts_of(tensor: Tensor, count: int) -> list[Part]:
    """What each rank holds of it: rows as torch.chunk deals them, or everything."""
    shape = tuple(tensor.shape)
    if not is_sharded(tensor):
        return [Part.whole(shape)] * count
    n_rows, row = shape[0], prod(shape[1:])
    each = -(-n_rows // count)
    edges = [min(i * each, n_rows) * row for i in range(count + 1)]
    return [Part(shape, a, b) for a, b in pairwise(edges)]
