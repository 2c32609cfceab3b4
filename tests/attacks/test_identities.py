"""Identities that say what is not so: none of them stops, changes or heals away an honest node."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from tests.support.local_nodes import DECOUPLED, config_of, run_all, swarm_of, train
from thinwire.coordinator.protocol.messages import NodeState, Report
from thinwire.node.links.base import Link
from thinwire.node.links.local import LocalSwarm
from thinwire.node.preparing import prepare_run
from thinwire.node.runner import Runner

pytestmark = pytest.mark.usefixtures("one_core")

N_ROUNDS = 12
SHORT = {"rounds": N_ROUNDS, "eval_every": 0, "verify_every": 1, "snapshot_every": 2}
FALSE = b"\xff" * 8
POISONED = b"\xee" * 32


class Liar:
    """A link of a node that works like others and reports a replica and a snapshot that it does not have."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def report(self, report: object) -> None:
        if isinstance(report, Report):
            self._link.report(lie(report.round))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)


def lie(round_: int) -> Report:
    return Report(round=round_, fingerprint=FALSE, checked=True, snapshot=POISONED, snapshot_bytes=1000)


def honest_fingerprint(folder: Path, n_peers: int) -> str:
    results, _, _ = train(folder, config_of(DECOUPLED, **SHORT, min_peers=n_peers), n_peers)
    return results[0].fingerprint


def replayed(swarm: LocalSwarm) -> str:
    """The fingerprint that the base weights and the whole ledger give."""
    link = swarm.link("reader")
    replica = prepare_run(link, link.open()).replica
    replica.begin(None)
    for commit in link.records(0):
        replica.apply(commit, link.payload, offered=False)
    return replica.fingerprint().hex()


@contextmanager
def idle_identities(swarm: LocalSwarm, n: int) -> Iterator[list[Link]]:
    """Members that never train."""
    links: list[Link] = [swarm.link(f"idle-{i}") for i in range(n)]
    for link in links:
        link.open()
        link.state(NodeState.JOINING)
    yield links


def test_three_identities_that_never_trained_stop_nobody(tmp_path: Path) -> None:
    config = config_of(DECOUPLED, **SHORT, min_peers=3)
    with swarm_of(tmp_path / "swarm", config) as swarm:
        runners: list[Runner] = []
        for i in range(3):
            runners.append(Runner(swarm.link(f"peer-{i}")))
            runners[-1].link.open()
        with idle_identities(swarm, 3) as idle:

            def report(runner: Runner) -> None:
                for link in idle:
                    link.report(lie(runner.replica.round))

            runners[0] = Runner(runners[0].link, on_proposing=report)
            results = run_all(runners)
    assert {r.rounds for r in results} == {N_ROUNDS}
    assert len({r.fingerprint for r in results}) == 1
    assert results[0].fingerprint == honest_fingerprint(tmp_path / "alone", 3)


def test_four_liars_that_work_heal_away_none_of_three_honest_ones(tmp_path: Path) -> None:
    config = config_of(DECOUPLED, **SHORT, min_peers=7)
    with swarm_of(tmp_path / "swarm", config) as swarm:
        links = [swarm.link(f"peer-{i}") for i in range(7)]
        honest = [Runner(link) for link in links[:3]]
        bad = [Runner(cast("Link", Liar(link))) for link in links[3:]]
        for runner in (*honest, *bad):
            runner.link.open()
        results = run_all([*honest, *bad])[:3]
        assert {r.rounds for r in results} == {N_ROUNDS}
        assert {r.fingerprint for r in results} == {replayed(swarm)}
