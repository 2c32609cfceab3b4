"""Whole nodes as threads over a swarm in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from thinwire.coordinator.protocol.identity import peer_id_of
from thinwire.coordinator.protocol.messages import Report
from thinwire.node.config import RunConfig, load_config
from thinwire.node.genesis import make_genesis
from thinwire.node.links.local import LocalLink, LocalSwarm, Script, local_swarm
from thinwire.node.runner import Result, Runner
from thinwire.node.tasks.registry import make_task

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))


DECOUPLED = {
    "name": "decoupled",
    "lr": 1e-2,
    "beta": 0.9,
    "compressor": {"name": "dct_topk", "k": 32, "group_size": 1024, "bits": 1},
}


STRATEGIES: dict[str, Mapping[str, Any]] = {
    "decoupled": DECOUPLED,
    "decoupled-8bit-unsigned": {
        **DECOUPLED,
        "sign": False,
        "compressor": {**DECOUPLED["compressor"], "bits": 8},
    },
    "decoupled-dense": {**DECOUPLED, "compressor": {"name": "dense"}},
    "spsa": {"name": "spsa", "lr": 1e-3, "eps": 1e-3, "probes": 4},
}


def never(_peer: str, _round: int) -> bool:
    return False


def config_of(strategy: Mapping[str, Any], **run: Any) -> RunConfig:
    sections = {
        "run": {"rounds": 6, "eval_every": 3, "verify_every": 2, **run},
        "task": {"layers": 1, "width": 16, "heads": 2, "context": 16, "batch": 4, "held_out_bytes": 2048},
        "strategy": strategy,
        "schedule": {"name": "linear", "warmup_rounds": 2, "final_factor": 0.5},
        "policy": {"name": "all"},
        "network": {"heartbeat_s": 0.2},
    }
    flat = {
        f"{name}.{key}": value
        for name, values in sections.items()
        if name != "strategy"
        for key, value in values.items()
    }
    return RunConfig.model_validate(
        {**load_config(None, flat, environ={}).model_dump(), "strategy": dict(strategy)}
    )


@contextmanager
def swarm_of(
    folder: Path, config: RunConfig, lose: Script = never, late: Script = never
) -> Iterator[LocalSwarm]:
    folder.mkdir(exist_ok=True)
    genesis = make_genesis(config, make_task(config.task, None, None), peer_id_of(KEY.public_key()), 1)
    with local_swarm(folder, genesis.body, KEY, blobs=genesis.blobs, lose=lose, late=late) as swarm:
        yield swarm


def run_all(runners: list[Runner]) -> list[Result]:
    """Runs every node in a thread of its own; raises what the first failing one raised."""
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    def run(i: int) -> None:
        try:
            results[i] = runners[i].run()
        except BaseException as e:
            errors.append(e)
            raise

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(runners))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads)
    return [results[i] for i in range(len(runners))]


def train(
    folder: Path, config: RunConfig, n_peers: int, lose: Script = never, late: Script = never
) -> tuple[list[Result], list[Runner], dict[str, Any]]:
    with swarm_of(folder, config, lose, late) as swarm:
        runners = [Runner(swarm.link(f"peer-{i}")) for i in range(n_peers)]
        for runner in runners:  # admitted in this order in every execution
            runner.link.open()
        results = run_all(runners)
        return results, runners, swarm.call(lambda service, now_s: service.status(now_s))


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "waited too long"
        time.sleep(0.01)


class Meddled(Runner):
    """Calls `meddle(runner)` before it proposes in the given rounds: to hold it up, or to break something.

    A node that evaluates may make no offer for the round after: then it is called before the next one."""

    def __init__(
        self, link: LocalLink, meddle: Mapping[int, Callable[[Runner], object]], **options: Any
    ) -> None:
        super().__init__(link, on_proposing=lambda _runner: self._meddle(), **options)
        self.meddle = dict(meddle)

    def _meddle(self) -> None:
        for round_ in sorted(r for r in self.meddle if r <= self.replica.round):
            self.meddle.pop(round_)(self)


class Told:
    """What a node has told of its snapshots."""

    def __init__(self, link: LocalLink) -> None:
        self._rounds, report = set[int](), link.report

        def noted(said: Report) -> None:
            report(said)
            if said.snapshot_bytes:
                self._rounds.add(said.round)

        link.report = noted  # type: ignore[method-assign]

    def wait(self, runner: Runner) -> None:
        """Until the newest is among them: however slow a disk is, all are written, and commits name them."""
        every = runner.config.run.snapshot_every
        newest = runner.replica.round // every * every
        wait_for(lambda: newest == 0 or newest in self._rounds)


class Steady(Meddled):
    """Proposes when it has told of its newest snapshot. It is there from the first round on."""

    def __init__(
        self, link: LocalLink, meddle: Mapping[int, Callable[[Runner], object]] | None = None, **options: Any
    ) -> None:
        super().__init__(link, meddle or {}, **options)
        self._snapshots = Told(link)

    def _meddle(self) -> None:
        self._snapshots.wait(self)
        super()._meddle()


def in_background(runners: Sequence[Runner]) -> tuple[threading.Thread, list[Result]]:
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.extend(run_all(list(runners))))
    thread.start()
    return thread, results


def newest_attested(swarm: LocalSwarm) -> int:
    snapshot = swarm.call(lambda service, now_s: service.status(now_s))["snapshot"]
    return 0 if snapshot is None else int(snapshot["round"])
