"""Whole nodes that do each other's work again: who sends something else is out, and nobody else is."""

from __future__ import annotations

import pydoc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.local_nodes import DECOUPLED, config_of, run_all, swarm_of
from thinwire.compression.base import Payload, Turn
from thinwire.coordinator.protocol.messages import Verdict
from thinwire.node.config import Audits, RunConfig
from thinwire.node.result import Result
from thinwire.node.runner import Runner
from thinwire.optim.spsa import CODES

pytestmark = pytest.mark.usefixtures("one_core")

STRATEGIES: dict[str, dict[str, Any]] = {
    "decoupled": {**DECOUPLED, "lr": 3e-3},
    "decoupled-overlap": {**DECOUPLED, "lr": 3e-3, "overlap": 1},
    "diloco": {
        "name": "diloco",
        "lr": 3e-3,
        "inner_steps": 3,
        "compressor": {"name": "dense"},
    },
    "spsa": {"name": "spsa", "lr": 1e-3, "eps": 1e-3, "probes": 8},
}
N_PEERS, BAD = 4, 3


def audited_config(strategy: dict[str, Any], rounds: int) -> RunConfig:
    config = config_of(strategy, rounds=rounds, min_peers=N_PEERS, eval_every=1000)
    return config.model_copy(update={"audits": Audits(rate=1.0, failures=2, window_rounds=1000)})


def turned(runner: Runner) -> None:
    """From now on the node offers the opposite of what it found."""
    replica: Any = runner.replica
    strategy, encode = replica.strategy, replica.encode

    def changed(payload: Payload, turn: Turn) -> bytes:
        if CODES in payload:
            codes = payload[CODES][0]
            return bytes(encode({CODES: (torch.where(codes == 0, codes, codes ^ 0x80),)}, turn))
        its_turn = strategy._fragment(turn)[1] if hasattr(strategy, "_fragment") else turn

        def opposite(name: str, part: Any) -> tuple[Tensor, ...]:
            x = strategy.compressor.decode([payload[name]], [1.0], part, its_turn)
            return tuple(strategy.compressor.pack(-x, part, its_turn))

        packs = {p.name: opposite(p.name, p.part) for p in strategy.parameters_in_order()}
        return bytes(encode(packs, turn))

    replica.encode = changed


def lying(runner: Runner) -> None:
    """And says of everybody else's offers that they fail."""
    turned(runner)
    link: Any = runner.link
    audit = link.audit
    link.audit = lambda round_, target, _verdict, claim: audit(round_, target, Verdict.FAILED, claim)


def trained(
    folder: Path, config: RunConfig, meddle: Callable[[Runner], object] | None
) -> tuple[list[Result], list[Runner]]:
    """`meddle`: with the last peer, once it is prepared; None: all are honest."""
    with swarm_of(folder, config) as swarm:
        runners = [
            Runner(swarm.link(f"peer-{i}"), **({"on_prepared": meddle} if i == BAD and meddle else {}))
            for i in range(N_PEERS)
        ]
        for runner in runners:
            runner.link.open()
        return run_all(runners), runners


def n_audits(runners: Sequence[Runner], result: str) -> int:
    samples = (
        sample.value
        for runner in runners
        for metric in runner.metrics.registry.collect()
        for sample in metric.samples
        if sample.name == "thinwire_audits_total" and sample.labels["result"] == result
    )
    return int(sum(samples))


@pytest.mark.parametrize(
    ("name", "meddle"),
    [*((name, turned) for name in STRATEGIES), ("decoupled", lying)],
    ids=[*STRATEGIES, "decoupled-and-lies"],
)
def test_a_peer_that_turns_its_payloads_is_condemned(
    tmp_path: Path, name: str, meddle: Callable[[Runner], object]
) -> None:
    results, runners = trained(tmp_path, audited_config(STRATEGIES[name], 24), meddle)
    standing = runners[0].replica.standing
    passed, failed = zip(*(standing.audited(peer) for peer in range(N_PEERS)), strict=True)
    assert standing.is_condemned(BAD)
    assert failed[BAD] >= 2
    assert passed[BAD] == 0
    assert not any(standing.is_condemned(peer) for peer in range(BAD))
    assert sum(failed[:BAD]) == 0
    assert sum(passed[:BAD]) > 0
    assert len({r.fingerprint for r in results}) == 1
    assert n_audits(runners, "failed") >= 2 * 2
    assert n_audits(runners, "passed") > 0


@pytest.mark.parametrize("name", STRATEGIES)
def test_honest_peers_stay(tmp_path: Path, name: str) -> None:
    """And with audits all replicas have the same bits as without."""
    config = audited_config(STRATEGIES[name], 20)
    results, runners = trained(tmp_path / "audited", config, None)
    standing = runners[0].replica.standing
    assert sum(standing.audited(peer)[0] for peer in range(N_PEERS)) > 0
    assert not any(standing.audited(peer)[1] for peer in range(N_PEERS))
    assert n_audits(runners, "failed") == 0
    assert len({r.fingerprint for r in results}) == 1


def of_other_data(runner: Runner) -> None:
    """The node says from now on that its data are its own."""
    link: Any = runner.link
    offer = link.offer
    link.offer = lambda made: offer(made.model_copy(update={"own_data": True}))


def turned_and_of_other_data(runner: Runner) -> None:
    turned(runner)
    of_other_data(runner)


@pytest.mark.parametrize(("name", "n_rounds"), [("decoupled", 24), ("spsa", 40)])
def test_who_undoes_what_the_text_teaches_and_says_it_has_other_data_is_condemned(
    tmp_path: Path, name: str, n_rounds: int
) -> None:
    _, runners = trained(tmp_path, audited_config(STRATEGIES[name], n_rounds), turned_and_of_other_data)
    standing = runners[0].replica.standing
    assert standing.is_condemned(BAD)
    passed, failed = standing.audited(BAD)
    assert failed >= max(2, passed)  # a handful of probes may point the right way by chance
    assert not any(standing.audited(peer)[1] for peer in range(BAD))


def test_who_really_has_other_data_stays(tmp_path: Path) -> None:
    """Source text, where the others have the reference of the language."""
    config = audited_config(STRATEGIES["decoupled"], 16)
    with swarm_of(tmp_path, config) as swarm:
        runners = [
            Runner(swarm.link(f"peer-{i}"), data=Path(pydoc.__file__) if i == BAD else None)
            for i in range(N_PEERS)
        ]
        for runner in runners:
            runner.link.open()
        run_all(runners)
    standing = runners[0].replica.standing
    passed, failed = standing.audited(BAD)
    assert passed > 0
    assert failed == 0
    assert not any(standing.audited(peer)[1] for peer in range(BAD))


@pytest.mark.parametrize("are_drawn", [False, True], ids=["new run", "older run"])
def test_where_all_have_data_of_their_own_nobody_audits(tmp_path: Path, are_drawn: bool) -> None:
    """Such a node does not have the run's text at hand: it reports nothing."""
    text = tmp_path / "text"
    text.write_bytes(bytes(range(32, 122)) * 400)
    config = audited_config(STRATEGIES["decoupled"], 6)
    assert config.audits is not None
    audits = config.audits.model_copy(update={"own_data_auditors": are_drawn})
    config = config.model_copy(update={"audits": audits})
    said: list[Verdict] = []
    with swarm_of(tmp_path / "swarm", config) as swarm:
        runners = [Runner(swarm.link(f"peer-{i}"), data=text) for i in range(N_PEERS)]
        for runner in runners:
            link: Any = runner.link
            link.audit = lambda _round, _target, verdict, _claim: said.append(verdict)
            runner.link.open()
        run_all(runners)
    assert said == []
    assert (n_audits(runners, "skipped") > 0) == are_drawn
