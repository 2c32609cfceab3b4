"""A short soak: the real command, with a fault every few seconds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(240)]


def test_a_short_soak_ends_without_mismatch_or_hang() -> None:
    command = ["-m", "tests.chaos.soak", "--seconds", "15", "--peers", "3", "--every", "3", "--seed", "1"]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert result["mismatches"] == result["hangs"] == result["ended"] == 0
    assert result["agreed_in_the_end"]
    assert result["faults"] >= 1  # how many fit in is the machine's affair
    assert result["rounds"] > 20
    assert result["goodput_ratio"] is not None  # 0 if the coordinator took all of the time to come back
    assert result["recovery_p50_s"] <= result["recovery_max_s"]
