"""Nodes that do a round's work while the commit of the round before is under way: at which weights."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.local_nodes import (
    DECOUPLED,
    Meddled,
    config_of,
    in_background,
    newest_attested,
    run_all,
    swarm_of,
)
from thinwire.compression.base import Payload, Turn
from thinwire.coordinator.protocol.messages import Commit, OfferEntry
from thinwire.node.auditing.earlier import Earlier
from thinwire.node.genesis import public_config
from thinwire.node.replica import data_seed
from thinwire.node.runner import Runner
from thinwire.node.tasks.registry import make_task
from thinwire.optim.base import Own
from thinwire.optim.decoupled import Decoupled

pytestmark = pytest.mark.usefixtures("one_core")

# All of the momentum is sent, so that a payload is the gradient times the learning rate.
OVERLAP = {**DECOUPLED, "compressor": {"name": "dense"}, "overlap": 1}


class Killed(Exception):
    pass


class Watched:
    """Notes what a node applies: the weights before it, and everybody's payloads."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}
        """By round, after it."""
        self.turns: dict[int, Turn] = {}
        self.payloads: dict[tuple[int, str], Payload] = {}
        self.kept: dict[int, Earlier | None] = {}

    def __call__(self, runner: Runner) -> None:
        replica, apply = runner.replica, runner.replica.apply_batch
        work, keep = runner.prepared.work, runner.prepared.work.keep

        def kept() -> Earlier | None:
            found = self.kept[replica.round + 1] = keep()
            return found

        work.keep = kept  # type: ignore[method-assign]

        def watched(commits: Sequence[Commit], payload_bytes: Any, **options: Any) -> list[Own]:
            (commit,) = commits
            turn, round_ = replica.turn(), commit.body.round
            parameters = replica.strategy.parameters_in_order()
            self.weights[replica.round] = {p.name: p.local.clone() for p in parameters}
            self.turns[round_] = turn

            def noted(offer: OfferEntry) -> bytes:
                data = bytes(payload_bytes(offer))
                self.payloads[round_, runner.prepared.history.peers[offer.peer]] = replica.decode(data, turn)
                return data

            return apply(commits, noted, **options)

        replica.apply_batch = watched  # type: ignore[method-assign]


def test_every_offer_is_made_at_the_weights_before_the_commit_under_way(tmp_path: Path) -> None:
    """Also that of a node which comes back after it was killed, and an auditor has those weights."""
    config = config_of(OVERLAP, min_peers=2, rounds=14, eval_every=100, snapshot_every=4)
    watched, killed = Watched(), tmp_path / "killed"
    copied, back = threading.Event(), threading.Event()

    def die(_runner: Runner) -> None:
        if newest_attested(swarm) >= 4 and not copied.is_set():
            shutil.copytree(tmp_path / "second", killed)
            copied.set()
            raise Killed

    def wait(_runner: Runner) -> None:
        if copied.is_set():
            assert back.wait(60)

    with swarm_of(tmp_path, config) as swarm:
        first = Meddled(swarm.link("peer-0"), dict.fromkeys(range(5, 11), wait), on_prepared=watched)
        second = Meddled(swarm.link("peer-1"), dict.fromkeys(range(5, 10), die), folder=tmp_path / "second")
        for runner in (first, second):
            runner.link.open()
        thread, results = in_background([first])
        with pytest.raises(Killed):
            second.run()
        again = Meddled(swarm.link("peer-1"), {0: lambda _: back.set()}, folder=killed)
        (came_back,) = run_all([again])
        thread.join(100)
    assert {r.fingerprint for r in results} == {came_back.fingerprint}
    assert came_back.counted >= 2
    run = first.prepared
    task = run.work.task
    model = task.model()
    strategy = Decoupled(model.named_parameters(), compressor=run.replica.strategy.compressor, lr=1e-2)  # type: ignore[attr-defined]
    parameters = strategy.parameters_in_order()
    n_checked = 0
    for (round_, peer), payload in watched.payloads.items():
        stale, fresh = (watched.weights[max(0, round_ - 1 - age)] for age in (1, 0))
        distances = []
        for weights in (stale, fresh):
            with torch.no_grad():
                for p in parameters:
                    p.local.copy_(weights[p.name])
            strategy.zero_grad()
            task.draw(model, data_seed(run.replica.run_id, round_, peer, 0))().backward()  # type: ignore[no-untyped-call]
            expected = torch.cat([p.tensor.grad.flatten() for p in parameters]) * 1e-2  # type: ignore[union-attr]
            expected *= watched.turns[round_].lr_factor
            sent = torch.cat([payload[p.name][0] for p in parameters])
            distances.append(float((sent - expected).norm() / expected.norm()))
        if (round_ - 1, peer) in watched.payloads or round_ == 1:  # else it has put back what did not count
            assert distances[0] < 1e-4
            assert distances[1] > 1e-3 or round_ == 1
            n_checked += 1
        kept = watched.kept[round_]
        assert kept is not None
        assert kept.round == round_
        assert all(torch.equal(kept._kept[name], t) for name, t in stale.items())
    assert n_checked >= 20
    assert {round_ for round_, peer in watched.payloads if peer == "peer-1"} >= {1, 2, 3, 4, 14}


def test_record_0_has_the_option_only_where_it_is_used() -> None:
    for overlap in (0, 1):
        config = config_of({**OVERLAP, "overlap": overlap})
        recorded = public_config(config, make_task(config.task, None, None)).strategy
        assert recorded.get("overlap") == (1 if overlap else None)
