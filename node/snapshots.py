"""A replica as one blob: a manifest and the replicated tensors, the same bytes from any peer.

u32 length of the manifest | manifest (msgpack record) | safetensors, tensors in name order
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from thinwire.compression.errors import ReplicaDiverged
from thinwire.coordinator.messages import (
    Admission,
    BadMessage,
    Digest,
    Record,
    Round,
    decode_record,
    digest_of,
    encode_record,
)


class Manifest(Record):
    """What a snapshot holds: the replica after `round` of `run_id`, and the peers' indices by then."""

    version: int
    run_id: Digest
    round: Round
    commit: Digest
    fingerprint: Annotated[bytes, Field(min_length=8, max_length=8)]
    peers: tuple[Admission, ...]
    n_bytes: int
    chunks: Annotated[tuple[Digest, ...], Field(min_length=1)]


def write_snapshot(
    tensors: Mapping[str, Tensor],
    *,
    run_id: bytes,
    round: int,
    commit: bytes,
    fingerprint: bytes,
    peers: Mapping[int, str],
) -> bytes:
    """`tensors`: the replicated parameters. One chunk; the blob is named by its digest."""
    data: bytes = save_safetensors(
        {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    )
    manifest = Manifest(
        version=1,
        run_id=run_id,
        round=round,
        commit=commit,
        fingerprint=fingerprint,
        peers=tuple(Admission(index=i, peer_id=p) for i, p in sorted(peers.items())),
        n_bytes=len(data),
        chunks=(digest_of(data),),
    )
    head = encode_record(manifest)
    return struct.pack("<I", len(head)) + head + data


def read_snapshot(blob: bytes, run_id: bytes) -> tuple[Manifest, dict[str, Tensor]]:
    """Raises ReplicaDiverged, saying what is wrong, for anything but a whole snapshot of this run."""
    try:
        (n_head,) = struct.unpack_from("<I", blob)
        if n_head > len(blob) - 4:
            raise ReplicaDiverged("the snapshot is cut short")
        manifest = decode_record(Manifest, blob[4 : 4 + n_head])
        data = blob[4 + n_head :]
        if manifest.run_id != run_id or manifest.version != 1:
            raise ReplicaDiverged("the snapshot is of another run or version")
        if len(data) != manifest.n_bytes or (digest_of(data),) != manifest.chunks:
            raise ReplicaDiverged("the snapshot's chunk 0 does not match its digest")
        tensors: dict[str, torch.Tensor] = load_safetensors(data)
    except (struct.error, BadMessage, SafetensorError) as e:
        raise ReplicaDiverged(f"the snapshot cannot be read: {e}") from e
    return manifest, tensors
