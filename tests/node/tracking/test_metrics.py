"""A node's metrics: what a run leaves in them, and that they do not grow with the swarm."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from tests.support.local_nodes import DECOUPLED, STRATEGIES, config_of, run_all, swarm_of, train
from tests.support.prometheus import check_conventions, samples, series, value
from thinwire.coordinator.protocol.exposition import text_of
from thinwire.coordinator.protocol.figures import ddp_bytes
from thinwire.coordinator.protocol.messages import NodeState, Offer
from thinwire.node.links.base import Traffic
from thinwire.node.links.local import LocalLink, LocalSwarm
from thinwire.node.runner import Runner
from thinwire.node.tracking.device_metrics import DeviceCollector
from thinwire.node.tracking.metrics import NodeMetrics

PHASES = "thinwire_phase_duration_seconds"


def test_what_a_run_leaves_in_them(tmp_path: Path) -> None:
    """One offer of peer-0 comes too late, in a round in which nobody has to evaluate."""
    config = config_of(DECOUPLED, min_peers=3, eval_every=2)

    def late(peer: str, round: int) -> bool:
        return (peer, round) == ("peer-0", 4)

    results, runners, status = train(tmp_path, config, 3, late=late)
    for runner, result in zip(runners, results, strict=True):
        text = runner.metrics.text().decode()
        check_conventions(text)
        assert value(text, "thinwire_round") == 6
        assert value(text, "thinwire_rounds_behind") == 0
        assert value(text, "thinwire_rounds_total", result="counted") == result.counted
        assert value(text, "thinwire_rounds_total", result="missed") == result.missed
        assert value(text, "thinwire_offers_not_counted_total", reason="late") == result.missed
        n_offers = result.counted + result.missed
        assert sum(value(text, "thinwire_rounds_total", result=r) for r in ("counted", "missed", "none")) == 6
        assert value(text, "thinwire_payload_bytes_total") == result.payload_bytes
        assert value(text, "thinwire_samples_total") == 4 * n_offers
        assert value(text, "thinwire_tokens_total") == 4 * 16 * n_offers
        for phase in ("compute", "pack", "exchange"):
            assert value(text, f"{PHASES}_count", phase=phase) == n_offers
            assert value(text, f"{PHASES}_sum", phase=phase) > 0
        assert value(text, f"{PHASES}_count", phase="apply") >= n_offers
        assert value(text, "thinwire_sent_bytes_total", kind="payload") >= result.payload_bytes
        assert value(text, "thinwire_received_bytes_total", kind="ledger") > 0
        assert value(text, "thinwire_fingerprint_checks_total") == 3
        assert value(text, "thinwire_training") == 0  # it has left
    first = runners[0].metrics.text().decode()
    assert value(first, "thinwire_rounds_total", result="missed") >= 1
    evaluated = [value(r.metrics.text().decode(), "thinwire_held_out_loss") for r in runners]
    assert status["held_out"][-1][1] in evaluated
    assert value(first, "thinwire_loss") == pytest.approx(status["loss"], rel=0.3)
    n_last = len(runners[0].replica.weighed)  # who evaluates may miss a round
    ratio = ddp_bytes(n_last, status["n_params"]) / status["payload_bytes_per_peer_round"]
    assert value(first, "thinwire_compression_ratio") == pytest.approx(ratio, rel=0.2)


def test_losses_that_others_claim_stop_nobody(tmp_path: Path) -> None:
    """Sums of them overflow, or are of infinities of both signs."""
    config = config_of(STRATEGIES["spsa"], rounds=2, min_peers=4)
    with swarm_of(tmp_path, config) as swarm:
        runner = Runner(swarm.link("node"))
        runner.link.open()
        claims = dict.fromkeys(("a", "b"), 1.7e308) | {"c": -math.inf}
        others = {name: swarm.link(name) for name in claims}
        for link in others.values():
            link.open()
            link.state(NodeState.TRAINING)
        thread = threading.Thread(target=offer_garbage, args=(swarm, others, claims, 2))
        thread.start()
        (result,) = run_all([runner])
        thread.join()
    assert result.rounds == 2


def offer_garbage(
    swarm: LocalSwarm, links: Mapping[str, LocalLink], losses: Mapping[str, float], n_rounds: int
) -> None:
    """Payloads that nobody can read, round after round."""
    for round_ in range(1, n_rounds + 1):
        for name, link in links.items():
            link.offer(
                Offer(
                    round=round_,
                    n_samples=1,
                    n_tokens=1,
                    loss=losses[name],
                    n_bytes=40,
                    payload=bytes(40),
                    digest=None,
                )
            )
        with swarm.changed:
            swarm.wait_for(lambda after=round_: swarm.service.head >= after)


def test_sixty_peers_leave_no_series_more_than_one(tmp_path: Path) -> None:
    """One node, and 59 peers whose payloads are garbage: they are counted by what is wrong with them."""
    n_peers, n_rounds = 60, 1
    config = config_of(STRATEGIES["spsa"], rounds=n_rounds, min_peers=n_peers)
    config = config.model_copy(update={"limits": config.limits.model_copy(update={"max_peers": n_peers})})
    alone = NodeMetrics().text().decode()
    with swarm_of(tmp_path, config) as swarm:
        runner = Runner(swarm.link("node"))
        others = {f"peer-{i}": swarm.link(f"peer-{i}") for i in range(n_peers - 1)}
        for link in others.values():
            link.open()
            link.state(NodeState.TRAINING)
        losses = dict.fromkeys(others, 1.0)
        thread = threading.Thread(target=offer_garbage, args=(swarm, others, losses, n_rounds))
        thread.start()
        (result,) = run_all([runner])
        thread.join()
        text = runner.metrics.text().decode()
    assert result.rounds == n_rounds
    bad = value(text, "thinwire_bad_payloads_total", reason="magic")
    assert bad >= (n_peers - 2) * n_rounds  # one may be the evaluator, whom nobody waits for
    measured = {name for name, _ in series(text) - series(alone)}
    assert measured <= {
        "thinwire_loss",
        "thinwire_held_out_loss",
        "thinwire_compression_ratio",
        "thinwire_farthest_peer_ratio",
        "thinwire_clipped_payloads_ratio",
    }
    assert series(alone) < series(text)


def test_devices() -> None:
    registry = CollectorRegistry()
    registry.register(DeviceCollector(["cpu"]))
    text = text_of(registry).decode()
    check_conventions(text)
    used = value(text, "thinwire_device_memory_used_bytes", device="cpu")
    assert 10**7 < used < value(text, "thinwire_device_memory_bytes", device="cpu")
    assert len(series(text)) <= 3


def test_what_was_not_measured_yet_is_no_zero() -> None:
    metrics = NodeMetrics()
    assert "thinwire_loss" not in samples(metrics.text().decode())
    metrics.held_out(2.5)
    metrics.proposed(None, 100, 4, 64, 1)  # every batch was dropped
    text = metrics.text().decode()
    assert value(text, "thinwire_held_out_loss") == 2.5
    assert "thinwire_loss" not in samples(text)
    check_conventions(text)


def test_local_work_that_was_not_finite(tmp_path: Path) -> None:
    metrics = NodeMetrics()
    metrics.not_finite({"dropped_batches": 3, "steps": 7})
    metrics.not_finite({"dropped_batches": 1})  # an older state was loaded
    metrics.not_finite({"dropped_batches": 2, "dropped_probes": 4})
    metrics.disk(tmp_path)
    text = metrics.text().decode()
    check_conventions(text)
    assert value(text, "thinwire_not_finite_total", kind="batches") == 4
    assert value(text, "thinwire_not_finite_total", kind="probes") == 4
    assert value(text, "thinwire_disk_free_bytes") > 0
    metrics.disk(tmp_path / "gone")
    assert "thinwire_disk_free_bytes" not in samples(metrics.text().decode())


def test_payloads_that_were_sent_here_and_not_taken() -> None:
    metrics = NodeMetrics()
    for n in (2, 3):
        metrics.traffic(Traffic({}, {}, refused={"sender": n, "unannounced": 0}))
    text = metrics.text().decode()
    check_conventions(text)
    assert value(text, "thinwire_refused_payloads_total", reason="sender") == 3
    assert value(text, "thinwire_refused_payloads_total", reason="unannounced") == 0


def test_without_a_limit_it_is_infinite() -> None:
    metrics = NodeMetrics()
    text = metrics.text().decode()
    assert value(text, "thinwire_upload_limit_bytes_per_second") == float("inf")
    metrics.upload_limit(20_000.0, lambda: 0.25)
    text = metrics.text().decode()
    assert value(text, "thinwire_upload_limit_bytes_per_second") == 20_000
    assert value(text, "thinwire_upload_used_ratio") == 0.25
