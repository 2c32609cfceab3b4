"""Ranks of gloo groups as processes, for tests: they are forked of one that has loaded what they need.

A module of ranks has `load()`, what all are given, and `work(loaded, rank, world_size, folder)`, what each of
them does: its result as JSON holds it. `python -m tests.support.rank_processes MODULE FOLDER SIZE...` is the
process that they are forked of.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from tests.support.paths import ROOT
from tests.support.zygote import Forked, zygote


def run_ranks(module: str, world_sizes: Sequence[int], folder: Path) -> dict[int, list[Any]]:
    """What `work` of the module has come to, by size of the group and by rank; one group after another. The
    rank that is alone is in none."""
    err = folder / "ranks.err"
    leader = _start([module, str(folder), *map(str, world_sizes)], folder / "ranks.out", err)
    try:
        code = leader.wait(200)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(leader.pid, signal.SIGKILL)  # its ranks, if one has failed
        leader.wait()
    assert code == 0, err.read_text()
    return {
        size: [json.loads(_result(folder, size, rank).read_text()) for rank in range(size)]
        for size in world_sizes
    }


def _start(args: list[str], out: Path, err: Path) -> subprocess.Popen[bytes] | Forked:
    module = "tests.support.rank_processes"
    if (forker := zygote()) is not None:
        return forker.start(args, cwd=ROOT, env=os.environ, out=out, err=err, module=module, session=True)
    with out.open("wb") as out_file, err.open("wb") as err_file:
        command = [sys.executable, "-m", module, *args]
        return subprocess.Popen(command, cwd=ROOT, stdout=out_file, stderr=err_file, start_new_session=True)


def _result(folder: Path, world_size: int, rank: int) -> Path:
    return folder / f"rank-{rank}-of-{world_size}.json"


# ---------------------------------------------------------------------------------- within that process


def main(name: str, folder: Path, world_sizes: Sequence[int]) -> None:
    torch.set_num_threads(1)  # threads do not outlive a fork
    module = import_module(name)
    loaded = module.load()
    gc.freeze()
    for size in world_sizes:
        for rank in range(size):
            if os.fork() == 0:
                _be_rank(module, loaded, rank, size, folder)
        for _ in range(size):
            if os.wait()[1]:
                sys.exit(1)


def _be_rank(module: ModuleType, loaded: Any, rank: int, world_size: int, folder: Path) -> NoReturn:
    """Ends once the others are there, too: no rank closes its connections while another may still be in a
    collective."""
    try:
        if world_size > 1:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            meeting = f"file://{folder}/store-{world_size}"
            dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
        found = json.dumps(module.work(loaded, rank, world_size, folder))
    except BaseException:  # noqa: BLE001 - as an interpreter ends, whatever it was
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    _result(folder, world_size, rank).write_text(found)
    deadline_s = time.monotonic() + 60
    while not all(_result(folder, world_size, r).exists() for r in range(world_size)):
        if time.monotonic() > deadline_s:
            os._exit(1)
        time.sleep(0.02)
    os._exit(0)  # gloo's threads sometimes end the interpreter by SIGABRT when they are torn down


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), [int(size) for size in sys.argv[3:]])
