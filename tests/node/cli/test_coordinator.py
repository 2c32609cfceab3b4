"""Going on with a run: the same configuration, whichever thinwire it was started with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from thinwire.compression.errors import ConfigError
from thinwire.coordinator.blobs import BlobStore
from thinwire.coordinator.ledger import Ledger
from thinwire.coordinator.protocol.identity import load_or_create, peer_id_of
from thinwire.coordinator.protocol.messages import digest_of
from thinwire.coordinator.state import StateDir
from thinwire.node.cli.coordinator import open_server
from thinwire.node.config import RunConfig
from thinwire.node.founding.child import Child
from thinwire.node.founding.here import Here
from thinwire.node.genesis import make_genesis
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
