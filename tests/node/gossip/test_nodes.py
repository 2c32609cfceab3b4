"""Whole nodes in gossip, as threads: their own models mix, and the reference model is one for all."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.local_nodes import Meddled, config_of, in_background, run_all, swarm_of, train
from thinwire.node.cli.ledger_command import export_state
from thinwire.node.gossip.telling import gossiping
from thinwire.node.gossip.words import gossip_in_words
from thinwire.node.runner import Runner
from thinwire.node.states.replica import NotHere
from thinwire.optim.gossip.strategy import Gossip

pytestmark = pytest.mark.usefixtures("one_core")

GOSSIP = {"name": "gossip", "lr": 1e-2, "inner_steps": 2, "topology": "complete"}


def strategy_of(runner: Runner) -> Gossip:
    strategy = runner.replica.strategy
    assert isinstance(strategy, Gossip)
    return strategy


def test_nodes_mix_their_models_and_end_with_one_reference_model(tmp_path: Path) -> None:
    """Of six rounds the last one merges; the first one has no exchange, as nobody was counted before it. Who
    evaluates may miss a commit, and then the next exchange."""
    all_edges = {"topology": "file", "edges": [[0, 1], [0, 2], [1, 2]]}
    config = config_of({**GOSSIP, **all_edges, "merge_every": "end"}, eval_every=100)
    results, runners, status = train(tmp_path, config, 3)
    assert len({result.fingerprint for result in results}) == 1
    held_out = dict(status["held_out"])
    assert held_out[6] < held_out[0]
    for runner in runners:
        assert 2 * 2 <= strategy_of(runner).counters["met"] <= 4 * 2
        assert not [counter for counter in strategy_of(runner).counters if counter.startswith("refused")]
        told = gossiping(runner.prepared)
        assert told is not None
        assert (told.merged, len(told.edges)) == (6, 2)
        sent = runner.link.traffic().sent["gossip"]
        assert sent == sum(edge.sent for edge in told.edges) > 2 * 2 * runner.replica.n_bytes / 5


def test_a_late_joiner_goes_on_from_a_neighbours_model(tmp_path: Path) -> None:
    config = config_of({**GOSSIP, "merge_every": "end"}, min_peers=2, rounds=12, eval_every=100)
    with swarm_of(tmp_path, config) as swarm:
        reached, release = threading.Event(), threading.Event()

        def hold(_runner: Runner) -> None:
            reached.set()
            assert release.wait(60)

        early = Meddled(swarm.link("peer-1"), {5: hold})
        thread, results = in_background([Runner(swarm.link("peer-0")), early])
        assert reached.wait(60)
        late = Meddled(swarm.link("peer-2"), {4: lambda _: release.set(), 5: lambda _: release.set()})
        (result,) = run_all([late])
        thread.join(100)
    assert {r.fingerprint for r in results} == {result.fingerprint}
    assert strategy_of(late).counters["borrowed"] == 1
    assert strategy_of(late).counters["met"] > 0


def test_a_node_that_is_killed_between_merges_comes_back_and_is_merged(tmp_path: Path) -> None:
    """With its state folder, from a snapshot before the merge of round 5."""
    options = {"min_peers": 2, "rounds": 16, "eval_every": 100, "snapshot_every": 2}
    config = config_of({**GOSSIP, "merge_every": 5}, **options)
    with swarm_of(tmp_path, config) as swarm:
        killed, release = threading.Event(), threading.Event()

        def kill(runner: Runner) -> None:
            runner.link.kill()  # type: ignore[attr-defined]
            killed.set()

        def hold(_runner: Runner) -> None:
            assert release.wait(60)

        thread, results = in_background([Meddled(swarm.link("peer-0"), {9: hold})])
        folder = tmp_path / "node"
        folder.mkdir()
        Meddled(swarm.link("peer-1"), {3: kill}, folder=folder).run()
        assert killed.is_set()
        again = Meddled(swarm.link("peer-1"), {8: lambda _: release.set()}, folder=folder)
        (result,) = run_all([again])
        thread.join(100)
    assert {r.fingerprint for r in results} == {result.fingerprint}
    assert strategy_of(again).counters["met"] > 0


def test_private_peers_are_counted_and_mix_but_tell_no_losses(tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting", reason="dp-accounting is an extra (thinwire[privacy])")
    privacy = {"clip": 1.0, "noise": 1e-3, "delta": 1e-5}
    config = config_of({**GOSSIP, "merge_every": 3, "privacy": privacy}, rounds=6, eval_every=100)
    with swarm_of(tmp_path, config) as swarm:
        runners = [Runner(swarm.link(f"peer-{i}")) for i in range(2)]
        results = run_all(runners)
        commits = list(runners[0].link.records(0))
    assert len({result.fingerprint for result in results}) == 1
    assert all(strategy_of(runner).counters["met"] > 0 for runner in runners)
    offers = [offer for commit in commits for offer in commit.body.offers]
    assert len(offers) >= 10
    assert all(offer.n_samples > 0 and offer.loss is None for offer in offers)


def test_export_gives_the_reference_model_or_the_nodes_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The coordinator's folder has the node's snapshots, too: what a command needs is in one place."""
    config = config_of({**GOSSIP, "merge_every": 5}, min_peers=1, rounds=20, eval_every=100, snapshot_every=2)
    with swarm_of(tmp_path, config) as swarm:
        node = Meddled(swarm.link("peer-0"), {4: lambda runner: runner.request_stop()}, folder=tmp_path)
        node.run()
    export_state(tmp_path, tmp_path / "theta", None)
    assert "untrained" in caplog.text
    export_state(tmp_path, tmp_path / "own", None, own=True)
    theta, own = (load_file(tmp_path / name / "model.safetensors") for name in ("theta", "own"))
    assert theta.keys() == own.keys()
    assert any(not theta[name].equal(own[name]) for name in theta)


def test_who_has_no_model_of_its_own_cannot_export_it(tmp_path: Path) -> None:
    config = config_of({**GOSSIP, "merge_every": 1}, min_peers=1, rounds=2, eval_every=100, snapshot_every=2)
    with swarm_of(tmp_path, config) as swarm:
        Runner(swarm.link("peer-0"), folder=tmp_path).run()
    with pytest.raises(NotHere, match="leave --own out"):
        export_state(tmp_path, tmp_path / "own", None, own=True)


def test_a_status_says_whether_the_reference_model_is_trained() -> None:
    edges = [[0, 1, 5_000_000, 0], [0, 2, 3_000_000, 2_000_000]]
    told = {"merged": 0, "distance": 1.5, "own_held_out": [2.25, 2.5], "edges": edges}
    lines = gossip_in_words({"gossip": told})
    assert "untrained before the first merge" in lines[0]
    assert "2.250 to 2.500" in lines[0]
    assert "0-1 5.0 MB, 0-2 3.0 MB (2.0 MB by way of others)" in lines[1]
    assert "that of round 40" in gossip_in_words({"gossip": {**told, "merged": 40}})[0]
    assert gossip_in_words({"gossip": None}) == []
