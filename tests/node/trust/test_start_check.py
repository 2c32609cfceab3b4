"""Whole nodes as threads among bad ones: nothing but a replay is proof."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

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
from thinwire.coordinator.protocol.messages import Report
from thinwire.node.joining import NoStart
from thinwire.node.links.local import LocalSwarm
from thinwire.node.result import Result
from thinwire.node.runner import Runner
from thinwire.node.snapshots.verified import MARK
from thinwire.node.trust import verifying
from thinwire.node.trust.start_check import Verify

pytestmark = pytest.mark.usefixtures("one_core")


@pytest.fixture(autouse=True)
def _no_priorities(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where others compute, the lowest one gets nothing for half a minute, and all here wait for it."""
    monkeypatch.setattr(verifying, "_lowest_priority", lambda: None)


@pytest.fixture(autouse=True)
def _all_logs(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="thinwire.node")


def texts(caplog: pytest.LogCaptureFixture, part: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if part in record.getMessage()]


def trust_nobody_s_doubt(runner: Runner) -> None:
    """A bad node does not heal."""
    runner.prepared.history.verdicts.to_check = lambda peer: []  # type: ignore[method-assign]


def poison(runner: Runner) -> None:
    p = next(p for p in runner.replica.strategy.parameters_in_order() if p.name == "head.weight")
    with torch.no_grad():
        p.tensor.view(-1).view(torch.int32)[3] ^= 1 << 20


Meddling = Mapping[int, Callable[[Runner], object]]


def bad_node(swarm: LocalSwarm, name: str, after: int, also: Meddling = {}) -> Steady:  # noqa: B006
    """All of them have the same wrong replica from that round on, and say so."""
    return Steady(swarm.link(name), {after: lambda r: (trust_nobody_s_doubt(r), poison(r)), **also})


def good_node(swarm: LocalSwarm, name: str, _after: int, also: Meddling = {}) -> Steady:  # noqa: B006
    return Steady(swarm.link(name), also)


def admit(*runners: Runner) -> None:
    """In this order, so that their indices are those of their names."""
    for runner in runners:
        runner.link.open()


class Held:
    """A run that stands still once a snapshot of this round or a later one is attested, until `release`."""

    def __init__(self, swarm: LocalSwarm, from_round: int) -> None:
        self._swarm, self._from_round = swarm, from_round
        self._reached, self._released = threading.Event(), threading.Event()

    def meddling(self, n_rounds: int) -> Meddling:
        """Of the node that holds it up."""
        return dict.fromkeys(range(self._from_round + 1, n_rounds), self._look)

    def wait(self) -> None:
        assert self._reached.wait(100)

    def release(self) -> None:
        self._released.set()

    def _look(self, _runner: Runner) -> None:
        if newest_attested(self._swarm) >= self._from_round:
            self._reached.set()
            assert self._released.wait(100)


def test_identities_that_never_worked_change_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each says that its replay of the ledger came to something else."""
    config = config_of(STRATEGIES["decoupled"], min_peers=3, rounds=24, eval_every=100)
    with swarm_of(tmp_path, config) as swarm:

        def report(_runner: Runner) -> None:
            for i in range(3):
                link = swarm.link(f"idle-{i}")
                link.open()
                for round_ in (4, 6):
                    link.report(Report(round=round_, fingerprint=bytes([i]) * 8, checked=True))

        honest = [Meddled(swarm.link("peer-0"), {7: report})]
        results = run_all([*honest, *(Runner(swarm.link(f"peer-{i}")) for i in (1, 2))])
        status = swarm.call(lambda service, now_s: service.status(now_s))
    assert {r.rounds for r in results} == {24}
    assert len({r.fingerprint for r in results}) == 1
    assert status["rejected"] == {"no_work": 6}
    assert status["mismatches"] == 0
    assert texts(caplog, "differ") == []


def test_a_majority_that_is_wrong_changes_no_honest_node(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Three against two attest snapshots of a wrong replica: the honest nodes go by their own replay."""
    options = {"min_peers": 5, "verify_every": 2, "snapshot_every": 4, "eval_every": 100}
    config = config_of(STRATEGIES["decoupled"], rounds=16, **options)
    with swarm_of(tmp_path / "swarm", config) as swarm:
        bad = [bad_node(swarm, f"bad-{i}", 5) for i in range(3)]
        honest = [Steady(swarm.link(f"peer-{i}"), folder=tmp_path / f"peer-{i}") for i in range(2)]
        admit(*bad, *honest)
        results = run_all([*bad, *honest])
        attested = honest[0].prepared.history.snapshots.attested()
        bad_peers = {i for i, name in honest[0].prepared.history.peers.items() if name.startswith("bad")}
    assert [r.rounds for r in results] == [16] * 5
    wrong, right = {r.fingerprint for r in results[:3]}, {r.fingerprint for r in results[3:]}
    assert len(wrong) == len(right) == 1
    assert wrong != right
    assert any(a.round > 5 for a in attested)
    assert all(set(a.peers) == bad_peers for a in attested if a.round > 5), (
        "the poisoned ones are those that are attested"
    )
    assert texts(caplog, "healed by replaying") == []
    assert len(texts(caplog, "this replica is right")) >= 2
    assert texts(caplog, "since round 6 the replica of bad-0, bad-1, bad-2 is not what this node has")


def poisoned(
    tmp_path: Path,
    verify: Verify,
    until: Callable[[], object],
    other: Callable[[LocalSwarm, str, int, Meddling], Runner] = bad_node,
) -> tuple[list[Result], Result]:
    """Three of five attest a wrong snapshot after round 8, the only one so far; then one more node joins.
    The run goes on when it is prepared and `until` is true. The results of the two honest ones, and its own.
    """
    options = {"min_peers": 5, "verify_every": 4, "snapshot_every": 8, "eval_every": 100}
    config = config_of(STRATEGIES["decoupled-dense"], rounds=15, **options)
    with swarm_of(tmp_path / "swarm", config) as swarm:
        held = Held(swarm, 8)
        nodes = [other(swarm, f"bad-{i}", 5, held.meddling(15) if i == 0 else {}) for i in range(3)]
        honest = [Steady(swarm.link(f"peer-{i}")) for i in range(2)]
        admit(*nodes, *honest)
        thread, results = in_background([*nodes, *honest])
        held.wait()
        prepared = threading.Event()
        late = Runner(
            swarm.link("late"),
            folder=tmp_path / "late",
            verify=verify,
            on_prepared=lambda _runner: prepared.set(),
        )
        late_thread, late_results = in_background([late])
        try:
            assert prepared.wait(100)
            wait_for(lambda: bool(until()))
        finally:
            held.release()
            thread.join(100)
            late_thread.join(100)
    return results[3:], late_results[0]


def test_a_poisoned_snapshot_is_found_out_while_the_node_trains(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    honest, late = poisoned(tmp_path, "background", lambda: has_replayed(caplog))
    assert {r.fingerprint for r in honest} == {late.fingerprint}
    (said,) = texts(caplog, "one that this node has not verified")
    assert re.search(r"takes the word of bad-\d(, bad-\d)+ for it", said), said
    assert len(refuted(caplog)) == 1


def has_replayed(caplog: pytest.LogCaptureFixture) -> bool:
    """The replay in the background has begun and ended; nobody has looked at what it found yet."""
    is_running = any(thread.name == "verify" for thread in threading.enumerate())
    return bool(texts(caplog, "A replay from round 0 verifies it meanwhile")) and not is_running


def refuted(caplog: pytest.LogCaptureFixture) -> list[str]:
    return texts(caplog, "the snapshot after round 8 is wrong: a replay of the ledger gave something else")


def test_who_verifies_first_never_begins_at_a_poisoned_snapshot(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    honest, late = poisoned(tmp_path, "first", lambda: True)
    assert {r.fingerprint for r in honest} == {late.fingerprint}
    assert texts(caplog, "from the swarm") == []


def test_an_honest_snapshot_is_verified_and_so_is_what_it_has_led_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    honest, late = poisoned(tmp_path, "background", lambda: has_replayed(caplog), good_node)
    assert {r.fingerprint for r in honest} == {late.fingerprint}
    assert len(texts(caplog, "the snapshot after round 8 is verified")) == 1
    assert marks(tmp_path / "late") == {8: True, 15: True}


def test_what_began_on_others_word_is_not_verified_across_restarts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"min_peers": 2, "rounds": 40, "snapshot_every": 4, "eval_every": 100}
    config = config_of(STRATEGIES["decoupled-dense"], **options)
    with swarm_of(tmp_path / "swarm", config) as swarm:
        held = Held(swarm, 8)
        first = Steady(swarm.link("peer-0"), held.meddling(40), folder=tmp_path / "first")
        thread, results = in_background([first, Steady(swarm.link("peer-1"))])
        held.wait()
        with pytest.raises(
            NoStart, match="--verify first: the payloads of a replay from the base weights are"
        ):
            Runner(swarm.link("strict"), verify="first").run()
        run_all([Meddled(swarm.link("late"), {8: Runner.request_stop}, folder=tmp_path / "late")])
        assert not any(marks(tmp_path / "late").values())
        assert len(marks(tmp_path / "late")) > 0
        again = Meddled(swarm.link("late"), {8: lambda _: held.release()}, folder=tmp_path / "late")
        (result,) = run_all([again])
        thread.join(100)
    assert {r.fingerprint for r in results} == {result.fingerprint}
    said = texts(caplog, "one that this node has not verified")
    assert len(said) == 2
    assert all("It stays so: the payloads of a replay are gone" in text for text in said)
    assert not any(marks(tmp_path / "late").values())
    assert all(marks(tmp_path / "first").values())


def marks(folder: Path) -> dict[int, bool]:
    """Round of each snapshot -> whether it is verified."""
    return {int(path.name[:10]): (path / MARK).exists() for path in (folder / "snapshots").glob("0*")}
