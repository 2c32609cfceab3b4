"""`thinwire ledger` reads a recorded run from a real coordinator: whole, or said at once not to be."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.support.service_world import World
from thinwire.coordinator.protocol.identity import save
from thinwire.coordinator.protocol.ledger_file import check
from thinwire.coordinator.protocol.messages import GenesisBody
from thinwire.coordinator.server_thread import ServerThread
from thinwire.node.cli.ledger_command import save_ledger
from thinwire.node.cli.ledger_download import progress
from thinwire.node.links import payloads
from thinwire.node.system.stopping import Stop

pytestmark = [pytest.mark.swarm, pytest.mark.usefixtures("own_temp_folder")]

Record = Callable[..., Path]


@pytest.fixture
def record(tmp_path: Path, make_genesis: Callable[..., GenesisBody], key: Ed25519PrivateKey) -> Record:
    """A coordinator's state folder with a run of two peers, whose payloads are blobs. `attested`: rounds of
    snapshots that both report."""

    def make(rounds: int, *attested: int, n_bytes: int = 6000) -> Path:
        folder = tmp_path / "coordinator"
        folder.mkdir()
        save(key, folder / "key")
        world = World(folder, make_genesis(rounds=2 * rounds, snapshot_every=10), key)
        world.train("a", "b")
        for round_ in range(1, rounds + 1):
            world.round(round_, "a", "b", payload=round_.to_bytes(4, "big") * (n_bytes // 4))
            if round_ in attested:
                world.snapshot(round_, "a", "b")
        world.ledger.close()
        return folder

    return make


def saved(folder: Path, output: Path) -> float:
    """Seconds that it took to save the run's ledger over a real session."""
    with ServerThread(folder) as coordinator:
        began_s = time.monotonic()
        save_ledger(coordinator.ticket.line(), output, Stop())
        return time.monotonic() - began_s


def test_a_whole_run_is_saved_and_checked(record: Record, tmp_path: Path) -> None:
    saved(record(40), tmp_path / "run.ledger")
    summary = check(tmp_path / "run.ledger")
    assert (summary.rounds, summary.n_blobs, summary.absent_to) == (40, 80, 0)


def test_a_pruned_run_is_said_not_to_be_whole_before_anything_is_fetched(
    record: Record, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(payloads, "_RETRY_S", 5.0)
    caplog.set_level(logging.INFO)
    took_s = saved(record(80, 40, 50), tmp_path / "run.ledger")
    summary = check(tmp_path / "run.ledger")
    assert (summary.rounds, summary.n_blobs, summary.absent_to) == (80, 80, 40)
    told = [r.getMessage() for r in caplog.records if r.name == "thinwire.node"]
    (first,) = (n for n, text in enumerate(told) if "cannot be whole" in text)
    (last,) = (n for n, text in enumerate(told) if text.startswith("wrote"))
    assert first < last
    assert "rounds up to 40 have been deleted" in told[first]
    assert "payloads from round 41 on" in told[first]
    assert 'keep = "all"' in told[first]
    assert took_s < 60, "payloads that are gone are not asked for one by one"


def test_progress_is_one_line() -> None:
    assert progress(250, 1000, 41_000_000, 10.0) == "record 250 of 1,000, 41.0 MB, about 30 s left"
