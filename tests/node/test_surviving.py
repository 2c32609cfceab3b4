"""Whole nodes as threads that come late, come back, or go wrong: all end identical to the last bit."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.local_nodes import (
    STRATEGIES,
    Meddled,
    Steady,
    config_of,
    in_background,
    newest_attested,
    run_all,
    swarm_of,
    wait_for,
)
from tests.support.prometheus import value
from thinwire.coordinator.protocol.messages import Welcome
from thinwire.node.joining import NoStart
from thinwire.node.runner import Runner

pytestmark = pytest.mark.usefixtures("one_core")


def flip_a_bit(runner: Runner) -> None:
    """One of the upper ones: a low one of a small weight would be rounded away with the next update."""
    p = next(p for p in runner.replica.strategy.parameters_in_order() if p.name == "head.weight")
    with torch.no_grad():
        p.tensor.view(-1).view(torch.int32)[3] ^= 1 << 20


def texts(caplog: pytest.LogCaptureFixture, part: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if part in record.getMessage()]


@pytest.fixture(autouse=True)
def _all_logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="thinwire.node")


@pytest.mark.parametrize(
    ("strategy", "snapshot_every", "where", "dtype"),
    [
        # a snapshot is smaller than the payloads of two peers
        ("decoupled-dense", 2, "from the swarm", "float32"),
        ("decoupled-dense", 2, "from the swarm", "bfloat16"),
        ("decoupled", 2, None, "float32"),  # compressed payloads are smaller than the model
        ("spsa", 2, None, "float32"),  # the ledger alone
        ("spsa", 2, None, "bfloat16"),
    ],
)
def test_a_late_joiner_takes_the_cheaper_way_and_ends_equal(
    tmp_path: Path,
    strategy: str,
    snapshot_every: int,
    where: str | None,
    dtype: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = {"min_peers": 2, "rounds": 12, "snapshot_every": snapshot_every, "dtype": dtype}
    config = config_of(STRATEGIES[strategy], **options)
    with swarm_of(tmp_path, config) as swarm:
        reached, release = threading.Event(), threading.Event()

        def hold(_runner: Runner) -> None:
            if not reached.is_set() and newest_attested(swarm) >= 4:
                reached.set()
                assert release.wait(60)

        # Who evaluates may come to its snapshot some rounds later.
        thread, early = in_background(
            [Steady(swarm.link("peer-0")), Steady(swarm.link("peer-1"), dict.fromkeys(range(7, 11), hold))]
        )
        assert reached.wait(60)
        late = Meddled(swarm.link("peer-2"), {0: lambda _: release.set()})
        (result,) = run_all([late])
        thread.join(100)
    assert result.rounds == 12
    assert result.counted + result.missed >= 1, "it took part, not only followed"
    assert {r.fingerprint for r in early} == {result.fingerprint}
    took = texts(caplog, "took the replica")
    assert (len(took) == 1 and where in took[0]) if where else took == []
    if where:
        assert late.link.traffic().received["snapshot"] > 1000
    else:
        assert late.link.traffic().received["snapshot"] == config.task.held_out_bytes


def test_a_node_goes_by_the_index_that_a_record_gives_it(tmp_path: Path) -> None:
    """Each was let in under the other's index by a leader that fell before a record said so."""
    config = config_of(STRATEGIES["decoupled"], min_peers=2, eval_every=100)
    given: dict[str, int] = {}

    def runner(name: str) -> Runner:
        link = swarm.link(name)
        enter = link.open

        def entered() -> Welcome:
            welcome = enter()
            given[name] = 1 - welcome.peer_index
            return welcome.model_copy(update={"peer_index": given[name]})

        link.open = entered  # type: ignore[method-assign]
        return Runner(link)

    with swarm_of(tmp_path, config, lose=lambda peer, round: (peer, round) == ("peer-0", 3)) as swarm:
        runners = [runner("peer-0"), runner("peer-1")]
        results = run_all(runners)
        status = swarm.call(lambda service, now_s: service.status(now_s))
    index = {peer["peer_id"]: i for i, peer in enumerate(status["peers"])}
    assert given == {peer: 1 - i for peer, i in index.items()}
    assert {r.link.peer_id: r.prepared.peer_index for r in runners} == index
    assert [r.counted for r in results] == [
        next(peer["offers_counted"] for peer in status["peers"] if peer["peer_id"] == r.link.peer_id)
        for r in runners
    ]
    assert len({r.fingerprint for r in results}) == 1
    assert [r.missed for r in results] == [1, 0]


def test_a_node_goes_on_from_its_own_disk_with_its_momentum(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(STRATEGIES["decoupled"], min_peers=1, rounds=12, snapshot_every=4)
    with swarm_of(tmp_path, config) as swarm:
        first = Meddled(
            swarm.link("peer-0"), {6: lambda runner: runner.request_stop()}, folder=tmp_path / "node"
        )
        run_all([first])
        momentum = momentum_of(first)
        seen: list[torch.Tensor] = []

        def look(runner: Runner) -> None:
            seen.append(momentum_of(runner))

        again = Meddled(swarm.link("peer-0"), {first.replica.round: look}, folder=tmp_path / "node")
        (result,) = run_all([again])
    assert (
        len(texts(caplog, f"took the replica after round {first.replica.round} from this node's disk")) == 1
    )
    assert result.rounds == 12
    assert float(momentum.abs().sum()) > 0
    assert len(seen) == 1


def momentum_of(runner: Runner) -> torch.Tensor:
    strategy = runner.replica.strategy
    p = strategy.parameters_in_order()[0].tensor
    found: torch.Tensor = strategy.state[p]["momentum"]
    return found.clone()


def test_a_damaged_snapshot_of_its_own_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(STRATEGIES["spsa"], min_peers=1, rounds=10, snapshot_every=2)
    with swarm_of(tmp_path, config) as swarm:
        stop = {6: lambda runner: runner.request_stop()}
        run_all([Meddled(swarm.link("peer-0"), stop, folder=tmp_path / "node")])
        newest = max((tmp_path / "node" / "snapshots").glob("0*/data.safetensors"))
        data = bytearray(newest.read_bytes())
        data[len(data) // 2] ^= 1
        newest.write_bytes(data)
        (result,) = run_all([Runner(swarm.link("peer-0"), folder=tmp_path / "node")])
        (check,) = run_all([Runner(swarm.link("peer-1"))])
    assert "chunk 0" in texts(caplog, "cannot be used")[0]
    assert result.fingerprint == check.fingerprint


def test_without_payloads_and_without_anybody_it_says_so(tmp_path: Path) -> None:
    config = config_of(STRATEGIES["decoupled-dense"], min_peers=1, rounds=1000, snapshot_every=2)
    with swarm_of(tmp_path, config) as swarm:
        first = Runner(swarm.link("peer-0"))
        thread, _ = in_background([first])
        wait_for(lambda: newest_attested(swarm) >= 6)
        first.request_stop()
        thread.join(30)
        with pytest.raises(NoStart, match="no snapshot of a later round can be had") as e:
            Runner(swarm.link("peer-1")).run()
        assert e.value.exit_code == 1


@pytest.mark.parametrize("n_peers", [2, 4])
@pytest.mark.parametrize("strategy", ["decoupled", "spsa"])
def test_a_flipped_bit_is_found_named_and_healed(
    tmp_path: Path, strategy: str, n_peers: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(
        STRATEGIES[strategy], min_peers=n_peers, rounds=24, verify_every=4, snapshot_every=4, eval_every=100
    )
    with swarm_of(tmp_path, config) as swarm:
        flipped = Meddled(swarm.link("peer-1"), {9: flip_a_bit})
        others = [Runner(swarm.link(f"peer-{i}")) for i in range(n_peers) if i != 1]
        for runner in (others[0], flipped, *others[1:]):  # indices
            runner.link.open()
        results = run_all([flipped, *others])
        status = swarm.call(lambda service, now_s: service.status(now_s))
    assert {r.rounds for r in results} == {24}
    assert len({r.fingerprint for r in results}) == 1
    healed = texts(caplog, "this replica was wrong")
    assert healed == ["this replica was wrong after round 12, in head.weight: healed by replaying the ledger"]
    right = texts(caplog, "this replica is right")
    assert bool(right) == (n_peers == 2), "one against one, the lower index checks first"
    told = flipped.metrics.text().decode(), others[0].metrics.text().decode()
    assert [value(text, "thinwire_heals_total", result="adopted") for text in told] == [1, 0]
    assert [value(text, "thinwire_heals_total", result="confirmed") for text in told] == [0, len(right)]
    assert [value(text, "thinwire_offers_not_counted_total", reason="given_up") for text in told] == [0, 0]
    assert {p["fingerprint"] for p in status["peers"]} == {results[0].fingerprint}


def test_a_peer_that_was_wrong_for_a_while_replays_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What it had said of later rounds before it was healed was the same fault: nobody looks for it again."""
    trains, began, ended = threading.Event(), threading.Event(), threading.Event()

    def check_slowly(runner: Runner) -> None:
        verdicts, metrics = runner.prepared.history.verdicts, runner.metrics
        to_check, begin, replayed = verdicts.to_check, runner.replica.begin, metrics.replayed

        def slowly(base: bytes | Path | None) -> None:
            began.set()
            wait_for(lambda: runner.link.head >= 19)
            begin(base)

        def later(peer: int) -> list[int]:
            return to_check(peer) if runner.replica.round >= 16 else []

        def counted(was_wrong: bool) -> None:
            replayed(was_wrong)
            ended.set()

        verdicts.to_check = later  # type: ignore[method-assign]
        runner.replica.begin = slowly  # type: ignore[method-assign]
        metrics.replayed = counted  # type: ignore[method-assign]

    config = config_of(
        STRATEGIES["decoupled"], min_peers=2, rounds=24, verify_every=4, snapshot_every=100, eval_every=100
    )
    with swarm_of(tmp_path, config) as swarm:
        meddle = {0: lambda _: trains.set(), 9: flip_a_bit, 10: check_slowly}
        flipped = Meddled(swarm.link("peer-1"), meddle)
        # Two are enough for a round: they begin with the one that is to go wrong, not before it is there.
        wait = {0: lambda _: trains.wait(60), 17: lambda _: began.wait(60), 20: lambda _: ended.wait(60)}
        others = [Meddled(swarm.link(name), wait) for name in ("peer-0", "peer-2")]
        for runner in (others[0], flipped, others[1]):  # indices
            runner.link.open()
        results = run_all([flipped, *others])
    assert {r.rounds for r in results} == {24}
    assert len({r.fingerprint for r in results}) == 1
    assert len(texts(caplog, "the replicas differ after round")) == 1
    assert texts(caplog, "this replica was wrong") == [
        "this replica was wrong after round 12, in head.weight: healed by replaying the ledger"
    ]


def test_a_bit_that_makes_the_replica_non_finite_is_healed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def break_it(runner: Runner) -> None:
        with torch.no_grad():
            runner.replica.tensors()["head.weight"].view(-1)[0] = float("inf")

    config = config_of(STRATEGIES["decoupled"], min_peers=2, rounds=10)
    with swarm_of(tmp_path, config) as swarm:
        results = run_all([Runner(swarm.link("peer-0")), Meddled(swarm.link("peer-1"), {5: break_it})])
    assert len({r.fingerprint for r in results}) == 1
    assert "head.weight non-finite" in texts(caplog, "replaying the ledger to see")[0]


def test_two_machines_that_compute_different_things_do_not_go_on_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each replay confirms itself: nobody is healed into the wrong state or stopped, and owners hear it."""

    def break_apply(runner: Runner) -> None:
        strategy, apply = runner.replica.strategy, runner.replica.strategy.apply

        def apply_wrong(shares: Any, turn: Any, own: Any) -> None:
            apply(shares, turn, own)
            with torch.no_grad():
                strategy.parameters_in_order()[0].tensor.view(-1)[0] += 1e-3

        strategy.apply = apply_wrong  # type: ignore[method-assign]

    config = config_of(STRATEGIES["decoupled"], min_peers=3, rounds=30)
    with swarm_of(tmp_path, config) as swarm:
        wrong = Runner(swarm.link("peer-0"), on_prepared=break_apply)
        others = [Runner(swarm.link("peer-1")), Runner(swarm.link("peer-2"))]
        results = run_all([wrong, *others])
    assert [r.rounds for r in results] == [30, 30, 30]
    assert results[1].fingerprint == results[2].fingerprint != results[0].fingerprint
    said = texts(caplog, "is not what this node has")
    assert sum("since round 2 the replica of peer-0 is not" in text for text in said) == 2
    assert any("the replica of " in text and "peer-1" in text for text in said)
    assert all("confirms what it has" in text and "ban PEER" in text for text in said)
