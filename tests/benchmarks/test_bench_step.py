"""`bench step`: what a round of real processes takes. Times are no matter of pass or fail."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from thinwire.compression.errors import ConfigError, ThinwireError
from thinwire.node.bench.command import NOT_IN_ALL, run_sizes
from thinwire.node.bench.network.delayed import Delays
from thinwire.node.bench.steps import ddp
from thinwire.node.bench.steps.swarm import BUILD_VARIABLE, Plan, measure_swarm

ROUND_TRIP_S = 0.02
TASK = {"layers": 1, "width": 16, "heads": 1, "context": 8, "batch": 1, "held_out_bytes": 1024}
SECTIONS = {"task": TASK, "network": {"heartbeat_s": 0.05}}
PLAN = Plan(1, SECTIONS, n_windows=2, window_rounds=3, warm_up_rounds=2)


@pytest.mark.swarm
def test_rounds_behind_a_door_take_its_time() -> None:
    """Others are told 32 addresses, too: more than a seat of a committee may have."""
    with Delays(ROUND_TRIP_S / 2) as delays:
        found = measure_swarm(PLAN, delays)
    assert found["round"]["min_s"] >= ROUND_TRIP_S
    assert found["round"]["cpu_s"] >= found["node_cpu"]["min_s"] > 0
    assert found["sent_bytes_per_peer_and_round"] > 0


def test_a_run_that_does_not_begin_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ThinwireError, match=r"task\.layers"):
        measure_swarm(dataclasses.replace(PLAN, sections={"task": {"layers": 0}}))
    main = tmp_path / "thinwire" / "node" / "cli" / "main.py"
    main.parent.mkdir(parents=True)
    main.write_text("raise SystemExit('another build')")
    monkeypatch.setenv(BUILD_VARIABLE, json.dumps([sys.executable, str(tmp_path)]))
    with pytest.raises(ThinwireError, match="another build"):
        measure_swarm(PLAN)


def test_the_same_work_without_thinwire(tmp_path: Path) -> None:
    found = ddp._train(str(tmp_path), TASK, n_peers=1, n_windows=2, window_steps=3, rank=0)
    assert len(found["wall_s"]) == len(found["cpu_s"]) == 2
    assert min(found["wall_s"]) > 0
    assert found["n_params"] == 256 * 16 * 2 + 8 * 16 + 12 * 16**2 + 16 * (4 + 9 + 2)


def test_it_is_asked_for_by_name() -> None:
    assert "step" in NOT_IN_ALL
    with pytest.raises(ConfigError, match="bench link` and `bench step"):
        run_sizes("round", None, 1, link=(1e6, 0.05))
