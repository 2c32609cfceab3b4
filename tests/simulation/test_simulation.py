"""Deterministic simulation: the real service under generated schedules of crashes, cuts, delays and resends.

Nothing sleeps and no thread or socket takes part: a failure is found again at every run, and comes out as a
script. THINWIRE_SIMULATION=5000 draws as many other and longer schedules, however long it takes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT

TIMEOUT_S = 0 if "THINWIRE_SIMULATION" in os.environ else 300


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S)
def test_swarm_survives() -> None:
    """In an interpreter of its own: which schedules are drawn depends on the modules that are loaded."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="tw-", dir=memory if memory.is_dir() else None) as folder:
        done = subprocess.run(
            [sys.executable, "-m", "tests.simulation.swarm"],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": folder},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S - 20 if TIMEOUT_S else None,
            check=False,
        )
    assert done.returncode == 0, done.stdout
