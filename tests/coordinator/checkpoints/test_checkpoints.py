"""A start from a checkpoint knows what one from the whole ledger knows, and doubts what is not as it was."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from thinwire.compression.errors import LedgerCorrupt
from thinwire.coordinator.blobs import BlobStore
from thinwire.coordinator.checkpoints import derived as deriving
from thinwire.coordinator.checkpoints.file import _WHAT, Checkpoint
from thinwire.coordinator.ledger import Ledger
from thinwire.coordinator.protocol.messages import (
    Change,
    CommitBody,
    GenesisBody,
    OfferEntry,
    ReportEntry,
    SnapshotEntry,
    digest_of,
)
from thinwire.coordinator.quorum.recollection import Recollection

N_PEERS = 4


class Run:
    """A ledger on disk, with payloads of which some are blobs."""

    def __init__(self, folder: Path, genesis: GenesisBody, key: Ed25519PrivateKey) -> None:
        self.path, self.key, self.rng = folder / "ledger.db", key, random.Random(1)
        self.blobs_path = folder / "blobs"
        ledger = Ledger.create(self.path, genesis, key)
        for i in range(N_PEERS):
            ledger.admit(f"peer-{i}")
        ledger.close()

    def open(self) -> Ledger:
        return Ledger.open(self.path, self.key.public_key())

    def goes_on(self, n_rounds: int, ledger: Ledger) -> None:
        blobs = BlobStore(self.blobs_path)
        for _ in range(n_rounds):
            ledger.append(self.body(ledger, blobs), self.key)

    def body(self, ledger: Ledger, blobs: BlobStore) -> CommitBody:
        round_, rng = ledger.head_round + 1, self.rng
        payload = rng.randbytes(5000)
        digest = digest_of(payload)
        if rng.random() < 0.8:
            blobs.put(digest, payload)
        large = {"n_bytes": 5000, "payload": None, "digest": digest}
        small = {"n_bytes": 4, "payload": rng.randbytes(4), "digest": None}
        reports, snapshots = [], []
        if round_ % 5 == 1 and round_ > 1:
            value = rng.choice([bytes(8), b"another1"])
            reports = [
                ReportEntry(peer=p, round=round_ - 1, fingerprint=value, checked=False) for p in (0, 2)
            ]
            entry = {"round": round_ - 1, "manifest": digest_of(b"%d" % round_), "n_bytes": 9}
            snapshots = [SnapshotEntry(peer=p, **entry) for p in (0, 1)]
        return CommitBody(
            round=round_,
            parent=ledger.head_digest,
            offers=tuple(
                OfferEntry(peer=p, n_samples=2, n_tokens=8, loss=rng.random(), **(large if p == 1 else small))
                for p in sorted(rng.sample(range(N_PEERS), 3))
            ),
            admitted=ledger.pending_admissions(),
            lr_factor_bits=0,
            reports=tuple(reports),
            snapshots=tuple(snapshots),
            evaluator=rng.choice([None, 2]),
            time_ms=round_ * 1000,
            changes=(Change(key="run.rounds", value=1000 + round_),) if round_ % 7 == 0 else (),
        )

    def checkpoint(self, ledger: Ledger) -> None:
        recollection = Recollection(ledger, BlobStore(self.blobs_path))
        saved = recollection.saved()
        assert saved is not None
        ledger.save_checkpoint(saved, self.key)()


@pytest.fixture
def run(tmp_path: Path, make_genesis: Callable[..., GenesisBody], key: Ed25519PrivateKey) -> Run:
    """30 rounds that are in a checkpoint."""
    run = Run(tmp_path, make_genesis(snapshot_every=5, verify_every=5, rounds=2000), key)
    ledger = run.open()
    run.goes_on(30, ledger)
    run.checkpoint(ledger)
    ledger.close()
    return run


def known(ledger: Ledger, blobs_path: Path) -> dict[str, Any]:
    """Everything that people and the next round are told."""
    derived = Recollection(ledger, BlobStore(blobs_path)).derived
    return {
        "statistics": {**derived.statistics.figures(), "peers": derived.statistics.peers},
        "page": derived.history(),
        "paces": derived.page_history.paces(),
        "changes": derived.page_history.changes(),
        "retention": (derived.retention.figures([0, 1]), derived.retention.missing()),
        "work": [(derived.standing.work(i), derived.standing.is_fresh(i)) for i in range(N_PEERS)],
        "evaluators": [derived.reports.has_evaluator(r) for r in range(40)],
        "open round": derived.open_round(),
        "course": (derived.course, derived.peers, derived.last_ms),
        "said": vars(derived.reports)["_said"],
    }


def test_a_start_from_a_checkpoint_knows_all_that_the_ledger_says(run: Run) -> None:
    ledger = run.open()
    run.goes_on(11, ledger)
    ledger.close()
    ledger = run.open()
    assert ledger.checkpoint is not None
    assert (ledger.checkpoint.round, ledger.head_round) == (30, 41)
    quick = known(ledger, run.blobs_path)
    digests = [ledger.digest_at(r) for r in range(42)]
    run.checkpoint(ledger)
    ledger.close()
    run.path.with_suffix(".checkpoint").unlink()
    ledger = run.open()
    assert ledger.checkpoint is None
    assert known(ledger, run.blobs_path) == quick
    assert [ledger.digest_at(r) for r in range(42)] == digests
    assert ledger.peers() == {i: f"peer-{i}" for i in range(N_PEERS)}
    assert ledger.pending_admissions() == ()
    ledger.close()


@pytest.mark.parametrize("column", ["record", "signature", "digest"])
def test_what_is_not_as_it_was_is_verified_and_named(run: Run, column: str) -> None:
    db = sqlite3.connect(run.path)
    (value,) = db.execute(f"SELECT {column} FROM record WHERE round = 9").fetchone()
    for changed in (bytes([value[0] ^ 1]) + value[1:], value[:-1], "text"):
        with db:
            db.execute(f"UPDATE record SET {column} = ? WHERE round = 9", (changed,))
        with pytest.raises(LedgerCorrupt, match="record 9:"):
            run.open()
    db.close()


def test_peers_that_are_not_as_they_were_and_a_shorter_ledger_are_doubted(run: Run) -> None:
    db = sqlite3.connect(run.path)
    with db:
        db.execute("DELETE FROM record WHERE round > 20")
    ledger = run.open()
    assert (ledger.checkpoint, ledger.head_round) == (None, 20)
    ledger.close()
    with db:
        db.execute("UPDATE admission SET peer_id = 'mallory' WHERE idx = 1")
    db.close()
    with pytest.raises(LedgerCorrupt, match="it admits peer-1 as peer 1"):
        run.open()


def test_nobody_else_s_checkpoint_is_taken(run: Run) -> None:
    path = run.path.with_suffix(".checkpoint")
    whole = path.read_bytes()
    ledger = run.open()
    for data in (b"", whole[:40], whole[:-1], whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]):
        path.write_bytes(data)
        assert Checkpoint.read(path, ledger.run_id, run.key.public_key()) is None
    ledger.save_checkpoint(b"", Ed25519PrivateKey.generate())()
    assert Checkpoint.read(path, ledger.run_id, run.key.public_key()) is None
    for fields in ([], [1] * 8, 1):  # of another version
        body = msgpack.packb(fields)
        path.write_bytes(run.key.sign(_WHAT + body) + body)
        assert Checkpoint.read(path, ledger.run_id, run.key.public_key()) is None
    path.write_bytes(whole)
    assert Checkpoint.read(path, bytes(32), run.key.public_key()) is None
    assert Checkpoint.read(path, ledger.run_id, run.key.public_key()) is not None
    ledger.close()


def test_of_another_version_and_of_other_classes_nothing_is_read(run: Run) -> None:
    ledger = run.open()
    recollection = Recollection(ledger, BlobStore(run.blobs_path))
    assert ledger.checkpoint is not None
    around = vars(recollection)["_around"]
    form, kept = ledger.checkpoint.derived[:32], ledger.checkpoint.derived[32:]
    assert deriving.restored(form + kept, around) is not None
    assert deriving.restored(bytes(32) + kept, around) is None
    assert deriving.restored(form + msgpack.packb([["object", "subprocess", "Popen", {}]]), around) is None
    assert deriving.restored(form + kept[:-1], around) is None
    ledger.close()
