"""A Ray cluster for tests: on loopback, without a dashboard, in a folder of its own that goes with it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from thinwire.node.ray_coordinator import CoordinatorActor

NO_NOISE = {"logging_level": "ERROR", "log_to_driver": False}
STORE_BYTES = 80 * 2**20


@contextmanager
def quiet() -> Iterator[None]:
    """Ray's daemons read the environment when they start."""
    before = dict(os.environ)
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_ENABLE_RECORD_ACTOR_TASK_LOGGING="0")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def local_ray(num_cpus: int = 16, **resources: Any) -> Iterator[Path]:
    """Connects this process to a cluster that is made for it; its folder's name is short, for sockets."""
    import ray

    folder = Path(tempfile.mkdtemp(prefix="tw-ray-", dir="/tmp"))
    try:
        with quiet():
            ray.init(
                address="local",
                num_cpus=num_cpus,
                object_store_memory=STORE_BYTES,
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                _temp_dir=str(folder),
                **NO_NOISE,
                **resources,
            )
            yield folder
    finally:
        ray.shutdown()
        shutil.rmtree(folder)


class ManyRuns(CoordinatorActor):
    """One actor for many tests, as a process takes its time to start: each test begins a run of its own."""

    async def begin(self, folder: str) -> str:
        await self._stop()
        self._folder = Path(folder)
        return await self.ticket()

    async def forget_payloads(self) -> None:
        from thinwire.coordinator.messages import MAX_ROUND

        server, board = await self._serving()
        server.blobs.release(counted_to=MAX_ROUND, offered_to=MAX_ROUND)
        board._kept.clear()
