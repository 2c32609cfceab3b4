"""State folders that an earlier build has written are opened and gone on with.

`tests/golden/state` was written by the build of 28 November 2026 (commit 227d217): a coordinator and two
nodes of `run.toml`, stopped after round 6 of 12. `coordinator` and `node` are the folders that they left, but
for locks and the port; `expected.json` has the fingerprints that the same build had after each round. Nobody
writes them anew: a build that cannot open them cannot go on with the runs of its users.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from tests.support.local_nodes import run_all
from thinwire.coordinator.blobs import BlobStore
from thinwire.coordinator.ledger import Ledger
from thinwire.coordinator.protocol.identity import load_or_create, peer_id_of
from thinwire.coordinator.protocol.ledger_copy import COPY_NAME, LedgerCopy
from thinwire.coordinator.protocol.messages import Commit, OfferEntry
from thinwire.coordinator.service import Service
from thinwire.coordinator.state import StateDir
from thinwire.node.config import parse_config
from thinwire.node.links.local import local_swarm
from thinwire.node.replica import Replica, build_replica
from thinwire.node.runner import Runner
from thinwire.node.snapshots.store import SnapshotStore
from thinwire.node.system.folder import IDENTITY_NAME
from thinwire.node.tasks.registry import make_task

STATE = Path(__file__).parents[1] / "golden" / "state"
HEAD, ROUNDS = 6, 12
FINGERPRINTS: list[str] = json.loads((STATE / "expected.json").read_text())["fingerprints"]


class Earlier:
    """A copy of the folders, which may be written to."""

    def __init__(self, folder: Path) -> None:
        shutil.copytree(STATE, folder)
        self.coordinator, self.node = folder / "coordinator", folder / "node"
        for key in (self.coordinator / "key", self.coordinator / "token", self.node / IDENTITY_NAME):
            key.chmod(0o600)  # which git does not keep
        self.key = load_or_create(self.coordinator / "key")
        self.peer_id = peer_id_of(load_or_create(self.node / IDENTITY_NAME).public_key())
        ledger = Ledger.open(self.coordinator / "ledger.db", self.key.public_key())
        self.run_id, self.genesis = ledger.run_id, ledger.genesis
        ledger.close()
        self.run_folder = self.node / self.run_id.hex()[:16]
        self.store = BlobStore(self.coordinator / "blobs")

    def commits(self) -> list[Commit]:
        ledger = Ledger.open(self.coordinator / "ledger.db", self.key.public_key())
        try:
            return list(ledger.all_commits())
        finally:
            ledger.close()

    def payload(self, offer: OfferEntry) -> bytes:
        if offer.payload is not None:
            return offer.payload
        assert offer.digest is not None
        return self.store.read(offer.digest)

    def replica(self) -> Replica:
        """Before its weights are set."""
        task = make_task(parse_config(self.genesis.config).task, None, None)
        return build_replica(self.run_id, self.genesis, task)


@pytest.fixture
def earlier(tmp_path: Path) -> Earlier:
    return Earlier(tmp_path / "state")


def test_a_coordinator_goes_on(earlier: Earlier) -> None:
    with StateDir(earlier.coordinator) as state:
        ledger = Ledger.open(state.ledger_path, earlier.key.public_key())
        service = Service(
            ledger=ledger,
            blobs=earlier.store,
            key=earlier.key,
            token=state.token(),
            send=lambda _peer, _message: None,
            on_commit=lambda _round: None,
            now_s=0.0,
            wall_ms=lambda: 0,
            history=state.history(),
        )
        status, overview = service.status(0.0), service.overview(0.0)
        ledger.close()
    assert (status["round"], status["state"], status["mismatches"]) == (HEAD, "training", 0)
    assert earlier.peer_id in [peer["peer_id"] for peer in status["peers"]]
    assert status["held_out"]
    assert status["snapshot"]["round"] == 4
    assert [entry["round"] for entry in overview["entries"]] == list(range(HEAD, 0, -1))
    assert all(entry["why"] for entry in overview["entries"]), "history.json has it"
    assert "joined" in [happening["kind"] for happening in overview["happenings"]]


def test_the_ledger_gives_the_same_replica(earlier: Earlier) -> None:
    replica = earlier.replica()
    replica.begin(None)
    found = []
    for commit in earlier.commits():
        replica.apply(commit, earlier.payload, offered=False)
        found.append(replica.fingerprint().hex())
    assert found == FINGERPRINTS


def test_a_node_has_its_copy_of_the_ledger_and_its_snapshots(earlier: Earlier) -> None:
    copy = LedgerCopy(earlier.run_folder / COPY_NAME, earlier.run_id, peer_id_of(earlier.key.public_key()))
    assert copy.head_round == HEAD
    copy.close()
    commits = earlier.commits()
    store = SnapshotStore(earlier.run_folder / "snapshots", earlier.run_id)
    assert [stored.round for stored in store.stored()] == [4, 5]
    for stored in store.stored():
        replica = earlier.replica()
        replica.take(store, stored, commits[stored.round - 1])
        replica.peers = dict(copy.peers)
        assert replica.take_local_state(store.folder_of(stored))
        for commit in commits[stored.round :]:
            replica.apply(commit, earlier.payload, offered=False)
        assert replica.fingerprint().hex() == FINGERPRINTS[-1]


def test_the_run_goes_on_to_its_end(earlier: Earlier, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="thinwire.node")
    with local_swarm(earlier.coordinator, earlier.genesis, earlier.key) as swarm:
        runners = [
            Runner(swarm.link(earlier.peer_id), folder=earlier.run_folder),
            Runner(swarm.link("a new peer")),
        ]
        results = run_all(runners)
        status = swarm.call(lambda service, now_s: service.status(now_s))
    assert "took the replica after round 5 from this node's disk" in caplog.text
    assert [result.rounds for result in results] == [ROUNDS, ROUNDS]
    assert len({result.fingerprint for result in results}) == 1, (
        "one was in a snapshot of the earlier build's"
    )
    assert (status["round"], status["state"], status["mismatches"]) == (ROUNDS, "finished", 0)
