"""A run that is changed while it trains: every replica, live, late or replayed, has the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.local_nodes import (
    DECOUPLED,
    STRATEGIES,
    Meddled,
    Steady,
    config_of,
    in_background,
    newest_attested,
    run_all,
    swarm_of,
    train,
    wait_for,
)
from thinwire.compression.errors import ConfigError, ReplicaDiverged
from thinwire.coordinator.control.orders import Order
from thinwire.coordinator.protocol.ledger_file import check, write_ledger
from thinwire.coordinator.protocol.messages import Change
from thinwire.node.batches import batches
from thinwire.node.cli.replay import replay
from thinwire.node.links.local import LocalSwarm
from thinwire.node.preparing import prepare_run
from thinwire.node.replica import Replica
from thinwire.node.runner import Runner
from thinwire.optim.registry import check_changes

pytestmark = pytest.mark.usefixtures("one_core")

DILOCO = {"name": "diloco", "inner_steps": 2, "lr": 1e-3, "compressor": {"name": "dense"}}
CHANGED: dict[str, tuple[Any, dict[str, Any]]] = {
    "decoupled": (DECOUPLED, {"strategy.lr": 1e-3, "strategy.weight_decay": 0.1}),
    "spsa": (STRATEGIES["spsa"], {"strategy.lr": 5e-3, "schedule.name": "constant"}),
    "diloco": (DILOCO, {"strategy.outer_lr": 0.1, "strategy.lr": 3e-3}),
}


def order(what: str, rounds: int = 0, settings: dict[str, Any] | None = None) -> Order:
    changes = tuple(Change(key=key, value=value) for key, value in (settings or {}).items())
    return Order.model_validate({"what": what, "rounds": rounds, "changes": changes})


def give(swarm: LocalSwarm, what: str, rounds: int = 0, settings: dict[str, Any] | None = None) -> int:
    wanted = order(what, rounds, settings)
    return swarm.call(lambda service, now_s: service.order(wanted, now_s)).round


def giving(swarm: LocalSwarm, *args: Any) -> Callable[[Runner], object]:
    return lambda _runner: give(swarm, *args)


def replayed(swarm: LocalSwarm, peer_id: str, *, in_batches: bool) -> Replica:
    """Base weights and the whole ledger."""
    link = swarm.link(peer_id)
    replica = prepare_run(link, link.open()).replica
    replica.begin(None)
    records = link.records(0)
    for some in batches(records, replica.strategy) if in_batches else ([record] for record in records):
        replica.apply_batch(some, link.payload)
    link.close()
    return replica


@pytest.mark.parametrize("name", CHANGED)
def test_a_change_acts_from_its_round_on_for_all(tmp_path: Path, name: str) -> None:
    strategy, settings = CHANGED[name]
    config = config_of(strategy, min_peers=2, eval_every=100)
    with swarm_of(tmp_path / "changed", config) as swarm:
        runners = [
            Meddled(swarm.link("peer-0"), {2: giving(swarm, "set", 0, settings)}),
            Runner(swarm.link("peer-1")),
        ]
        for runner in runners:
            runner.link.open()
        results = run_all(runners)
        found = {r.fingerprint for r in results}
        for in_batches in (False, True):
            replica = replayed(swarm, f"reader-{in_batches}", in_batches=in_batches)
            found.add(replica.fingerprint().hex())
        changed = [c.body for c in swarm.link("z").records(0) if c.body.changes]
        status = swarm.call(lambda service, now_s: service.status(now_s))
    assert len(found) == 1
    assert [(body.round, len(body.offers)) for body in changed] == [(3, 2)]
    assert {f"strategy.{k}": replica.strategy.option(k) for k in ("lr",)} == {
        "strategy.lr": settings["strategy.lr"]
    }
    assert len(status["changes"]) == len(settings)
    plain, _, _ = train(tmp_path / "plain", config, 2)
    assert plain[0].fingerprint not in found


def test_batches_do_not_blur_the_round_of_a_change(tmp_path: Path) -> None:
    """`apply_batch` takes any cut: SPSA applies a batch in one pass over the parameters."""
    config = config_of(STRATEGIES["spsa"], min_peers=1, rounds=5)
    with swarm_of(tmp_path, config) as swarm:
        (live,) = run_all(
            [Meddled(swarm.link("a"), {1: giving(swarm, "set", 0, {"strategy.lr": 0.5}), 3: lambda _r: None})]
        )
        link = swarm.link("reader")
        replica = prepare_run(link, link.open()).replica
        replica.begin(None)
        replica.apply_batch(list(link.records(0)), link.payload)
        assert replica.fingerprint().hex() == live.fingerprint
        replica.begin(None)
        assert replica.strategy.option("lr") == STRATEGIES["spsa"]["lr"]


def test_a_joiner_starts_from_a_snapshot_with_the_settings_of_its_round(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    dense = STRATEGIES["decoupled-dense"]
    config = config_of(dense, min_peers=2, rounds=14, verify_every=2, snapshot_every=4, eval_every=100)
    with swarm_of(tmp_path / "run", config) as swarm:
        joiner = Runner(swarm.link("joiner"))
        settings = {"strategy.lr": 3e-3}
        first = [
            Steady(swarm.link("peer-0"), {1: giving(swarm, "set", 0, settings)}, folder=tmp_path / "0"),
            Steady(
                swarm.link("peer-1"), {12: lambda _runner: wait_for(has_caught_up)}, folder=tmp_path / "1"
            ),
        ]

        def has_caught_up() -> bool:
            return joiner._prepared is not None and joiner.replica.round >= 8

        thread, results = in_background(first)
        wait_for(lambda: newest_attested(swarm) >= 8)
        (joined,) = run_all([joiner])
        thread.join(60)
    assert {r.fingerprint for r in results} == {joined.fingerprint}
    assert joiner.replica.strategy.option("lr") == 3e-3
    assert "from the swarm" in caplog.text
    assert "cannot be used" not in caplog.text


def test_pause_resume_stop_and_extend_with_nodes(tmp_path: Path) -> None:
    """The node that comes back after the end trains on; the ledger as a file says all of it, and replays."""
    config = config_of(DECOUPLED, min_peers=2, rounds=9, verify_every=2, eval_every=100)
    with swarm_of(tmp_path / "run", config) as swarm:
        first = [Runner(swarm.link(f"peer-{i}"), folder=tmp_path / str(i)) for i in range(2)]
        meddled = Meddled(swarm.link("peer-2"), {1: giving(swarm, "pause"), 4: giving(swarm, "stop")})
        thread, results = in_background([*first, meddled])
        wait_for(lambda: swarm.call(lambda service, now_s: service.status(now_s))["state"] == "paused")
        assert swarm.service.head == 2
        give(swarm, "resume")
        thread.join(60)
        assert {(r.rounds, r.fingerprint) for r in results} == {(5, results[0].fingerprint)}
        assert give(swarm, "extend", 2) == 6
        again = run_all([Runner(swarm.link(f"peer-{i}"), folder=tmp_path / str(i)) for i in range(2)])
        assert {(r.rounds, r.fingerprint) for r in again} == {(8, again[0].fingerprint)}
        link = swarm.link("reader")
        welcome = link.open()
        path = tmp_path / "ledger"
        write_ledger(
            path,
            welcome.genesis,
            welcome.signature,
            link.records(0),
            lambda digest: link.fetch(digest, 2**20),
        )
    assert check(path).changes == (
        "round 2: paused",
        "round 3: goes on",
        "round 5: run.rounds 9 -> 5",
        "round 6: run.rounds 5 -> 8",
    )
    found = replay(path)
    assert found is not None
    assert (found.fingerprint, found.rounds, found.differing) == (again[0].fingerprint, 8, 0)


def test_the_loss_of_the_base_weights_is_told_also_where_the_ledger_begins_with_a_change(
    tmp_path: Path,
) -> None:
    def told(name: str, *orders: str) -> list[tuple[int, float]]:
        with swarm_of(tmp_path / name, config_of(DECOUPLED, min_peers=1, rounds=4, eval_every=1)) as swarm:
            for what in orders:
                give(swarm, what)
            run_all([Runner(swarm.link("a"))])
            status = swarm.call(lambda service, now_s: service.status(now_s))
        assert status["rejected"] == {}
        return [(round_, loss) for round_, loss in status["held_out"]]

    plain, changed = told("plain"), told("changed", "pause", "resume")
    assert [round_ for round_, _ in plain] == [0, 1, 2, 3, 4]
    assert [round_ for round_, _ in changed] == [2, 3, 4]
    assert changed[0][1] == plain[0][1]


def test_a_record_that_changes_what_cannot_be_changed_stops_the_replica(tmp_path: Path) -> None:
    config = config_of(DECOUPLED, min_peers=1, rounds=3)
    with swarm_of(tmp_path, config) as swarm:
        swarm.service._ordering.pending._check = lambda _table, _options: None
        give(swarm, "set", 0, {"strategy.beta": 0.5})
        with pytest.raises(ReplicaDiverged, match="beta cannot change: lr, weight_decay"):
            replayed(swarm, "reader", in_batches=True)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"beta": 0.5}, "strategy.beta stands in record 0.*strategy.lr, strategy.weight_decay"),
        ({"lr": -1.0}, "lr = -1"),
        ({"lr": "fast"}, "lr = 'fast': must be a number"),
        ({"compressor": "dense"}, "strategy.compressor stands in record 0"),
    ],
)
def test_options_are_checked_as_in_a_run_file(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        check_changes(DECOUPLED, settings)
