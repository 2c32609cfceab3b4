"""Snapshots as bytes: a manifest, and the replicated tensors in chunks, the same from any peer.

The data is a safetensors file that is written here, because the library's order of tensors depends on its
version: u64 length of the header | header (JSON, padded to 8 bytes) | tensors, little-endian, by name.
The manifest (a msgpack record) names every chunk of the data by its digest; its own digest is in the ledger.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final

import torch
from blake3 import blake3
from pydantic import Field
from torch import Tensor

from ...compression.errors import ReplicaDiverged
from ...compression.exact import byte_row
from ...coordinator.protocol.messages import (
    MAX_CHANGES,
    BadMessage,
    Changes,
    Digest,
    Record,
    Round,
    decode_record,
    digest_of,
    encode_record,
)

VERSION: Final = 2
CHUNK_BYTES: Final = 4 * 2**20
"""Every chunk of the data but the last has this size."""

MAX_CHUNKS: Final = 2**18

DTYPES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}


class Manifest(Record):
    """What a snapshot holds: the replica after `round` of `run_id`. `commit`: digest of that round's record;
    `n_bytes`: of the data; `chunks`: BLAKE3 of each; `changes`: of the run's
    settings, by records up to this one."""

    n_younger = 1
    version: int
    run_id: Digest
    round: Round
    commit: Digest
    fingerprint: Annotated[bytes, Field(min_length=8, max_length=8)]
    n_bytes: Annotated[int, Field(ge=1, le=MAX_CHUNKS * CHUNK_BYTES)]
    chunks: Annotated[tuple[Digest, ...], Field(min_length=1, max_length=MAX_CHUNKS)]
    changes: Changes = ()

    def chunk_bytes(self, i: int) -> int:
        """The size of chunk `i`."""
        return min(CHUNK_BYTES, self.n_bytes - i * CHUNK_BYTES)

    def check_chunk(self, i: int, data: bytes | bytearray | memoryview) -> None:
        """Raises ReplicaDiverged unless `data` is chunk `i`."""
        if len(data) != self.chunk_bytes(i):
            raise ReplicaDiverged(
                f"chunk {i} of {len(self.chunks)} of the snapshot of round {self.round} "
                f"has {len(data)} bytes, not {self.chunk_bytes(i)}"
            )
        if blake3(data).digest() != self.chunks[i]:
            raise ReplicaDiverged(
                f"chunk {i} of {len(self.chunks)} of the snapshot of round {self.round} "
                f"does not match its digest"
            )


@dataclass(frozen=True, slots=True)
class Stored:
    """A snapshot on disk. `manifest`: digest of its manifest, `n_bytes`: of all of it (manifest and data),
    as they stand in a report and in the ledger."""

    round: int
    manifest: bytes
    n_bytes: int
    commit: bytes
    fingerprint: bytes

    @classmethod
    def of(cls, manifest: Manifest) -> Stored:
        encoded = encode_record(manifest)
        return cls(
            round=manifest.round,
            manifest=digest_of(encoded),
            n_bytes=len(encoded) + manifest.n_bytes,
            commit=manifest.commit,
            fingerprint=manifest.fingerprint,
        )


def max_manifest_bytes(n_bytes: int) -> int:
    """No manifest of a snapshot of `n_bytes` is longer than this."""
    return 256 + MAX_CHANGES * 512 + 34 * -(-n_bytes // CHUNK_BYTES)


def read_manifest(data: bytes, run_id: bytes) -> Manifest:
    """Raises ReplicaDiverged, saying what is wrong, for anything but a manifest of this run."""
    try:
        manifest = decode_record(Manifest, data)
    except BadMessage as e:
        raise ReplicaDiverged(f"the snapshot's manifest cannot be read: {e}") from e
    if manifest.version != VERSION:
        raise ReplicaDiverged(f"the snapshot's manifest has version {manifest.version}, not {VERSION}")
    if manifest.run_id != run_id:
        raise ReplicaDiverged(f"the snapshot is of another run, {manifest.run_id.hex()[:16]}")
    if len(manifest.chunks) != -(-manifest.n_bytes // CHUNK_BYTES):
        raise ReplicaDiverged(
            f"the snapshot's manifest names {len(manifest.chunks)} chunks for {manifest.n_bytes} bytes"
        )
    return manifest


class ChunkDigests:
    """The digests of the chunks of data that comes in pieces of any size."""

    def __init__(self) -> None:
        self.n_bytes = 0
        self._done: list[bytes] = []
        self._hash = blake3()

    def update(self, piece: bytes | memoryview) -> None:
        """The next piece."""
        rest = memoryview(piece)
        while rest:
            part = rest[: CHUNK_BYTES - self.n_bytes % CHUNK_BYTES]
            self._hash.update(part)
            self.n_bytes += len(part)
            rest = rest[len(part) :]
            if self.n_bytes % CHUNK_BYTES == 0:
                self._done.append(self._hash.digest())
                self._hash = blake3()

    def digests(self) -> tuple[bytes, ...]:
        """Of the chunks so far, the last one as far as it has come."""
        return (*self._done, *([self._hash.digest()] if self.n_bytes % CHUNK_BYTES else []))


# --------------------------------------------------------------------------------------- tensors as bytes

TensorLayout = list[tuple[str, torch.dtype, tuple[int, ...]]]
"""Name, dtype and shape of every tensor, by name."""


def data_of(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The data in pieces of any size: no more than one tensor is copied at a time (one from a GPU).

    Any device, any of `DTYPES`; raises TypeError for another.
    """
    layout: TensorLayout = [
        (name, tensors[name].dtype, tuple(tensors[name].shape)) for name in sorted(tensors)
    ]
    yield header_of(layout)
    for name, _, _ in layout:
        yield bytes_of(tensors[name])


def tensors_of(data: bytearray) -> dict[str, Tensor]:
    """The tensors, as views of `data` where its alignment allows. Raises ReplicaDiverged for anything that
    `data_of` does not write."""
    layout, start = read_header(data, len(data))
    tensors = {}
    for name, dtype, shape in layout:
        stop = start + math.prod(shape) * dtype.itemsize
        tensors[name] = tensor_of(data, start, stop, dtype).view(shape)
        start = stop
    return tensors


def bytes_of(x: Tensor) -> memoryview:
    return byte_row(x.cpu()).numpy().data


def tensor_of(data: bytearray, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    if start == stop:
        return torch.empty(0, dtype=dtype)
    source, offset = (data, start) if start % dtype.itemsize == 0 else (data[start:stop], 0)
    return torch.frombuffer(source, dtype=dtype, count=(stop - start) // dtype.itemsize, offset=offset)


def header_of(layout: TensorLayout) -> bytes:
    entries, start = {}, 0
    for name, dtype, shape in layout:
        if dtype not in _NAMES:
            raise TypeError(f"{name}: {dtype} cannot be stored")
        stop = start + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def read_header(data: bytes | bytearray, n_bytes: int) -> tuple[TensorLayout, int]:
    """What is in the data, and where its first tensor begins. `data`: its beginning, with all of the header;
    `n_bytes`: of the whole. Raises ReplicaDiverged."""
    try:
        (n_text,) = struct.unpack_from("<Q", data)
        start = 8 + n_text
        if start > len(data):
            raise ReplicaDiverged("the snapshot's header is cut short")
        found: dict[str, Any] = json.loads(data[8:start])
        layout: TensorLayout = [
            (name, DTYPES[entry["dtype"]], _shape(entry["shape"])) for name, entry in found.items()
        ]
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ReplicaDiverged(f"the snapshot's header cannot be read: {type(e).__name__}: {e}") from e
    n_tensors = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in layout)
    # Other names, orders, offsets and spaces would be read differently somewhere else.
    if [name for name, _, _ in layout] != sorted(found):
        raise ReplicaDiverged("the snapshot's tensors are not in the order of their names")
    if data[:start] != header_of(layout) or start + n_tensors != n_bytes:
        raise ReplicaDiverged("the snapshot's header does not fit its data")
    return layout, start


def _shape(found: Any) -> tuple[int, ...]:
    if not isinstance(found, list) or not all(type(n) is int and n >= 0 for n in found):
        raise ValueError(f"no shape: {found!r}")
    return tuple(found)
