"""Ranks of a gloo group as processes of their own, for tests: a module's `main` as each of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from tests.support.paths import ROOT
from tests.support.zygote import Forked, zygote


def run_ranks(module: str, world_size: int, *args: str) -> list[Any]:
    """What `python -m MODULE RANK WORLD_SIZE ARGS` prints as JSON, by rank."""
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / f"{rank}.out" for rank in range(world_size)]
        errs = [out.with_suffix(".err") for out in outs]
        processes = [
            _start(module, [str(rank), str(world_size), *args], outs[rank], errs[rank])
            for rank in range(world_size)
        ]
        try:
            codes = [p.wait(100) for p in processes]
        finally:
            for p in processes:
                p.kill()
                p.wait()
        assert codes == [0] * world_size, "\n".join(err.read_text() for err in errs)
        return [json.loads(out.read_text()) for out in outs]


def _start(module: str, args: list[str], out: Path, err: Path) -> subprocess.Popen[bytes] | Forked:
    if (forker := zygote()) is not None:
        return forker.start(args, cwd=ROOT, env=os.environ, out=out, err=err, module=module)
    with out.open("wb") as out_file, err.open("wb") as err_file:
        command = [sys.executable, "-m", module, *args]
        return subprocess.Popen(command, cwd=ROOT, stdout=out_file, stderr=err_file)


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
