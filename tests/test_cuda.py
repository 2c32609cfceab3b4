"""Replicas on a GPU and on a CPU are the same to the last bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_runner import STRATEGIES, config_of, run_all, swarm_of
from thinwire.node.runner import Runner

DILOCO: Mapping[str, Any] = {"name": "diloco", "lr": 3e-3, "inner_steps": 2, "compressor": {"name": "topk"}}
SPSA_GAUSS: Mapping[str, Any] = {**STRATEGIES["spsa"], "noise": "gauss"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: no replica has been on a GPU")
@pytest.mark.parametrize(
    "strategy", [*STRATEGIES.values(), SPSA_GAUSS, DILOCO], ids=[*STRATEGIES, "spsa-gauss", "diloco"]
)
def test_a_gpu_and_a_cpu_have_the_same_replica(tmp_path: Path, strategy: Mapping[str, Any]) -> None:
    compare_devices(tmp_path, strategy, ("cpu", "cuda"), rounds=100)


def test_the_comparison_itself(tmp_path: Path) -> None:
    """What the test above does, where there is no GPU."""
    compare_devices(tmp_path, DILOCO, ("cpu", "cpu"), rounds=4)


def compare_devices(folder: Path, strategy: Mapping[str, Any], devices: tuple[str, str], rounds: int) -> None:
    config = config_of(strategy, min_peers=2, rounds=rounds, eval_every=rounds)
    with swarm_of(folder, config) as swarm:
        runners = [Runner(swarm.link(f"peer-{i}"), device=device) for i, device in enumerate(devices)]
        results = run_all(runners)
        assert swarm.call(lambda service, now_s: service.status(now_s))["mismatches"] == 0
    assert {r.rounds for r in results} == {rounds}
    assert len({r.fingerprint for r in results}) == 1
