"""`thinwire coordinator` serves without torch, numba and hivemind: it runs on a machine of 512 MB."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
[run]
rounds = 9
[task]
layers = 1
width = 16
heads = 2
context = 16
held_out_bytes = 1024
[strategy]
name = "spsa"
lr = 1e-3
"""

# Serves until its ticket is there, and says then what it has loaded and how large it is.
SERVES = """
import os, resource, signal, sys, threading, time
from pathlib import Path
from thinwire.node.cli.main import main

def look():
    while not ticket.exists():
        time.sleep(0.02)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    heavy = {"torch", "numba", "scipy", "hivemind", "google.protobuf", "numpy", "triton", "ray"}
    print(sorted(heavy & set(sys.modules)), pages * resource.getpagesize(), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)

run, state, ticket = map(Path, sys.argv[1:])
threading.Thread(target=look, daemon=True).start()
where = ["--host", "127.0.0.1", "--http", "127.0.0.1:0", "--ticket-file", str(ticket), "--state", str(state)]
sys.exit(main(["coordinator", str(run), *where]))
"""


@pytest.mark.swarm
def test_a_coordinator_founds_a_run_and_serves_it_without_torch(tmp_path: Path) -> None:
    run, state = tmp_path / "run.toml", tmp_path / "state"
    run.write_text(RUN)
    for start in ("first", "again"):
        command = [sys.executable, "-c", SERVES, run, state, tmp_path / f"ticket-{start}"]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        said = done.stdout.splitlines()
        loaded, n_bytes = next(line for line in said if line.startswith("[")).rsplit(" ", 1)
        assert (loaded, done.returncode) == ("[]", 143), done.stderr
        assert int(n_bytes) < 110 * 10**6
