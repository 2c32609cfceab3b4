"""Eight peers in one run, six of them equally fast, one half as fast, one a quarter, in scripted time.

Whole nodes as threads; only a batch takes time, as much as a script says. What is asserted are ratios between
executions of the same script.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor, nn

from tests.support.scripted_clock import ScriptedClock
from thinwire.coordinator.protocol.identity import peer_id_of
from thinwire.coordinator.protocol.messages import CommitBody
from thinwire.node.config import RunConfig, load_config
from thinwire.node.genesis import make_genesis
from thinwire.node.links.local import local_swarm
from thinwire.node.runner import Runner
from thinwire.node.tasks.base import Task
from thinwire.node.tasks.registry import make_task
from thinwire.optim.base import Closure

pytestmark = pytest.mark.usefixtures("one_core")

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
SPEEDS = [1.0] * 6 + [0.5, 0.25]
BATCH_S = 5.0
"""Of a fast peer."""

STRATEGY: dict[str, Any] = {
    "name": "decoupled",
    "lr": 3e-2,
    "beta": 0.9,
    "accumulate": 2,
    "compressor": {"name": "dct_topk", "k": 32, "group_size": 1024, "bits": 1},
}


@dataclass(frozen=True)
class Outcome:
    """`times_s`: when each round was committed; `held_out`: by round."""

    commits: list[CommitBody]
    times_s: list[float]
    held_out: dict[int, float]
    fingerprints: set[str]

    def tokens(self, round_: int) -> int:
        """Committed up to that round."""
        return sum(o.n_tokens for body in self.commits[:round_] for o in body.offers)

    def rounds_for(self, n_tokens: int) -> int:
        """How many it took to commit so many."""
        return next(r for r in range(1, len(self.commits) + 1) if self.tokens(r) >= n_tokens)

    def tokens_per_s(self) -> float:
        return self.tokens(len(self.commits)) / self.times_s[-1]


class Working:
    """A task whose batches take time."""

    def __init__(self, task: Task, take_time: Callable[[], None]) -> None:
        self._task, self._take_time = task, take_time

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def draw(self, model: nn.Module, seed: int) -> Closure:
        closure = self._task.draw(model, seed)

        def timed() -> Tensor:
            self._take_time()
            return closure()

        return timed


def config_of(
    policy: str,
    rounds: int,
    round_s: float,
    strategy: Mapping[str, Any],
    n_peers: int,
    every_s: float | None,
) -> RunConfig:
    flat = {
        **{"run.rounds": rounds, "run.min_peers": n_peers, "run.eval_every": 4, "run.verify_every": 10},
        **{"task.layers": 1, "task.width": 16, "task.heads": 2, "task.context": 16, "task.batch": 4},
        **{"task.held_out_bytes": 2048, "policy.name": policy, "work.round_s": round_s},
        **({} if every_s is None else {"policy.every_s": every_s}),
        **{"schedule.name": "linear", "schedule.warmup_rounds": 0, "network.heartbeat_s": 20.0},
        **{"audits.rate": 0.0},  # the time of the script is for training
    }
    return RunConfig.model_validate(
        {**load_config(None, flat, environ={}).model_dump(), "strategy": dict(strategy)}
    )


def train(
    folder: Path,
    policy: str,
    rounds: int,
    round_s: float = 0.0,
    strategy: Mapping[str, Any] = STRATEGY,
    upload_bytes_per_s: float | None = None,
    speeds: Sequence[float] = SPEEDS,
    every_s: float | None = None,
) -> Outcome:
    """`upload_bytes_per_s`: of the first peer's link; `every_s`: of the policy `async`."""
    folder.mkdir()
    config = config_of(policy, rounds, round_s, strategy, len(speeds), every_s)
    genesis = make_genesis(config, make_task(config.task, None, None), peer_id_of(KEY.public_key()), 1)
    clock = ScriptedClock(len(speeds) + 1)
    fingerprints, failed = set[str](), list[BaseException]()
    with local_swarm(folder, genesis.body, KEY, blobs=genesis.blobs, clock=clock) as swarm:
        times_s: list[float] = []
        on_commit = swarm.service._on_commit
        swarm.service._on_commit = lambda round_: (times_s.append(clock.now_s()), on_commit(round_))[1]

        def slow_down(number: int, runner: Runner) -> None:
            # A little apart, so that no two offers come at the same time.
            batch_s = BATCH_S / speeds[number] * (1 + number * 1e-4)
            runner.work.task = Working(runner.work.task, lambda: clock.sleep(swarm.changed, batch_s))

        def run(runner: Runner) -> None:
            try:
                fingerprints.add(runner.run().fingerprint)
            except BaseException as e:
                failed.append(e)
                raise
            finally:
                clock.leave(swarm.changed)

        runners = []
        for number in range(len(speeds)):
            speed = upload_bytes_per_s if number == 0 else None
            link = swarm.link(f"peer-{number}", upload_bytes_per_s=speed)
            runners.append(Runner(link, clock=clock.now_s, on_prepared=partial(slow_down, number)))
            link.open()  # admitted in this order in every execution
        threads = [threading.Thread(target=run, args=(runner,)) for runner in runners]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(200)
        if failed:
            raise failed[0]
        status = swarm.service.status(0.0)
        commits = [c.body for c in swarm.service.commits(0, 10_000)]
    return Outcome(commits, times_s, dict(status["held_out"]), fingerprints)


def near(held_out: Mapping[int, float], round_: int) -> float:
    """The loss that was measured closest to that round."""
    return held_out[min(held_out, key=lambda r: abs(r - round_))]


def test_the_fastest_commit_the_same_tokens_sooner_and_learn_as_much(tmp_path: Path) -> None:
    """Fixed work per offer. The ideal is 3: six offers in a quarter of the time of eight."""
    everybody = train(tmp_path / "all", "all", 20)
    fastest = train(tmp_path / "fastest", "fastest", 28)
    assert len(everybody.fingerprints) == len(fastest.fingerprints) == 1
    rounds = fastest.rounds_for(everybody.tokens(20))
    assert everybody.times_s[-1] / fastest.times_s[rounds - 1] >= 1.8
    assert {len(body.offers) for body in everybody.commits} <= {7, 8}, "but for who evaluates"
    assert {o.peer for body in fastest.commits[5:] for o in body.offers} == set(range(6))
    loss, sooner = near(everybody.held_out, 20), near(fastest.held_out, rounds)
    assert sooner <= 1.03 * loss, "(it is lower: more rounds, of fewer offers each)"
    assert loss < everybody.held_out[0] - 0.5, "it has learnt something"


def test_with_work_of_their_own_choice_nobody_needs_to_be_left_out(tmp_path: Path) -> None:
    """A round is planned for four batches of a fast peer, two of the slower one, one of the slowest."""
    strategy = {**STRATEGY, "accumulate": 8, "weights": "samples"}
    everybody = train(tmp_path / "all", "all", 12, 4.5 * BATCH_S, strategy)
    fastest = train(tmp_path / "fastest", "fastest", 12, 4.5 * BATCH_S, strategy)
    assert everybody.tokens_per_s() >= fastest.tokens_per_s() / 1.3
    samples = {o.peer: o.n_samples for o in everybody.commits[-1].offers}
    assert all(n == 16 for peer, n in samples.items() if peer < 6), "four batches of four"
    assert samples.get(6, 8) == 8
    assert samples.get(7, 4) == 4


def test_a_thin_link_sends_less_and_holds_nobody_up(tmp_path: Path) -> None:
    """The first peer's payloads would take the whole round: it sends the strongest groups alone, and works in
    the time that is left."""
    strategy = {**STRATEGY, "accumulate": 8}
    whole = max(o.n_bytes for o in train(tmp_path / "whole", "all", 1, 0.0, strategy).commits[0].offers)
    round_s = 4.5 * BATCH_S
    outcome = train(tmp_path / "thin", "all", 8, round_s, strategy, upload_bytes_per_s=whole / round_s)
    (thin,) = (o for o in outcome.commits[-1].offers if o.peer == 0)
    assert thin.n_bytes < 0.65 * whole
    assert 4 <= thin.n_samples <= 8, "one or two batches of four"
    assert outcome.times_s[-1] - outcome.times_s[-2] <= round_s
    assert len(outcome.fingerprints) == 1


LOCAL: dict[str, Any] = {
    **{"name": "diloco", "lr": 1e-2, "inner_steps": 2, "weight_decay": 0.0, "outer_lr": 1.0},
    **{"outer_momentum": 0.0, "compressor": {"name": "dense", "bits": 8}},
}


def test_rounds_of_their_own_pace_hold_nobody_up_and_leave_nobody_out(tmp_path: Path) -> None:
    """Three peers take 10 seconds for a round's work, the fourth 50."""
    speeds = [1.0, 1.0, 1.0, 0.2]
    strategy = {**LOCAL, "pace": "favano"}
    paced = train(tmp_path / "async", "async", 25, strategy=strategy, speeds=speeds, every_s=12.0)
    everybody = train(tmp_path / "all", "all", 5, strategy=LOCAL, speeds=speeds)
    deadline = train(tmp_path / "deadline", "deadline", 12, strategy=LOCAL, speeds=speeds)
    assert all(len(outcome.fingerprints) == 1 for outcome in (paced, everybody, deadline))
    rounds = [body.round for body in paced.commits if 3 in {o.peer for o in body.offers}]
    assert {b - a for a, b in pairwise(rounds)} == {5}, (
        "its work comes late, and counts as soon as it is there"
    )
    assert len(rounds) >= 4
    assert 3 not in {o.peer for body in deadline.commits[4:] for o in body.offers}
    steps = [b - a for a, b in pairwise([0.0, *paced.times_s])]
    assert max(steps) <= 12.001
    assert {len(body.offers) for body in paced.commits} <= {2, 3, 4}
    sooner = max(r for r in paced.held_out if paced.times_s[r - 1] <= everybody.times_s[-1])
    assert paced.held_out[sooner] < everybody.held_out[max(everybody.held_out)] - 0.1


def test_the_same_script_ends_the_same(tmp_path: Path) -> None:
    outcomes = [train(tmp_path / str(i), "fastest", 6) for i in range(2)]
    assert outcomes[0].times_s == outcomes[1].times_s
    assert outcomes[0].fingerprints == outcomes[1].fingerprints
    assert len(outcomes[0].fingerprints) == 1
