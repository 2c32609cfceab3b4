"""The same work under torch's DistributedDataParallel: the task's model and batches, AdamW, gloo, a process
for each peer with one thread."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Final

from ....compression.errors import ThinwireError
from ...system.output import to_stdout
from .swarm import WARM_UP_ROUNDS, spread

TIMEOUT_S: Final = 600.0


def measure_ddp(task: dict[str, Any], n_peers: int, n_windows: int, window_steps: int) -> dict[str, Any]:
    """Of a step: wall time, CPU time of each process, and the bytes that it sends. Raises ThinwireError."""
    with tempfile.TemporaryDirectory(prefix="thinwire-bench-") as folder:
        told = {"folder": folder, "task": task, "n_peers": n_peers}
        told |= {"n_windows": n_windows, "window_steps": window_steps}
        children = [
            subprocess.Popen(
                [sys.executable, "-m", __name__, json.dumps({**told, "rank": rank})],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for rank in range(n_peers)
        ]
        try:
            printed = [child.communicate(timeout=TIMEOUT_S)[0] for child in children]
        finally:
            for child in children:
                child.kill()
                child.wait()
    if any(child.returncode for child in children):
        raise ThinwireError("a process of torch's DistributedDataParallel has failed")
    found = [json.loads(text) for text in printed]
    cpu_s = [sum(each) / n_peers for each in zip(*(one["cpu_s"] for one in found), strict=True)]
    return {
        "step": {**spread(found[0]["wall_s"]), "cpu_s": median(cpu_s)},
        "sent_bytes_per_peer_and_round": 2 * (n_peers - 1) / n_peers * 4 * found[0]["n_params"],  # a ring
    }


def _train(
    folder: str, task: dict[str, Any], n_peers: int, n_windows: int, window_steps: int, rank: int
) -> dict[str, Any]:
    """In one process; of a step, in each window."""
    import torch
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    from ...config import Task
    from ...tasks.text import TextTask

    torch.set_num_threads(1)
    torch.manual_seed(1)
    text = TextTask(Task(**task), None)
    text.load(None, text.held_out())
    store = distributed.FileStore(str(Path(folder) / "store"), n_peers)  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=n_peers)
    model = DistributedDataParallel(text.model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    samples = []
    for step in range(1, WARM_UP_ROUNDS + n_windows * window_steps + 1):
        optimizer.zero_grad()
        loss = text.draw(model, (rank << 32) + step)()
        torch.autograd.backward(loss)
        optimizer.step()
        if step >= WARM_UP_ROUNDS and (step - WARM_UP_ROUNDS) % window_steps == 0:
            samples.append((time.monotonic(), time.process_time()))
    distributed.destroy_process_group()
    wall_s, cpu_s = (
        [(b - a) / window_steps for a, b in pairwise(times)] for times in zip(*samples, strict=True)
    )
    return {"wall_s": wall_s, "cpu_s": cpu_s, "n_params": sum(p.numel() for p in model.parameters())}


if __name__ == "__main__":
    to_stdout(json.dumps(_train(**json.loads(sys.argv[1]))))
