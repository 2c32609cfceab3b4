"""Payloads as bytes. Decoding is driven by what the receiver expects, never by what the sender claims.

    magic "TW" · version u8 · flags u8 (0) · round u32 · layout hash 8 bytes · header length u32
    header   msgpack list of [ordinal, count], only for tensors shorter than expected, ordinals increasing
    body     the tensors' elements, in order of parameter names, then of their place in the tuple
    BLAKE3 of all before, 8 bytes

Everything is little endian. A tensor's ordinal is its number in the body. A payload whose tensors have their
usual lengths has a header of one byte: 29 bytes besides the body.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

import msgpack
import torch
from blake3 import blake3
from torch import Tensor

from .base import Field, Fields, Packed, Payload
from .errors import BadPayload
from .rows import Row

MAGIC: Final = b"TW"
VERSION: Final = 1

_HEAD: Final = struct.Struct("<2sBBI8sI")
_CHECKSUM_BYTES: Final = 8
_MAX_PAIR_BYTES: Final = 11  # msgpack of [u32, u32]

# Elements travel as integers of their width: bits are copied, never converted.
_CARRIERS: Final[dict[torch.dtype, tuple[torch.dtype, str]]] = {
    torch.uint8: (torch.uint8, "<u1"),
    torch.int8: (torch.int8, "<i1"),
    torch.bfloat16: (torch.int16, "<i2"),
    torch.float16: (torch.int16, "<i2"),
    torch.float32: (torch.int32, "<i4"),
    torch.int32: (torch.int32, "<i4"),
}


def layout_hash(description: bytes) -> bytes:
    """8 bytes that name a model's layout and a strategy's settings: both sides must describe the same."""
    return blake3(description).digest(_CHECKSUM_BYTES)


def max_bytes_of(fields: Fields) -> int:
    """The longest payload that these fields allow."""
    flat = _flat(fields)
    return (
        _HEAD.size + _max_header(len(flat)) + sum(_n_bytes(f, f.n_elements) for f in flat) + _CHECKSUM_BYTES
    )


def encode(payload: Payload, fields: Fields, round: int, layout_hash: bytes) -> bytes:
    """Raises ValueError for a payload that does not fit `fields`: that is the caller's mistake."""
    tensors = _in_order(payload, fields)
    usual = [f.n_elements for f in _flat(fields)]
    pairs = [[i, t.numel()] for i, t in enumerate(tensors) if t.numel() != usual[i]]
    header = msgpack.packb(pairs)
    head = _HEAD.pack(MAGIC, VERSION, 0, round, layout_hash, len(header))
    data = b"".join([head, header, *map(_to_bytes, tensors)])
    return data + blake3(data).digest(_CHECKSUM_BYTES)


def decode(data: bytes, fields: Fields, round: int, layout_hash: bytes, max_bytes: int) -> Row:
    """The payload, which keeps `data`. Raises BadPayload for whatever else `data` is."""
    if len(data) > max_bytes:
        raise BadPayload("oversized", f"{len(data)} bytes, {max_bytes} allowed")
    if len(data) < _HEAD.size + 1 + _CHECKSUM_BYTES:
        raise BadPayload("truncated", f"{len(data)} bytes")
    magic, version, flags, its_round, its_layout, n_header = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise BadPayload("magic")
    if version != VERSION or flags != 0:
        raise BadPayload("version", f"version {version}, flags {flags}")
    flat = _flat(fields)
    if blake3(memoryview(data)[:-_CHECKSUM_BYTES]).digest(_CHECKSUM_BYTES) != data[-_CHECKSUM_BYTES:]:
        raise _damage(data, n_header, flat)
    if its_round != round:
        raise BadPayload("round", f"{its_round}, not {round}")
    if its_layout != layout_hash:
        raise BadPayload("layout")
    counts = _counts(data, n_header, flat)
    _check_length(data, n_header, flat, counts)
    names = sorted(fields)
    lengths = [len(fields[name]) for name in names]
    return Row(data, _HEAD.size + n_header, names, lengths, [f.dtype for f in flat], counts)


def _damage(data: bytes, n_header: int, flat: Sequence[Field]) -> BadPayload:
    """Why the checksum is wrong: bytes are missing, there are too many, or some have changed."""
    try:
        _check_length(data, n_header, flat, _counts(data, n_header, flat))
    except BadPayload as e:
        if e.reason in ("truncated", "oversized"):
            return e
    return BadPayload("checksum")


def _counts(data: bytes, n_header: int, flat: Sequence[Field]) -> list[int]:
    """Elements of every tensor, from the header."""
    if n_header > _max_header(len(flat)):
        raise BadPayload("header", f"{n_header} bytes for {len(flat)} tensors")
    if _HEAD.size + n_header + _CHECKSUM_BYTES > len(data):
        raise BadPayload("truncated", "ends inside the header")
    header = data[_HEAD.size : _HEAD.size + n_header]
    pairs = _parse(header, len(flat))
    counts = [f.n_elements for f in flat]
    previous = -1
    for pair in pairs:
        if type(pair) is not list or [type(x) for x in pair] != [int, int]:
            raise BadPayload("header", "not a list of [ordinal, count]")
        ordinal, count = pair
        if not previous < ordinal < len(flat) or not 0 <= count < flat[ordinal].n_elements:
            raise BadPayload("header", f"tensor {ordinal} with {count} elements is not expected")
        counts[ordinal], previous = count, ordinal
    if msgpack.packb(pairs) != header:
        raise BadPayload("header", "not in its shortest form")
    return counts


def _parse(header: bytes, n_tensors: int) -> list[object]:
    limits = {"max_str_len": 0, "max_bin_len": 0, "max_map_len": 0, "max_ext_len": 0}
    try:
        pairs = msgpack.unpackb(header, use_list=True, max_array_len=max(n_tensors, 2), **limits)
    except (ValueError, msgpack.UnpackException) as e:
        raise BadPayload("header", "not msgpack") from e
    if type(pairs) is not list:
        raise BadPayload("header", "not a list")
    return pairs


def _check_length(data: bytes, n_header: int, flat: Sequence[Field], counts: Sequence[int]) -> None:
    body = sum(_n_bytes(f, n) for f, n in zip(flat, counts, strict=True))
    expected = _HEAD.size + n_header + body + _CHECKSUM_BYTES
    if len(data) != expected:
        detail = f"{len(data)} bytes, {expected} expected"
        raise BadPayload("truncated" if len(data) < expected else "oversized", detail)


def _in_order(payload: Payload, fields: Fields) -> list[Tensor]:
    if payload.keys() != fields.keys():
        raise ValueError(f"parameters differ: {sorted(payload.keys() ^ fields.keys())[:5]}")
    tensors: list[Tensor] = []
    for name in sorted(fields):
        packed: Packed = payload[name]
        for t, f in zip(packed, fields[name], strict=True):
            if t.dtype != f.dtype or t.dim() != 1 or t.numel() > f.n_elements:
                raise ValueError(f"{name}: {t.dtype} {tuple(t.shape)} does not fit {f}")
            tensors.append(t)
    return tensors


def _to_bytes(t: Tensor) -> bytes:
    carrier, code = _CARRIERS[t.dtype]
    return t.detach().cpu().contiguous().view(carrier).numpy().astype(code, copy=False).tobytes()


def _flat(fields: Fields) -> list[Field]:
    return [field for name in sorted(fields) for field in fields[name]]


def _n_bytes(field: Field, n: int) -> int:
    return n * field.dtype.itemsize


def _max_header(n_tensors: int) -> int:
    return 5 + n_tensors * _MAX_PAIR_BYTES
