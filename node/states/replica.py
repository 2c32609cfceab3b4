"""The replica that a state folder holds: from its newest snapshot, else from base weights and payloads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path

from torch import Tensor

from ...compression.errors import ReplicaDiverged, ThinwireError
from ...coordinator.protocol.attested import Attested, Snapshots
from ...coordinator.protocol.messages import BlobRef, Commit, OfferEntry
from ...coordinator.protocol.trust.standing import Standing
from ..batches import batches
from ..config import parse_config
from ..replica import Replica, build_replica
from ..snapshots.format import Manifest, max_manifest_bytes, read_manifest, tensors_of
from ..snapshots.local_state import BadLocalState
from ..snapshots.names import SNAPSHOTS
from ..snapshots.store import SnapshotStore
from ..tasks.base import Task
from ..tasks.registry import make_task
from .opening import RunState

log = logging.getLogger("thinwire.node")

Load = Callable[[], tuple[Manifest, dict[str, Tensor]]]
"""Reads a snapshot, every chunk verified. Raises ReplicaDiverged, KeyError or OSError."""


class NotHere(ThinwireError):
    """The folder does not hold what was asked for."""


@dataclass(frozen=True, slots=True)
class Found:
    """The newest replica that can be had from a folder, and the task whose model it is."""

    replica: Replica
    task: Task


def newest_replica(state: RunState, import_path: str | None, task: Task | None = None) -> Found:
    """Without a network, and without a change to the folder. `task`: instead of `import_path`.

    Raises NotHere (what the folder has, and which command would do), ConfigError (task, no record 0),
    Incompatible (another model) and LedgerCorrupt.
    """
    task = task or make_task(parse_config(state.genesis.config).task, import_path, None)
    replica = build_replica(state.run_id, state.genesis, task)
    if state.head == 0:
        raise NotHere(f"{state.folder}: the run has no round yet: there is nothing to export")
    is_there = _from_snapshot(state, replica) or _from_base(state, replica)
    if not is_there:
        raise NotHere(_what_is_there(state, replica))
    if replica.round < state.head:
        log.warning(
            "this folder's ledger goes on to round %d: the payloads of the rounds after %d are not in it",
            state.head,
            replica.round,
        )
    return Found(replica, task)


def own_model(state: RunState, import_path: str | None) -> Found:
    """The replica of the newest snapshot with local state in a node's folder, and with that the node's own
    model (see `Strategy.own_model`). Raises as `newest_replica` does, and NotHere where it has none."""
    task = make_task(parse_config(state.genesis.config).task, import_path, None)
    replica = build_replica(state.run_id, state.genesis, task)
    folder = state.folder / SNAPSHOTS
    store = SnapshotStore(folder, state.run_id, read_only=True) if folder.is_dir() else None
    for stored in reversed(store.stored() if store is not None else []):
        assert store is not None
        try:
            replica.take(store, stored, next(state.commits(stored.round - 1)))
            has_state = replica.take_local_state(store.folder_of(stored))
        except (ReplicaDiverged, BadLocalState, KeyError, OSError) as e:
            log.warning("the snapshot after round %d cannot be used: %s", stored.round, e)
            continue
        if has_state and replica.strategy.has_own_model:
            return Found(replica, task)
        if has_state:
            raise NotHere(
                f"{state.folder}: this node's own model was the reference model after round {stored.round}: "
                "leave --own out"
            )
    raise NotHere(
        f"{state.folder}: no model of a node's own is here: a node in gossip has one, between merges"
    )


def blob_of_run(state: RunState, ref: BlobRef, what: str) -> bytes:
    """One that record 0 names. Raises NotHere."""
    data = state.blob(ref.digest, ref.n_bytes)
    if data is None:
        raise NotHere(
            f"{state.folder} does not hold the run's {what} ({ref.digest.hex()[:16]}): use the coordinator's "
            f"state folder, or ask the coordinator while it serves (thinwire export TICKET -o DIR)"
        )
    return data


def _from_snapshot(state: RunState, replica: Replica) -> bool:
    """Takes the newest snapshot that can be read, and goes on from there as far as the folder allows."""
    for round_, load in _snapshots(state):
        try:
            manifest, tensors = load()
            if round_ > state.head:
                raise ReplicaDiverged("it is newer than the ledger as it was read")
            if replica.has_frozen:
                replica.begin(None if state.genesis.base is None else _base(state))
            replica.adopt(manifest, tensors, next(state.commits(round_ - 1)))
        except (ReplicaDiverged, KeyError, OSError) as e:  # another process may just have removed it
            log.warning("the snapshot after round %d cannot be used: %s", round_, e)
            continue
        _follow(state, replica)
        _go_on(state, replica)
        return True
    return False


def _snapshots(state: RunState) -> Iterator[tuple[int, Load]]:
    """The newest first: a node's own ones, and those that a coordinator has kept of the run's end."""
    folder = state.folder / SNAPSHOTS
    if folder.is_dir():
        store = SnapshotStore(folder, state.run_id, read_only=True)
        for stored in reversed(store.stored()):
            yield stored.round, partial(store.load, stored)
    standing = Standing(state.run_id, state.course.settings.audits)
    known = Snapshots(parse_config(state.genesis.config).run.snapshot_every, standing)
    for commit in state.commits():
        standing.committed(commit.body, commit.digest)
        known.committed(commit.body)
    for attested in reversed(known.attested()):
        if state.blob_path(attested.manifest).is_file():
            yield attested.round, partial(_load, state, attested)


def _load(state: RunState, attested: Attested) -> tuple[Manifest, dict[str, Tensor]]:
    """From blobs. Raises ReplicaDiverged: it is not all here."""
    encoded = state.blob(attested.manifest, max_manifest_bytes(attested.n_bytes))
    if encoded is None:
        raise ReplicaDiverged("its manifest is gone")
    manifest, data = read_manifest(encoded, state.run_id), bytearray()
    for i, digest in enumerate(manifest.chunks):
        chunk = state.blob(digest, manifest.chunk_bytes(i))
        if chunk is None:
            raise ReplicaDiverged(f"chunk {i} of {len(manifest.chunks)} is not here")
        data += chunk
    return manifest, tensors_of(data)


def _from_base(state: RunState, replica: Replica) -> bool:
    """From the run's beginning; False if a payload is not here any more."""
    commits = state.commits()
    if any(not _has_payloads(state, commit) for commit in commits):
        return False
    replica.begin(None if state.genesis.base is None else _base(state))
    _go_on(state, replica)
    return True


def _follow(state: RunState, replica: Replica) -> None:
    """What the ledger says up to the replica's round: who was admitted, and who is condemned."""
    replica.peers = {}
    for commit in takewhile(lambda commit: commit.body.round <= replica.round, state.commits()):
        replica.peers.update({a.index: a.peer_id for a in commit.body.admitted})
        replica.condemned(commit)


def _go_on(state: RunState, replica: Replica) -> None:
    def payload(offer: OfferEntry) -> bytes:
        data = _payload(state, offer)
        if data is None:
            raise NotHere(f"{state.folder}: a payload of peer {offer.peer} was there a moment ago: try again")
        return data

    here: Iterator[Commit] = takewhile(
        lambda commit: _has_payloads(state, commit), state.commits(replica.round)
    )
    for commits in batches(here, replica.strategy):
        replica.apply_batch(commits, payload)


def _has_payloads(state: RunState, commit: Commit) -> bool:
    return all(
        offer.digest is None or state.blob_path(offer.digest).is_file() for offer in commit.body.offers
    )


def _payload(state: RunState, offer: OfferEntry) -> bytes | None:
    if offer.digest is None:
        return offer.payload
    return state.blob(offer.digest, offer.n_bytes)


def _base(state: RunState) -> bytes:
    ref = state.genesis.base
    assert ref is not None
    return blob_of_run(state, ref, "base weights")


def _what_is_there(state: RunState, replica: Replica) -> str:
    gone = next((c.body.round for c in state.commits() if not _has_payloads(state, c)), 0)
    what = "a coordinator's" if state.kind == "coordinator" else "a node's"
    return (
        f"{state.folder} is {what} state folder with the ledger up to round {state.head}, but it holds no "
        f"snapshot, and payloads of round {gone} are gone: the weights cannot be had from it. Use a node's "
        f"state folder (thinwire export NODE_STATE -o DIR), or the ticket while coordinator and nodes run"
    )


def base_path(state: RunState) -> Path | None:
    """The file with the base weights; None: the run began without, or it is not here."""
    ref = state.genesis.base
    path = None if ref is None else state.blob_path(ref.digest)
    return path if path is not None and path.is_file() else None
