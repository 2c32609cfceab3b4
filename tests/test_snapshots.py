"""Snapshots: the same bytes from every peer, and nothing but a whole one is taken."""

from __future__ import annotations

import hashlib

import pytest
import torch

from thinwire.compression.errors import ReplicaDiverged
from thinwire.node.snapshots import read_snapshot, write_snapshot

RUN = bytes(range(32))
TENSORS = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor([-0.5]), "c": torch.ones(()).bfloat16()}


def snapshot(order: str = "abc") -> bytes:
    return write_snapshot(
        {name: TENSORS[name] for name in order},
        run_id=RUN,
        round=12,
        commit=bytes(32),
        fingerprint=b"12345678",
        peers={1: "second", 0: "first"},
    )


def test_the_bytes_do_not_depend_on_the_order_of_parameters_and_stay_what_they_are() -> None:
    assert snapshot("abc") == snapshot("cba")
    assert hashlib.sha256(snapshot()).hexdigest()[:16] == "69aa0fc8bb7e8f65"


def test_round_trip() -> None:
    manifest, tensors = read_snapshot(snapshot(), RUN)
    assert (manifest.round, manifest.fingerprint) == (12, b"12345678")
    assert [(p.index, p.peer_id) for p in manifest.peers] == [(0, "first"), (1, "second")]
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_every_changed_byte_and_every_cut_is_noticed() -> None:
    blob = snapshot()
    for position in range(len(blob)):
        changed = bytearray(blob)
        changed[position] ^= 1
        try:
            manifest, tensors = read_snapshot(bytes(changed), RUN)
        except ReplicaDiverged:
            continue
        # What the manifest alone says is compared with the ledger and the fingerprint by Replica.adopt.
        assert position < len(blob) - manifest.n_bytes
        assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    for length in range(len(blob)):
        with pytest.raises(ReplicaDiverged):
            read_snapshot(blob[:length], RUN)
    with pytest.raises(ReplicaDiverged, match="another run"):
        read_snapshot(blob, bytes(32))
