"""A run that a committee ordered is read without a server: `tests/golden/committee/ledger`.

The build of 29 November 2026 wrote it (protocol 4): 14 rounds of two nodes, ordered by their founder alone up
to round 3, by three seats, by three others that the recovery key named in round 10, and from round 13 on by
five; rounds 6 and 8 only let a seat vote again and ban a peer. Nobody writes it anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.committee import KEYS, SEATS, entry
from thinwire.coordinator.ledger import Ledger
from thinwire.coordinator.protocol.figures import short
from thinwire.coordinator.protocol.ledger_copy import COPY_NAME, LedgerCopy
from thinwire.coordinator.protocol.ledger_file import check, open_ledger
from thinwire.coordinator.protocol.messages import BadMessage
from thinwire.coordinator.protocol.trust.seals import Sealed
from thinwire.node.batches import batches
from thinwire.node.cli.ledger_command import check_ledger, save_ledger_of_state
from thinwire.node.cli.offline import status_of
from thinwire.node.cli.replay import replay
from thinwire.node.config import parse_config
from thinwire.node.replica import build_replica
from thinwire.node.states.opening import open_state
from thinwire.node.tasks.registry import make_task

FILE = Path(__file__).parents[2] / "golden" / "committee" / "ledger"
HEAD, FINGERPRINT = 14, "487b0aa0fe408b4d"
A, B, C, D, E, F = map(short, SEATS[:6])
TOLD = (
    f"round 3: the committee is now {A}, {B}, {C}; 2 of 3 must sign (signed by {A})",
    f"round 3: entry is open (signed by {A})",
    f"round 6: {B} votes again: it had lost its votes (sealed by {A}, {B})",
    f"round 8: entry is open, 1 peer banned (sealed by {A}, {B})",
    f"round 10: the committee is now {B}, {C}, {D}; 2 of 3 must sign (signed with the recovery key)",
    f"round 12: the committee is now {B}, {C}, {D}, {E}, {F}; 3 of 5 must sign (sealed by {B}, {C})",
)


def seat_s(folder: Path) -> Path:
    """The state folder of a seat that has caught up."""
    with open_ledger(FILE) as file:
        ledger = Ledger.begin(folder / COPY_NAME, file.record, file.signature)
        for commit in file.commits():
            work = file.work(commit.body) or b""
            ledger.take(Sealed(record=commit.record, seal=commit.signature, work=work))
    ledger.close()
    return folder


def node_s(folder: Path) -> Path:
    """The state folder of a node, whose ticket does not name the founder."""
    with open_ledger(FILE) as file:
        copy = LedgerCopy(folder / COPY_NAME, file.run_id, SEATS[6])
        copy.keep_genesis(file.record, file.signature)
        for commit in file.commits():
            copy.append(commit)
    copy.close()
    return folder


FOLDERS = pytest.mark.parametrize("made", [seat_s, node_s])
Make = Callable[[Path], Path]


def test_it_is_whole_tells_what_happened_and_replays() -> None:
    summary = check(FILE)
    assert (summary.rounds, summary.absent_to, summary.unsigned) == (HEAD, 0, ())
    assert summary.changes == TOLD
    found = replay(FILE)
    assert found is not None
    assert (found.rounds, found.fingerprint, found.verified, found.differing) == (HEAD, FINGERPRINT, 12, 0)


@pytest.mark.parametrize("at_once", [1, HEAD])
def test_rounds_that_train_nothing_are_the_same_in_any_batch(at_once: int) -> None:
    with open_ledger(FILE) as file:
        task = make_task(parse_config(file.genesis.config).task, None, None)
        replica = build_replica(file.run_id, file.genesis, task)
        replica.begin(None)
        commits = list(file.commits())
        some = [[c] for c in commits] if at_once == 1 else batches(commits, replica.strategy)
        before = ""
        for batch in some:
            replica.apply_batch(batch, file.payload)
            now = replica.fingerprint().hex()
            trains = any(commit.body.offers for commit in batch)
            assert (now == before) == (not trains)
            before = now
    assert (replica.round, now) == (HEAD, FINGERPRINT)


@FOLDERS
def test_a_state_folder(tmp_path: Path, made: Make, caplog: pytest.LogCaptureFixture) -> None:
    folder = made(tmp_path)
    with open_ledger(FILE) as file, open_state(folder) as state:
        commits = list(file.commits())
        for after in range(HEAD + 1):  # a chain that begins anywhere knows its committee
            assert list(state.commits(after)) == commits[after:]
        assert (state.head, state.is_over, state.seats) == (HEAD, True, entry([1, 2, 3, 4, 5]).seats)
        status = status_of(state)
    assert (status["round"], status["state"]) == (HEAD, "finished")
    assert tuple(status["changes"]) == TOLD
    assert [peer["offers_counted"] for peer in status["peers"]] == [10, 10]
    with caplog.at_level(logging.INFO, logger="thinwire.node"):
        check_ledger(folder)
    assert [f"the run was changed: {text}" for text in TOLD] == caplog.messages[1:]
    save_ledger_of_state(folder, tmp_path / "again")
    found = replay(tmp_path / "again")
    assert found is not None
    assert found.fingerprint == FINGERPRINT
    if made is seat_s:
        assert (tmp_path / "again").read_bytes() == FILE.read_bytes()


def test_a_seat_that_falls_behind_gets_all_from_another(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    whole = Ledger.open(seat_s(tmp_path / "a") / COPY_NAME, KEYS[5].public_key())
    other = Ledger.begin(tmp_path / "b" / COPY_NAME, whole.genesis_record, whole.genesis_signature)
    while batch := whole.sealed(other.head_round, 5):
        for sealed in batch:
            other.take(sealed)
    assert (other.head_round, other.head_digest, other.peers()) == (HEAD, whole.head_digest, whole.peers())
    assert other.sealed(0, 99) == whole.sealed(0, 99)
    assert [body.round for body in other.committees(HEAD)] == [3, 10, 12]
    with pytest.raises(BadMessage, match="a commit was given back, but record 15"):
        other.adopt(whole.commits(4, 1))
    whole.close()
    other.close()
