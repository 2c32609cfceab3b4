"""`thinwire bench peers --light 128,512,1000`: rounds of so many peers that compute nothing, with the real
coordinator in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from math import ceil
from pathlib import Path
from typing import Any, Final

from ....compression.errors import ConfigError
from ....coordinator.protocol.messages import MAX_PEERS
from ...system.output import to_stderr
from .coordinator import SOCKET

PEERS_PER_PROCESS: Final = 256
WARM_UP: Final = 5
TIMEOUT_S: Final = 900.0


def bench_light(counts: Sequence[int], n_rounds: int) -> dict[str, Any]:
    """Of each number of peers. Raises ConfigError."""
    for n in counts:
        if not 1 <= n <= MAX_PEERS:
            raise ConfigError(f"--light {n}: between 1 and {MAX_PEERS} peers")
    found = {}
    for n in counts:
        figures = found[f"light_{n}"] = measure_light(n, n_rounds)
        to_stderr(f"{n} peers: {figures['rounds_in_a_second']:.3g} rounds a second")
    return found


def measure_light(
    n_peers: int, n_rounds: int, coordinator: Sequence[str] = (sys.executable,)
) -> dict[str, Any]:
    """`coordinator`: which Python runs it. CPU times are those of the rounds after the first ones, by round
    and peer: `loop` of the event loop, `other` of the threads that check signatures and write the disk."""
    with tempfile.TemporaryDirectory(prefix="thinwire-light-") as name, ExitStack() as stack:
        folder = Path(name)
        work = [str(n_peers), str(n_rounds), str(WARM_UP)]
        module = "thinwire.node.bench.light"
        serving = _started(stack, [*coordinator, "-m", f"{module}.coordinator", name, *work])
        n_processes = ceil(n_peers / PEERS_PER_PROCESS)
        last = str(WARM_UP + n_rounds)
        peers = []
        for i in range(n_processes):
            share = str(n_peers * (i + 1) // n_processes - n_peers * i // n_processes)
            command = [f"{module}.peers", name, str(folder / SOCKET), share, last, str(i)]
            peers.append(_started(stack, [sys.executable, "-m", *command]))
        found, others = _said(serving), [_said(process) for process in peers]
    return _figures(n_peers, found, others)


def _started(stack: ExitStack, command: Sequence[str]) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


def _said(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    out, _ = process.communicate(timeout=TIMEOUT_S)
    if process.returncode:
        raise ConfigError(f"a process of the measurement ended with code {process.returncode}")
    said: dict[str, Any] = json.loads(out)
    return said


def _figures(n_peers: int, found: dict[str, Any], peers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    n = found["rounds"]
    each_ms = 1e3 / (n * n_peers)
    return {
        "peers": n_peers,
        "assembled_s": found["assembled_s"],
        "rounds": n,
        "rounds_in_a_second": n / found["took_s"],
        "least_counted": found["least_counted"],
        "lost_sessions": sum(peer["lost"] for peer in peers),
        "refused_sessions": sum(peer["refused"] for peer in peers),
        "loop_cpu_ms_per_round_and_peer": found["loop_cpu_s"] * each_ms,
        "other_cpu_ms_per_round_and_peer": (found["cpu_s"] - found["loop_cpu_s"]) * each_ms,
        "peers_cpu_ms_per_round_and_peer": sum(peer["cpu_s"] for peer in peers) * each_ms,
        "sent_bytes_per_round_and_peer": found["sent_bytes"] / (n * n_peers),
        "received_bytes_in_all": sum(peer["received_bytes"] for peer in peers),
        "peak_bytes": found["peak_bytes"],
    }
