"""Going on with a run: the same configuration, whichever thinwire it was started with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.support.waiting import wait_until
from thinwire.compression.errors import ConfigError
from thinwire.coordinator.blobs import BlobStore
from thinwire.coordinator.entry.rules import EntryRules
from thinwire.coordinator.ledger import Ledger
from thinwire.coordinator.protocol.identity import load_or_create, new_key, peer_id_of
from thinwire.coordinator.protocol.messages import NodeState, Offer, digest_of
from thinwire.coordinator.server_thread import ServerThread
from thinwire.coordinator.state import StateDir
from thinwire.node.cli.coordinator import open_server
from thinwire.node.config import RunConfig
from thinwire.node.founding.child import Child
from thinwire.node.founding.here import Here
from thinwire.node.genesis import make_genesis
from thinwire.node.links.hivemind import HivemindLink
from thinwire.node.system.folder import IDENTITY_NAME
from thinwire.node.system.stopping import Stop
from thinwire.node.tasks.registry import make_task

CONFIG: dict[str, Any] = {"run": {"rounds": 9}, "strategy": {"name": "spsa", "lr": 1e-3}}


def start_run_of_an_older_version(state: StateDir) -> None:
    """Without the option `clip`."""
    config = RunConfig.model_validate(CONFIG)
    key = load_or_create(state.key_path)
    genesis = make_genesis(config, make_task(config.task, None, None), peer_id_of(key.public_key()), 1)
    older = json.loads(genesis.body.config)
    del older["strategy"]["clip"]
    store = BlobStore(state.blobs_path)
    for blob in genesis.blobs:
        store.put(digest_of(blob), blob)
    Ledger.create(
        state.ledger_path, genesis.body.model_copy(update={"config": json.dumps(older)}), key
    ).close()


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({}, None),
        ({"strategy": {"name": "spsa", "lr": 1e-3, "clip": 10.0}}, None),  # its default
        ({"strategy": {"name": "spsa", "lr": 1e-3, "clip": 5.0}}, r"strategy.clip is 10.0 there, 5.0 here"),
        ({"run": {"rounds": 10}}, r"run.rounds is 9 there, 10 here"),
    ],
)
def test_options_that_the_run_did_not_know_have_their_defaults(
    tmp_path: Path, change: dict[str, Any], refusal: str | None
) -> None:
    config = RunConfig.model_validate({**CONFIG, **change})
    task = make_task(config.task, None, None)
    with StateDir(tmp_path / "state") as state:
        start_run_of_an_older_version(state)
        if refusal is None:
            for founder in (Here(task), Child(None, Stop()), Child(None, Stop())):
                open_server(state, config, founder).ledger.close()
        else:
            for founder in (Here(task), Child(None, Stop())):
                with pytest.raises(ConfigError, match=refusal):
                    open_server(state, config, founder)


def test_what_was_ordered_since_the_run_file_last_said_something_else_stays(tmp_path: Path) -> None:
    ours, theirs = (EntryRules.of("listed", [peer_id_of(new_key().public_key())]) for _ in range(2))
    for asked, ordered, then in (
        (ours, None, ours),
        (ours, EntryRules.of("open", ()), EntryRules.of("open", ())),
        (ours, theirs, theirs),
        (EntryRules.of("invited", ()), None, EntryRules.of("invited", ())),
        (ours, None, ours),
    ):
        for order in (ordered, None):
            with StateDir(tmp_path) as state:
                state.start_with_rules(asked)
                if order is not None:
                    state.save_rules(order)
        with StateDir(tmp_path) as state:
            assert state.rules() == then


Program = Callable[..., tuple[int, str, str]]


@pytest.mark.swarm
@pytest.mark.usefixtures("own_temp_folder")
def test_a_run_begins_among_founders_and_is_opened_to_strangers(here: Program, tmp_path: Path) -> None:
    """As docs/security.md says. The coordinator is started again by the same command afterwards."""
    folders = [tmp_path / name for name in ("a", "b", "c")]
    founders = [peer_id_of(load_or_create(_made(folder) / IDENTITY_NAME).public_key()) for folder in folders]
    config = RunConfig.model_validate(
        {
            "run": {"rounds": 99, "min_peers": 3},
            "policy": {"name": "all"},
            "strategy": {"name": "spsa", "lr": 1e-3, "own_data_share": 0.25},
            "admission": {"mode": "listed", "peers": founders},
        }
    )
    task = make_task(config.task, None, None)
    state = tmp_path / "state"
    start = partial(ServerThread, state, make=lambda d: open_server(d, config, Here(task), host="127.0.0.1"))
    with _links(tmp_path) as link:
        with start() as coordinator:
            assert "own_data_share" in coordinator.server.ledger.genesis.config
            links = [link(folder.name, coordinator) for folder in folders]
            _train(links, 1, 6)
            with pytest.raises(ConfigError, match="listed peers only, and 12D3"):
                link("stranger", coordinator)
            assert here("run", str(state), "open")[0] == 0
            stranger = link("stranger", coordinator)
            wait_until(lambda: _n_training(coordinator) == 4, 20, str)
            _train([*links, stranger], 6, 8)
        with start() as coordinator:
            assert coordinator.status()["admission"]["mode"] == "open"
            link("stranger", coordinator)
            link("another", coordinator)


def _n_training(coordinator: ServerThread) -> int:
    return sum(peer["state"] == "training" for peer in coordinator.status()["peers"])


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@contextmanager
def _links(tmp_path: Path) -> Iterator[Callable[[str, ServerThread], HivemindLink]]:
    """Open ones, to be had by the name of their folder."""
    with ExitStack() as stack:

        def link(name: str, coordinator: ServerThread) -> HivemindLink:
            found = HivemindLink(coordinator.ticket, state=tmp_path / name, host="127.0.0.1")
            stack.callback(found.close)
            found.open()
            found.state(NodeState.TRAINING)
            return found

        yield link


def _train(links: list[HivemindLink], first: int, end: int) -> None:
    for round_ in range(first, end):
        work = Offer(round=round_, n_samples=1, n_tokens=1, loss=1.0, n_bytes=4, payload=b"work", digest=None)
        for link in links:
            link.offer(work)
        (commit,) = islice(links[0].commits(round_ - 1), 1)
    assert len(commit.body.offers) == len(links), "in the first round who has just come may be late"
