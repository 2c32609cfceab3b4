"""Whole nodes as threads over link_local: replicas identical to the last bit, whatever gets lost or late."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.local_nodes import (
    STRATEGIES,
    config_of,
    never,
    run_all,
    swarm_of,
    train,
    wait_for,
)
from thinwire.compression.base import Part
from thinwire.compression.errors import ConfigError, Incompatible
from thinwire.coordinator.protocol.messages import Commit, NodeState, Offer
from thinwire.node.genesis import make_genesis
from thinwire.node.links.local import LocalSwarm, Script
from thinwire.node.preparing import prepare_run
from thinwire.node.runner import Runner
from thinwire.node.tasks.registry import make_task
from thinwire.optim.base import Closure, Own

pytestmark = pytest.mark.usefixtures("one_core")


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("n_peers", [2, 4, 8])
def test_all_replicas_are_identical(tmp_path: Path, strategy: str, n_peers: int) -> None:
    config = config_of(STRATEGIES[strategy], min_peers=n_peers)
    results, runners, status = train(tmp_path, config, n_peers)
    assert {r.rounds for r in results} == {6}
    assert len({r.fingerprint for r in results}) == 1
    # Nobody waits for a peer in the round in which it evaluates, and each does that once or twice.
    assert all(4 <= r.counted + r.missed <= 6 for r in results)
    assert status["mismatches"] == 0
    assert {p["fingerprint"] for p in status["peers"]} == {results[0].fingerprint}
    # A node that is behind when it is asked does not measure; behind the last round nobody is.
    assert [round for round, _ in status["held_out"] if round != 3] == [0, 6]
    assert runners[0].replica.bad.total() == 0
    looks = status["noise_scale"]["rounds"]
    assert looks == 0 if strategy.startswith("spsa") else looks >= 1, "of the last round at least"


def test_who_is_to_evaluate_the_base_does_so_when_the_others_did_not_wait(tmp_path: Path) -> None:
    config = config_of(STRATEGIES["decoupled"], eval_every=100)
    with swarm_of(tmp_path, config) as swarm:
        first, *others = [Runner(swarm.link(f"peer-{i}")) for i in range(3)]
        for runner in (first, *others):
            runner.link.open()
        run_all(others)
        run_all([first])
        status = swarm.call(lambda service, now_s: service.status(now_s))
    assert [round for round, _ in status["held_out"]] == [0, 6]


@pytest.mark.parametrize("strategy", ["decoupled", "spsa"])
def test_lost_and_late_offers_are_out_for_everybody(tmp_path: Path, strategy: str) -> None:
    """The same offers count in every execution, so that the fingerprint is the same one too."""
    config = config_of(STRATEGIES[strategy], min_peers=3, eval_every=100)

    def lose(peer: str, round: int) -> bool:
        return (peer, round) in {("peer-0", 2), ("peer-1", 4), ("peer-0", 5)}

    def late(peer: str, round: int) -> bool:
        return (peer, round) in {("peer-2", 2), ("peer-2", 3)}

    fingerprints = set()
    for attempt in range(2):
        results, _, status = train(tmp_path / str(attempt), config, 3, lose, late)
        by_peer = {p["peer_id"]: p["offers_counted"] for p in status["peers"]}
        assert by_peer["peer-0"] <= 4
        assert by_peer["peer-2"] <= 4
        assert sum(r.missed for r in results) >= 5
        assert len({r.fingerprint for r in results}) == 1
        fingerprints |= {r.fingerprint for r in results}
    assert len(fingerprints) == 1


def test_a_missed_offer_returns_to_the_momentum_once(tmp_path: Path) -> None:
    """One peer's offer of round 3 is lost: exactly what it had sent is added to its momentum again."""
    config = config_of(STRATEGIES["decoupled"], min_peers=2, eval_every=100)
    momenta: list[tuple[torch.Tensor, torch.Tensor]] = []  # (found, expected)

    def watch(runner: Runner) -> None:
        strategy, apply = runner.replica.strategy, runner.replica.apply_batch

        def watched(commits: Sequence[Commit], *arguments: Any, **options: Any) -> list[Own]:
            (commit,) = commits
            p = strategy.parameters_in_order()[0].tensor
            expected = strategy.state[p]["momentum"].clone()
            if commit.body.round == 3:
                _, packed = strategy.state[p]["sends"][3]
                part = Part.whole(p.shape)
                expected += strategy.compressor.decode([packed], [1.0], part, runner.replica.turn())
            owns = apply(commits, *arguments, **options)
            momenta.append((strategy.state[p]["momentum"].clone(), expected))
            assert not strategy.state[p]["sends"]
            return owns

        runner.replica.apply_batch = watched  # type: ignore[method-assign]

    with swarm_of(tmp_path, config, lose=lambda peer, round: (peer, round) == ("peer-0", 3)) as swarm:
        watched = Runner(swarm.link("peer-0"), on_prepared=watch)
        results = run_all([watched, Runner(swarm.link("peer-1"))])
    assert (results[0].missed, results[1].missed) == (1, 0)
    assert results[0].fingerprint == results[1].fingerprint
    assert len(momenta) == 6
    assert all(torch.equal(found, expected) for found, expected in momenta)


@pytest.mark.parametrize("strategy", ["decoupled", "spsa"])
def test_neither_kernels_nor_threads_change_a_bit(
    tmp_path: Path, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients may differ with the number of threads, so the offers are made once and applied by all."""
    config = config_of(STRATEGIES[strategy], min_peers=1, rounds=4)
    with swarm_of(tmp_path, config) as swarm:
        (live,) = run_all([Runner(swarm.link("peer-0"))])
        n_threads = torch.get_num_threads()
        try:
            for kernels, threads in (("torch", 1), ("torch", 2), ("auto", 1), ("auto", 2)):
                monkeypatch.setenv("THINWIRE_KERNELS", kernels)
                torch.set_num_threads(threads)
                assert replay(swarm, f"reader-{kernels}-{threads}") == live.fingerprint
        finally:
            torch.set_num_threads(n_threads)


def replay(swarm: LocalSwarm, peer_id: str) -> str:
    """Base weights and the whole ledger, by the same `apply` as in training."""
    link = swarm.link(peer_id)
    replica = prepare_run(link, link.open()).replica
    replica.begin(None)
    for commit in link.records(0):
        replica.apply(commit, link.payload, offered=False)
    link.close()
    return replica.fingerprint().hex()


def test_a_peer_works_ahead_while_it_waits_for_another(tmp_path: Path) -> None:
    """Two inner steps of the next round, and no more; the other one's offer closes the round: it never has
    the time. Offers say how many batches are in them, and no batch is taken twice."""
    strategy = {"name": "diloco", "compressor": {"name": "dense"}, "lr": 1e-2}
    strategy |= {"inner_steps": 4, "mix": 0.5, "overlap": 2}
    config = config_of(strategy, min_peers=2, rounds=5, eval_every=100)
    is_waiting = threading.Event()
    ahead: dict[str, list[int]] = {"quick": [], "slow": []}
    offers: list[Offer] = []
    seeds: list[int] = []

    def watch(runner: Runner) -> None:
        link, task = runner.link, runner.work.task
        draw, take, come = task.draw, link.offer, link.commits

        def watched(model: torch.nn.Module, seed: int) -> Closure:
            seeds.append(seed)
            return draw(model, seed)

        def offer(its: Offer) -> None:
            ahead[link.peer_id].append(runner.replica.strategy.n_ahead)
            offers.append(its)
            if link.peer_id == "slow":
                assert is_waiting.wait(60)
                is_waiting.clear()
            take(its)

        def commits(after: int) -> Iterator[Commit]:
            coming = come(after)
            while True:
                if link.peer_id == "quick":  # it has offered and worked ahead
                    is_waiting.set()
                commit = next(coming, None)
                if commit is None:
                    return
                yield commit

        task.draw = watched  # type: ignore[method-assign]
        link.offer = offer  # type: ignore[method-assign]
        link.commits = commits  # type: ignore[method-assign]

    with swarm_of(tmp_path, config) as swarm:
        links = [swarm.link(peer_id) for peer_id in ("quick", "slow")]
        results = run_all([Runner(link, on_prepared=watch) for link in links])
    assert ahead == {"quick": [0, 2, 2, 2, 2], "slow": [0] * 5}
    assert {o.n_samples for o in offers} == {4 * 4}
    assert {o.n_tokens for o in offers} == {4 * 4 * 16}
    assert len(seeds) == len(set(seeds)) == 2 * 5 * 4
    assert results[0].fingerprint == results[1].fingerprint


def test_a_bad_payload_is_left_out_by_all_alike(tmp_path: Path) -> None:
    """One peer offers rubbish in every round; nobody stumbles and all end equal, the offender too."""
    config = config_of(STRATEGIES["decoupled"], min_peers=3)

    with swarm_of(tmp_path, config) as swarm:
        offender = Runner(swarm.link("peer-0"))
        send = offender.link.offer

        def offer(good: Offer) -> None:
            assert good.payload is not None
            bad = bytes(reversed(good.payload)) if good.round % 2 else good.payload[:-40]
            send(good.model_copy(update={"payload": bad, "n_bytes": len(bad)}))

        offender.link.offer = offer  # type: ignore[method-assign]
        runners = [offender, *(Runner(swarm.link(f"peer-{i}")) for i in (1, 2))]
        results = run_all(runners)
    assert len({r.fingerprint for r in results}) == 1
    assert results[0].counted == 0
    assert set(runners[0].replica.bad) == {"magic", "truncated"}
    assert runners[0].replica.bad == runners[1].replica.bad == runners[2].replica.bad


@pytest.mark.parametrize("strategy", ["decoupled", "spsa"])
def test_a_peer_whose_batches_are_all_dropped_dilutes_nothing(tmp_path: Path, strategy: str) -> None:
    """It offers no samples; the others end as they do without it, to the last bit."""
    config = config_of(STRATEGIES[strategy], min_peers=3, eval_every=0)

    def becomes_nan(runner: Runner) -> None:
        draw = runner.work.task.draw

        def never_finite(*args: Any) -> Closure:
            loss = draw(*args)
            return lambda: loss() * float("nan")

        runner.work.task.draw = never_finite  # type: ignore[method-assign]

    def trained(folder: Path, meddle: Callable[[Runner], object], lose: Script) -> tuple[str, list[Commit]]:
        with swarm_of(folder, config, lose=lose) as swarm:
            links = [swarm.link(f"peer-{i}") for i in range(3)]
            for link in links:
                link.open()
            results = run_all([Runner(links[0], on_prepared=meddle), *(Runner(link) for link in links[1:])])
            assert len({r.fingerprint for r in results}) == 1
            return results[0].fingerprint, list(links[1].records(0))

    nan, commits = trained(tmp_path / "nan", becomes_nan, never)
    lost, _ = trained(tmp_path / "lost", lambda _: None, lambda peer, _round: peer == "peer-0")
    assert nan == lost
    offers = [{o.peer: (o.n_samples, o.payload) for o in commit.body.offers} for commit in commits]
    assert [o.get(0) for o in offers] == [(0, b"")] * config.run.rounds
    assert all(o[1][0] > 0 for o in offers)


def test_stopping_leaves_the_swarm_and_the_others_go_on(tmp_path: Path) -> None:
    config = config_of(STRATEGIES["decoupled"], min_peers=2, rounds=25)
    with swarm_of(tmp_path, config) as swarm:
        runners = [Runner(swarm.link(f"peer-{i}")) for i in range(2)]
        threading.Thread(
            target=lambda: (wait_for(lambda: swarm.service.head >= 3), runners[1].request_stop()), daemon=True
        ).start()
        results = run_all(runners)
        status = swarm.call(lambda service, now_s: service.status(now_s))
    assert results[0].rounds == 25
    assert results[1].rounds < 25
    assert status["peers"][1]["state"] != NodeState.TRAINING


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_base_weights_come_from_the_coordinator(tmp_path: Path, dtype: str) -> None:
    config = config_of(STRATEGIES["decoupled"], min_peers=1, rounds=2, dtype=dtype)
    model = make_task(config.task, None, None).model()
    path = tmp_path / "base.safetensors"
    save_file({name: torch.full_like(p, 0.125) for name, p in model.named_parameters()}, path)
    with_base = config.model_copy(update={"run": config.run.model_copy(update={"base": str(path)})})
    with swarm_of(tmp_path / "run", with_base) as swarm:
        seen: list[bool] = []

        def look(runner: Runner) -> None:
            if runner.replica.round == 0:
                tensors = runner.replica.tensors().values()
                seen.append(all(torch.equal(t, torch.full_like(t, 0.125)) for t in tensors))
                assert {str(t.dtype) for t in tensors} == {f"torch.{dtype}"}

        runner = Runner(swarm.link("peer-0"), on_proposing=look)
        run_all([runner])
    assert seen == [True]
    assert str(path) not in runner.config.to_json()
    tensors = load_file(path)
    tensors["head.weight"] = tensors["head.weight"][:5].contiguous()
    save_file(tensors, path)
    with pytest.raises(ConfigError, match=r"head\.weight is \[5, 16\].*the model wants \[256, 16\]"):
        make_genesis(with_base, make_task(config.task, None, None), "x", 1)


def test_another_model_is_refused_before_anything_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wider.py").write_text(
        "from thinwire.node.tasks.text import TextTask\n"
        "def make(options, data):\n"
        "    return TextTask(options.model_copy(update={'width': 32}), data)\n"
    )
    monkeypatch.chdir(tmp_path)
    config = config_of(STRATEGIES["decoupled"], min_peers=1)
    with swarm_of(tmp_path / "run", config) as swarm:
        runner = Runner(swarm.link("peer-0"), import_path="wider:make")
        with pytest.raises(Incompatible, match=r"blocks\.0\.down\.bias is \[16\] float32 in the run, \[32\]"):
            runner.run()
        assert runner.link.traffic().received.get("snapshot", 0) == 0
