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
    Steady,
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
from thinwire.optim.base import Own, Share
from thinwire.optim.registry import build_strategy

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


def checked(watched: Watched, runner: Runner, round_: int, peer: str) -> bool:
    """Whether the offer is the gradient at the weights after round - 2, moved by the peer's offer of the
    round between, and an auditor finds the same; False: it has also put back an offer that did not count."""
    run, task, turn = runner.prepared, runner.prepared.work.task, watched.turns[round_]
    model, sent = task.model(), watched.payloads.get((round_ - 1, peer))
    strategy = build_strategy(run.config.strategy, model.named_parameters())
    with torch.no_grad():
        for p in strategy.parameters_in_order():
            p.local.copy_(watched.weights[max(0, round_ - 2)][p.name])
    if sent is not None:
        strategy.apply([Share(1, 1, sent)], watched.turns[round_ - 1], None)
    payload, kept = watched.payloads[round_, peer], watched.kept[round_]
    assert kept is not None
    if round_ > 1 and sent is None:
        return False

    def seed(i: int) -> int:
        return data_seed(run.replica.run_id, round_, peer, i)

    task.draw(model, seed(0))().backward()  # type: ignore[no-untyped-call]
    for p in strategy.parameters_in_order():
        expected = p.tensor.grad.flatten() * p.group["lr"] * turn.lr_factor  # type: ignore[union-attr]
        torch.testing.assert_close(payload[p.name][0], expected, rtol=1e-3, atol=1e-7)
    (evidence,) = run.work.audit({peer: payload}, kept, seed, 1, sent)
    assert evidence is not None
    assert evidence.agreement > 0.9999
    return True


def test_every_offer_is_made_where_it_is_to_be_made(tmp_path: Path) -> None:
    """Also that of a node which comes back after it was killed."""
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
        first = Steady(swarm.link("peer-0"), dict.fromkeys(range(5, 11), wait), on_prepared=watched)
        second = Steady(swarm.link("peer-1"), dict.fromkeys(range(5, 10), die), folder=tmp_path / "second")
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
    n_checked = sum(checked(watched, first, round_, peer) for round_, peer in watched.payloads)
    assert n_checked >= 20
    assert {round_ for round_, peer in watched.payloads if peer == "peer-1"} >= {1, 2, 3, 4, 14}


def test_record_0_has_the_option_only_where_it_is_used() -> None:
    for overlap in (0, 1):
        config = config_of({**OVERLAP, "overlap": overlap})
        recorded = public_config(config, make_task(config.task, None, None)).strategy
        assert recorded.get("overlap") == (1 if overlap else None)
