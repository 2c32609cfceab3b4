"""Replay of a ledger file gives what training had; what does not fit is refused and nothing is written."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import load_file, save_file

from thinwire.compression.errors import ConfigError, Incompatible, ReplicaDiverged
from thinwire.coordinator.protocol.identity import peer_id_of
from thinwire.coordinator.protocol.ledger_file import check, open_ledger, write_ledger
from thinwire.coordinator.protocol.messages import Commit, CommitBody, ReportEntry, encode_record
from thinwire.node.cli.replay import replay
from thinwire.node.config import RunConfig, load_config
from thinwire.node.genesis import make_genesis
from thinwire.node.links.local import local_swarm
from thinwire.node.runner import Result, Runner
from thinwire.node.tasks.registry import make_task

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
STRATEGIES: dict[str, Mapping[str, Any]] = {
    "decoupled": {"name": "decoupled", "lr": 1e-2, "compressor": {"name": "dct_topk", "k": 32}},
    "dense": {"name": "decoupled", "lr": 1e-2, "compressor": {"name": "dense"}},  # payloads beside commits
    "spsa": {"name": "spsa", "lr": 1e-3, "eps": 1e-3, "probes": 4},
}
TASK = {"layers": 1, "width": 16, "heads": 2, "context": 16, "batch": 4, "held_out_bytes": 2048}


def config_of(strategy: str, **run: Any) -> RunConfig:
    sections = {
        "run": {"rounds": 7, "min_peers": 3, "eval_every": 100, "verify_every": 2, **run},
        "task": TASK,
        "policy": {"name": "all"},
    }
    flat = {f"{name}.{key}": value for name, values in sections.items() for key, value in values.items()}
    return load_config(None, flat, environ={}).model_copy(update={"strategy": STRATEGIES[strategy]})


def train(folder: Path, config: RunConfig, path: Path) -> str:
    """Three nodes train; the ledger goes to `path`. Returns their fingerprint."""
    folder.mkdir()
    genesis = make_genesis(config, make_task(config.task, None, None), peer_id_of(KEY.public_key()), 1)
    results: list[Result] = []
    with local_swarm(folder, genesis.body, KEY, blobs=genesis.blobs) as swarm:
        runners = [Runner(swarm.link(f"peer-{i}")) for i in range(3)]
        threads = [threading.Thread(target=lambda r=r: results.append(r.run())) for r in runners]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
        reader = swarm.link("reader")
        welcome = reader.open()
        commits = swarm.call(lambda service, _now_s: service.commits(0, 10_000))
        offers = {offer.digest: offer for commit in commits for offer in commit.body.offers}
        write_ledger(
            path, welcome.genesis, welcome.signature, commits, lambda digest: reader.payload(offers[digest])
        )
        reader.close()
    assert len(results) == 3
    (fingerprint,) = {r.fingerprint for r in results}
    return fingerprint


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_replay_equals_training(tmp_path: Path, strategy: str) -> None:
    path, output = tmp_path / "ledger", tmp_path / "end.safetensors"
    live = train(tmp_path / "run", config_of(strategy), path)
    result = replay(path, output=output)
    assert result is not None
    assert (result.rounds, result.fingerprint, result.differing) == (7, live, 0)
    assert result.verified >= 6, "rounds 2 and 4 by all; those of round 6 may come after the last commit"
    assert result.model_bytes == output.stat().st_size
    assert result.ledger_bytes == path.stat().st_size
    assert (check(path).n_blobs > 0) == (strategy == "dense")
    model = make_task(config_of(strategy).task, None, None).model()
    assert set(load_file(output)) == {name for name, _ in model.named_parameters()}
    assert replay(path, output=tmp_path / "stopped", stopped=lambda: True) is None
    assert not (tmp_path / "stopped").exists()


def test_rounds_that_nobody_reported_are_applied_in_batches(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    live = train(tmp_path / "run", config_of("spsa", rounds=9, verify_every=100, snapshot_every=100), path)
    result = replay(path)
    assert result is not None
    assert (result.rounds, result.fingerprint, result.verified) == (9, live, 0)


def altered(
    commits: Iterable[Commit], run_id: bytes, reports: Mapping[int, tuple[ReportEntry, ...]]
) -> list[Commit]:
    """The same chain with other reports in some records, signed again."""
    result: list[Commit] = []
    for commit in commits:
        parent = result[-1].digest if result else run_id
        body: CommitBody = commit.body.model_copy(
            update={"parent": parent, "reports": reports.get(commit.body.round, ())}
        )
        record = encode_record(body)
        result.append(Commit(record=record, signature=KEY.sign(record)))
    return result


def test_a_fingerprint_that_nobody_had_names_round_and_peer(tmp_path: Path) -> None:
    path, output = tmp_path / "ledger", tmp_path / "end.safetensors"
    train(tmp_path / "run", config_of("spsa"), path)
    with open_ledger(path) as ledger:
        genesis, signature, run_id = ledger.record, ledger.signature, ledger.run_id
        commits = list(ledger.commits())
        peers = dict(ledger.peers)
    right = {e.round: e for c in commits for e in c.body.reports}[4]
    wrong = right.model_copy(update={"fingerprint": bytes(8), "peer": 1})
    other = right.model_copy(update={"peer": 0})

    forged = altered(commits, run_id, {6: (wrong,)})
    write_ledger(path, genesis, signature, forged, lambda _: b"")
    with pytest.raises(ReplicaDiverged, match=rf"round 4: the fingerprint here is .* {peers[1]}"):
        replay(path, output=output)
    assert not output.exists()

    # One peer was wrong and another one had it: the ledger decides, and says who was wrong.
    forged = altered(commits, run_id, {5: (other,), 6: (wrong,)})
    write_ledger(path, genesis, signature, forged, lambda _: b"")
    result = replay(path, output=output)
    assert result is not None
    assert (result.verified, result.differing) == (1, 1)
    assert output.exists()


def test_base_weights_are_compared_with_record_0(tmp_path: Path) -> None:
    base, path = tmp_path / "base.safetensors", tmp_path / "ledger"
    config = config_of("spsa")
    model = make_task(config.task, None, None).model()
    save_file({name: torch.full_like(p, 0.125) for name, p in model.named_parameters()}, base)
    live = train(tmp_path / "run", config_of("spsa", base=str(base)), path)
    with pytest.raises(ConfigError, match="give --base FILE"):
        replay(path)
    with pytest.raises(ConfigError, match="No such file"):
        replay(path, base=tmp_path / "none")
    result = replay(path, base=base)
    assert result is not None
    assert result.fingerprint == live
    save_file({name: torch.full_like(p, 0.25) for name, p in model.named_parameters()}, base)
    with pytest.raises(ConfigError, match="record 0 names"):
        replay(path, base=base)


def test_a_run_without_base_weights_and_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "replayed_task.py").write_text(
        "from thinwire.node.tasks.text import TextTask\n"
        "def make(options, data):\n"
        "    return TextTask(options.model_copy(update={'width': 32}), data)\n"
    )
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ledger"
    train(tmp_path / "run", config_of("spsa", rounds=2), path)
    with pytest.raises(ConfigError, match="leave it out"):
        replay(path, base=tmp_path / "replayed_task.py")
    with pytest.raises(Incompatible, match="the model differs"):
        replay(path, import_path="replayed_task:make")
