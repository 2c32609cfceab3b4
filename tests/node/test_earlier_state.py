"""State folders that an earlier build has written are opened and gone on with.

`tests/golden/state` was written by the build of 28 November 2026 (commit 227d217, protocol 2): a coordinator
and two nodes of `run.toml`, stopped after round 6 of 12. `coordinator` and `node` are the folders that they
left, but for locks and the port; `expected.json` has the fingerprints that the same build had after each
round. `tests/golden/state_3` is the same of 29 November (commit d4bc160, protocol 3), stopped after round 14
of 40: offers are signed, an invitation was used, a record changes the learning rate; and `ledger` is the file
that this build made of it. `tests/golden/state_diloco`, of the same build, was stopped after round 6 of 12.
So there is one of each strategy from before new runs had other values. Nobody writes them anew: a build that
cannot open them cannot go on with the runs of its users.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from tests.support.committee import KEYS, RECOVERY_KEY, SealsAtOnce, entry, raw_public
from tests.support.local_nodes import run_all
from tests.support.records import commit_body
from thinwire.coordinator.blobs import BlobStore
from thinwire.coordinator.ledger import Ledger
from thinwire.coordinator.observe.overview import ENTRIES_SHOWN
from thinwire.coordinator.protocol.identity import load_or_create, peer_id_of
from thinwire.coordinator.protocol.ledger_copy import COPY_NAME, LedgerCopy
from thinwire.coordinator.protocol.ledger_file import MAGIC
from thinwire.coordinator.protocol.messages import Change, Commit, OfferEntry, digest_of
from thinwire.coordinator.service import Service
from thinwire.coordinator.state import StateDir
from thinwire.node.cli.ledger_command import save_ledger_of_state
from thinwire.node.cli.replay import replay
from thinwire.node.config import load_config, parse_config
from thinwire.node.genesis import public_config
from thinwire.node.links.local import local_swarm
from thinwire.node.replica import Replica, build_replica
from thinwire.node.runner import Runner
from thinwire.node.snapshots.store import SnapshotStore
from thinwire.node.states.opening import open_state
from thinwire.node.system.folder import IDENTITY_NAME
from thinwire.node.tasks.registry import make_task
from thinwire.optim.registry import complete_config, complete_new_run

GOLDEN = Path(__file__).parents[1] / "golden"


class Earlier:
    """A copy of the folders, which may be written to. `head`: where they end; `snapshots`: rounds of those
    that the node has; `heard_of`: of that which the coordinator knew."""

    def __init__(self, name: str, folder: Path, snapshots: list[int], heard_of: int | None = None) -> None:
        shutil.copytree(GOLDEN / name, folder)
        self.folder, self.snapshots, self.heard_of = folder, snapshots, heard_of
        self.fingerprints: list[str] = json.loads((folder / "expected.json").read_text())["fingerprints"]
        self.head = len(self.fingerprints)
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


STATES = [("state", [4, 5], 4), ("state_3", [12, 14], 12), ("state_diloco", [4, 6], None)]
"""Name, snapshots that the node has, and that which the coordinator had heard of."""


@pytest.fixture(params=STATES, ids=["protocol 2", "protocol 3", "diloco"])
def earlier(request: pytest.FixtureRequest, tmp_path: Path) -> Earlier:
    name, snapshots, heard_of = request.param
    return Earlier(name, tmp_path / "state", snapshots, heard_of)


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
    assert (status["round"], status["state"], status["mismatches"]) == (earlier.head, "training", 0)
    assert earlier.peer_id in [peer["peer_id"] for peer in status["peers"]]
    assert status["held_out"]
    assert (status["snapshot"] or {}).get("round") == earlier.heard_of
    assert [entry["round"] for entry in overview["entries"]] == list(range(earlier.head, 0, -1))[
        :ENTRIES_SHOWN
    ]
    assert all(entry["why"] for entry in overview["entries"]), "history.json has it"
    assert "joined" in [happening["kind"] for happening in overview["happenings"]]


def test_the_ledger_gives_the_same_replica(earlier: Earlier) -> None:
    replica = earlier.replica()
    replica.begin(None)
    found = []
    for commit in earlier.commits():
        replica.apply(commit, earlier.payload, offered=False)
        found.append(replica.fingerprint().hex())
    assert found == earlier.fingerprints


def test_it_keeps_its_values_where_new_runs_have_others(
    earlier: Earlier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its run file, which says nothing of them, is its run file still."""
    blobs = (earlier.genesis.corpus, earlier.genesis.held_out)
    text = b"".join(earlier.store.read(blob.digest) for blob in blobs if blob is not None)
    (earlier.folder / "corpus.txt").write_bytes(text)
    monkeypatch.chdir(earlier.folder)
    config, recorded = load_config(Path("run.toml"), environ={}), parse_config(earlier.genesis.config)
    task, new = make_task(config.task, None, None), complete_new_run(config.strategy)
    assert public_config(config, task, recorded).strategy == public_config(recorded, task, recorded).strategy
    defaults, strategy = complete_config(config.strategy), earlier.replica().strategy
    others = [name for name, value in new.items() if value != recorded.strategy.get(name)]
    assert others, "there are such"
    for name in others:
        if name not in ("name", "compressor"):
            assert strategy.option(name) == recorded.strategy.get(name, defaults[name])


def test_a_node_has_its_copy_of_the_ledger_and_its_snapshots(earlier: Earlier) -> None:
    copy = LedgerCopy(earlier.run_folder / COPY_NAME, earlier.run_id, peer_id_of(earlier.key.public_key()))
    assert copy.head_round == earlier.head
    copy.close()
    commits = earlier.commits()
    store = SnapshotStore(earlier.run_folder / "snapshots", earlier.run_id)
    assert [stored.round for stored in store.stored()] == earlier.snapshots
    for stored in store.stored():
        replica = earlier.replica()
        replica.take(store, stored, commits[stored.round - 1])
        replica.peers = dict(copy.peers)
        assert replica.take_local_state(store.folder_of(stored))
        for commit in commits[: stored.round]:
            replica.condemned(commit)
        for commit in commits[stored.round :]:
            replica.apply(commit, earlier.payload, offered=False)
        assert replica.fingerprint().hex() == earlier.fingerprints[-1]


def test_a_file_of_the_ledger_has_the_bytes_that_it_always_had(tmp_path: Path) -> None:
    earlier = Earlier("state_3", tmp_path / "state", [])
    save_ledger_of_state(earlier.coordinator, tmp_path / "ledger")
    assert (tmp_path / "ledger").read_bytes() == (earlier.folder / "ledger").read_bytes()


def test_the_run_goes_on_to_its_end(earlier: Earlier, caplog: pytest.LogCaptureFixture) -> None:
    """Ordered by a committee of three from now on, and shorter than it was going to be."""
    caplog.set_level(logging.INFO, logger="thinwire.node")
    n_rounds = earlier.head + 4
    ledger = Ledger.open(earlier.coordinator / "ledger.db", earlier.key.public_key())
    committee = entry([0, 1, 2], recovery=digest_of(raw_public(RECOVERY_KEY)))
    body = ledger.commits(earlier.head - 1, 1)[0].body
    named = commit_body(
        earlier.head + 1,
        parent=ledger.head_digest,
        offers=(),
        changes=(Change(key="run.rounds", value=n_rounds),),
        committee=committee,
        lr_factor_bits=body.lr_factor_bits,
        time_ms=body.time_ms,
    )
    ledger.append(named, earlier.key)
    ledger.close()
    with local_swarm(earlier.coordinator, earlier.genesis, earlier.key, log=SealsAtOnce) as swarm:
        runners = [
            Runner(swarm.link(earlier.peer_id), folder=earlier.run_folder),
            Runner(swarm.link("a new peer")),
        ]
        results = run_all(runners)
        status = swarm.call(lambda service, now_s: service.status(now_s))
    newest = earlier.snapshots[-1]
    assert f"took the replica after round {newest} from this node's disk" in caplog.text
    assert f"after round {earlier.head + 1}: the committee is now " in caplog.text
    assert [result.rounds for result in results] == [n_rounds, n_rounds]
    assert len({result.fingerprint for result in results}) == 1, (
        "one was in a snapshot of the earlier build's"
    )
    assert (status["round"], status["state"], status["mismatches"]) == (n_rounds, "finished", 0)
    path = earlier.folder / "after"
    save_ledger_of_state(earlier.coordinator, path)
    assert path.read_bytes().startswith(MAGIC + (4).to_bytes(4, "little"))
    if earlier.genesis.protocol == 3:  # whose payloads are in its records
        found = replay(path)
        assert found is not None
        assert (found.rounds, found.fingerprint) == (n_rounds, results[0].fingerprint)
    with open_state(earlier.coordinator) as state:
        assert state.seats == committee.seats
        after = list(state.commits(after=n_rounds - 2))
    assert [len(commit.signature) for commit in after] == [8 + 2 * 65] * 2
    again = Ledger.open(earlier.coordinator / "ledger.db", KEYS[2].public_key())
    assert again.head_round == n_rounds
    again.close()
