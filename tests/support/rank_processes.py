"""Ranks of a gloo group as processes of their own, for tests: a module's `main` as each of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from tests.support.paths import ROOT


def run_ranks(module: str, world_size: int, *args: str) -> list[Any]:
    """What `python -m MODULE RANK WORLD_SIZE ARGS` prints as JSON, by rank."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(rank), str(world_size), *args],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        ended = [p.communicate(timeout=100) for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0] * world_size, "\n".join(err for _, err in ended)
    return [json.loads(out) for out, _ in ended]


def join(meeting: Path, rank: int, world_size: int) -> None:
    """This process is a rank from now on."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)


def leave(result: Any, ends: Path, rank: int, world_size: int) -> NoReturn:
    """Prints the result and ends the process, once the others are there, too: no rank closes its connections
    while another may still be in a collective."""
    json.dump(result, sys.stdout)
    sys.stdout.flush()
    ends.mkdir(exist_ok=True)
    (ends / str(rank)).touch()
    deadline_s = time.monotonic() + 60
    while len(list(ends.iterdir())) < world_size and time.monotonic() < deadline_s:
        time.sleep(0.02)
    os._exit(0)  # gloo's threads sometimes end the interpreter by SIGABRT when they are torn down
