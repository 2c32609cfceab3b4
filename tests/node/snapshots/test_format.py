"""Snapshots as bytes: the same from every peer, readable by safetensors, and nothing else is taken."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping

import pytest
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from thinwire.compression.errors import ReplicaDiverged
from thinwire.coordinator.protocol.messages import digest_of, encode_record
from thinwire.node.snapshots.format import (
    CHUNK_BYTES,
    DTYPES,
    ChunkDigests,
    Manifest,
    Stored,
    data_of,
    max_manifest_bytes,
    read_manifest,
    tensors_of,
)

RUN = bytes(range(32))
TENSORS = {
    "b": torch.arange(6.0).view(2, 3),
    "a": torch.tensor([-0.5]),
    "c": torch.ones(()).bfloat16(),
    "e": torch.empty(0, 4),
}


def data(tensors: Mapping[str, Tensor]) -> bytes:
    return b"".join(bytes(piece) for piece in data_of(tensors))


def manifest_of(content: bytes) -> Manifest:
    digests = ChunkDigests()
    digests.update(content)
    return Manifest(
        version=2,
        run_id=RUN,
        round=12,
        commit=bytes(32),
        fingerprint=b"12345678",
        n_bytes=digests.n_bytes,
        chunks=digests.digests(),
    )


def test_the_bytes_do_not_depend_on_the_order_of_parameters_or_on_strides_and_stay_what_they_are() -> None:
    ordered = data({name: TENSORS[name] for name in "abce"})
    assert ordered == data({name: TENSORS[name] for name in "ecba"})
    assert ordered == data({**TENSORS, "b": TENSORS["b"].t().contiguous().t()})
    assert ordered == data({**TENSORS, "a": torch.tensor([-0.5, 0.0])[::2]})  # torch calls it contiguous
    assert hashlib.sha256(ordered).hexdigest()[:16] == "3cb4939361917f40"
    assert digest_of(encode_record(manifest_of(ordered))).hex()[:16] == "bc943f3e03276e43"


def test_safetensors_itself_reads_it() -> None:
    found = load_safetensors(data(TENSORS))
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_comes_back_bit_for_bit_whatever_lies_before_it(name: str) -> None:
    bits = torch.arange(48, dtype=torch.uint8).view(-1) % (2 if name == "BOOL" else 251)
    tensors = {"a": torch.ones(3, dtype=torch.int8), "b": bits.view(DTYPES[name]), "c": torch.tensor(True)}
    found = tensors_of(bytearray(data(tensors)))
    assert list(found) == ["a", "b", "c"]
    # safetensors 0.8: `load` of bytes, which reads run.base, knows fewer types than its readers of files.
    assert torch.equal(load_safetensors(data(tensors))["b"].view(torch.uint8), bits)
    assert found["b"].dtype == DTYPES[name]
    assert torch.equal(found["b"].view(torch.uint8), bits)
    found["b"].view(torch.uint8)[0] = 1  # it can be written to


def test_a_dtype_that_cannot_be_stored_is_refused() -> None:
    with pytest.raises(TypeError, match=r"x: .*complex128"):
        data({"x": torch.ones(1, dtype=torch.complex128)})


def test_chunk_digests_do_not_depend_on_the_pieces() -> None:
    content = torch.arange(5 * CHUNK_BYTES // 8 + 3, dtype=torch.int32).numpy().tobytes()
    whole = [digest_of(content[i : i + CHUNK_BYTES]) for i in range(0, len(content), CHUNK_BYTES)]
    for size in (CHUNK_BYTES, CHUNK_BYTES - 1, CHUNK_BYTES + 1, 3 * CHUNK_BYTES):
        digests = ChunkDigests()
        for i in range(0, len(content), size):
            digests.update(content[i : i + size])
        assert digests.digests() == tuple(whole)
        assert digests.n_bytes == len(content)
    exact = ChunkDigests()
    exact.update(content[: 2 * CHUNK_BYTES])
    assert exact.digests() == tuple(whole[:2])


def test_a_hundred_corruptions_of_a_chunk_are_rejected_and_named() -> None:
    content = torch.arange(3 * CHUNK_BYTES // 4 - 100, dtype=torch.int32).numpy().tobytes()
    manifest = manifest_of(content)
    assert len(manifest.chunks) == 3
    chunks = [content[i : i + CHUNK_BYTES] for i in range(0, len(content), CHUNK_BYTES)]
    for i, chunk in enumerate(chunks):
        manifest.check_chunk(i, chunk)
    rejected = 0
    for n in range(100):
        i = n % 3
        position = n * 7919 * len(chunks[i]) // 791900
        flipped = bytearray(chunks[i])
        flipped[position] ^= 1 << n % 8
        bad = [
            flipped,
            chunks[i][:position],
            chunks[i] + bytes(n + 1),
            chunks[(i + 1) % 3],
        ][n // 3 % 4]
        with pytest.raises(ReplicaDiverged, match=f"chunk {i} of 3 of the snapshot of round 12"):
            manifest.check_chunk(i, bad)
        rejected += 1
    assert rejected == 100


def test_every_changed_byte_and_every_cut_of_a_manifest_is_refused_or_gives_another_digest() -> None:
    encoded = encode_record(manifest_of(data(TENSORS)))
    assert read_manifest(encoded, RUN) == manifest_of(data(TENSORS))
    for position in range(len(encoded)):
        changed = bytearray(encoded)
        changed[position] ^= 1
        try:
            other = read_manifest(bytes(changed), RUN)
        except ReplicaDiverged:
            continue
        assert Stored.of(other) != Stored.of(manifest_of(data(TENSORS)))
    for length in range(len(encoded)):
        with pytest.raises(ReplicaDiverged, match="manifest cannot be read"):
            read_manifest(encoded[:length], RUN)
    with pytest.raises(ReplicaDiverged, match="cannot be read"):
        read_manifest(encoded + b"\0", RUN)


def test_foreign_manifests_are_refused_by_name() -> None:
    manifest = manifest_of(data(TENSORS))
    for change, message in {
        "another run, 0000": {"run_id": bytes(32)},
        "version 1, not 2": {"version": 1},
        "names 1 chunks for 8388608 bytes": {"n_bytes": 2 * CHUNK_BYTES},
        "names 2 chunks": {"chunks": (bytes(32), bytes(32))},
    }.items():
        with pytest.raises(ReplicaDiverged, match=change):
            read_manifest(encode_record(manifest.model_copy(update=message)), RUN)


@pytest.mark.parametrize("n_chunks", [1, 7, 300, 70_000])
def test_no_manifest_is_longer_than_what_a_joiner_asks_for(n_chunks: int) -> None:
    n_bytes = n_chunks * CHUNK_BYTES
    manifest = manifest_of(b"x").model_copy(
        update={"round": 2**32 - 1, "n_bytes": n_bytes, "chunks": (bytes(32),) * n_chunks}
    )
    encoded = encode_record(manifest)
    assert len(encoded) <= max_manifest_bytes(n_bytes)
    assert Stored.of(manifest).n_bytes == len(encoded) + n_bytes


def test_altered_headers_and_cut_data_are_refused() -> None:
    content = data(TENSORS)
    n_head = 8 + struct.unpack_from("<Q", content)[0]
    for position in range(n_head):
        changed = bytearray(content)
        changed[position] ^= 1
        try:
            found = tensors_of(changed)
        except ReplicaDiverged:
            continue
        # A letter of a name, the shape of an empty tensor: the run's layout differs.
        layout = {name: (t.shape, t.dtype) for name, t in found.items()}
        assert layout != {name: (t.shape, t.dtype) for name, t in TENSORS.items()}
    for length in range(len(content)):
        with pytest.raises(ReplicaDiverged):
            tensors_of(bytearray(content[:length]))


@pytest.mark.parametrize(
    "entries",
    [
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}},
        {"a": {"dtype": "F32", "shape": [1e308], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 2**126]}},
        {"a": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}},
        {"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {"b": {"dtype": "I8", "shape": [2]}, "a": {"dtype": "I8", "shape": [2]}},
        {"a": [1]},
        [1],
        "a",
        None,
    ],
)
def test_headers_that_only_a_stranger_would_write_are_refused(entries: object) -> None:
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    with pytest.raises(ReplicaDiverged):
        tensors_of(bytearray(struct.pack("<Q", len(text)) + text + bytes(4)))


def test_a_deeply_nested_header_is_refused() -> None:
    text = b"[" * 100_000
    with pytest.raises(ReplicaDiverged, match="RecursionError"):
        tensors_of(bytearray(struct.pack("<Q", len(text)) + text))
