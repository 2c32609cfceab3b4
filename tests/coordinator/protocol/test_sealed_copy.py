"""What a node keeps of a run that a committee orders: its founder from record 0, its seats from records."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.committee import SEATS, Sealing, entry
from thinwire.compression.errors import LedgerCorrupt
from thinwire.coordinator.protocol.ledger_copy import LedgerCopy, records_with_committees
from thinwire.coordinator.protocol.messages import (
    AccessEntry,
    Change,
    GenesisBody,
    Reseated,
    digest_of,
)

ACCESS = AccessEntry(token=bytes(32), mode="open", banned=(), listed=())
RESEATED = Reseated(seat=SEATS[1], nonce=bytes(16))
RECOVERY = digest_of(b"any key")


@pytest.fixture
def run(make_genesis: Callable[..., GenesisBody]) -> Sealing:
    """Six records, of which the second and the last name a committee; record 0 has a recovery key."""
    run = Sealing(make_genesis().model_copy(update={"coordinator": SEATS[0], "recovery": RECOVERY}))
    run.add(run.body(changes=(Change(key="run.rounds", value=9),)))
    run.add(run.body(committee=entry([0, 1, 2])))
    run.add(run.governing(reseat=(RESEATED,)))
    run.add(run.governing(access=ACCESS))
    run.add(run.body(work=bytes(32)))
    run.add(run.governing(committee=entry([3, 1, 2]), access=ACCESS, reseat=(RESEATED,)))
    return run


@pytest.mark.parametrize("named_first", [SEATS[0], SEATS[2], "peer-of-no-run"])
def test_the_founder_is_the_one_of_record_0(tmp_path: Path, run: Sealing, named_first: str) -> None:
    """`named_first`: in the node's ticket."""
    copy = LedgerCopy(tmp_path / "ledger.db", run.run_id, named_first)
    assert copy.seats == ()
    copy.keep_genesis(run.genesis_record, run.genesis_signature)
    for sealed in run.sealed:
        copy.append(sealed.commit)
    copy.close()
    again = LedgerCopy(tmp_path / "ledger.db", run.run_id, named_first)
    assert (again.head_round, again.head_digest) == (6, run.chain.digest)
    assert again.seats == entry([3, 1, 2]).seats
    with pytest.raises(LedgerCorrupt, match="record 7: it changes the recovery key"):
        again.append(run.sealing(run.governing(committee=entry([0], recovery=RECOVERY))).commit)
    again.close()


def test_among_many_those_that_name_a_committee_are_sealed_by_the_one_before(
    tmp_path: Path, run: Sealing
) -> None:
    copy = LedgerCopy(tmp_path / "ledger.db", run.run_id, SEATS[0])
    copy.keep_genesis(run.genesis_record, run.genesis_signature)
    commits = [sealed.commit for sealed in run.sealed]
    for at in (1, 5):
        forged = [
            c.model_copy(update={"signature": bytes(64)}) if i == at else c for i, c in enumerate(commits)
        ]
        with pytest.raises(LedgerCorrupt, match=f"record {at + 1}: its signature"):
            copy.append(*forged)
    copy.append(*commits)
    assert (copy.head_round, copy.seats) == (6, entry([3, 1, 2]).seats)
    copy.close()


def test_a_damaged_record_0_is_fetched_again(
    tmp_path: Path, run: Sealing, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "ledger.db"
    copy = LedgerCopy(path, run.run_id, SEATS[0])
    copy.keep_genesis(run.genesis_record, run.genesis_signature)
    copy.append(run.sealed[0].commit)
    copy.close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE record SET record = record || x'00' WHERE round = 0")
    db.close()
    with caplog.at_level(logging.WARNING):
        copy = LedgerCopy(path, run.run_id, SEATS[0])
    assert "record 0 is damaged: it is fetched again" in caplog.text
    assert copy.head_round == 1, "whose founder the ticket names"
    copy.keep_genesis(run.genesis_record, run.genesis_signature)
    copy.close()
    caplog.clear()
    LedgerCopy(path, run.run_id, SEATS[5]).close()
    assert not caplog.text


def test_records_that_name_a_committee_are_found(tmp_path: Path, run: Sealing) -> None:
    copy = LedgerCopy(tmp_path / "ledger.db", run.run_id, SEATS[0])
    for sealed in run.sealed:
        copy.append(sealed.commit)
    copy.close()
    with sqlite3.connect(tmp_path / "ledger.db") as db:
        found = {up_to: [body.round for body in records_with_committees(db, up_to)] for up_to in (1, 2, 5, 6)}
    db.close()
    assert found == {1: [], 2: [2], 5: [2], 6: [2, 6]}
