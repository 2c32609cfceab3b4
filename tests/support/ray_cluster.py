"""Ray clusters for tests: on loopback, without a dashboard, in a folder of their own that goes with them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from thinwire.coordinator.protocol.messages import MAX_ROUND
from thinwire.node.on_ray.coordinator import CoordinatorActor
from thinwire.node.system.processes import Children

STORE_BYTES = 80 * 2**20
NODE = {
    "object_store_memory": STORE_BYTES,
    "include_dashboard": False,
    "node_ip_address": "127.0.0.1",
}


@contextmanager
def own_folder() -> Iterator[Path]:
    """Whatever Ray writes goes there, and it goes with this process, however that ends. Ray's processes are
    gone in the end."""
    with Children() as own:
        yield from _used(own.folder)


def _used(folder: Path) -> Iterator[Path]:
    before = dict(os.environ)
    os.environ.update(
        RAY_TMPDIR=str(folder),
        RAY_USAGE_STATS_ENABLED="0",
        RAY_AUTH_MODE="disabled",  # else a token is written into the user's home
    )
    try:
        yield folder
    finally:
        os.environ.clear()
        os.environ.update(before)
        left = [p for p in psutil.Process().children(recursive=True) if _is_of_ray(p, folder)]
        psutil.wait_procs(left, timeout=20)


def _is_of_ray(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.name() != "sh" and any(str(folder) in word for word in process.cmdline())
    except psutil.Error:
        return False


@contextmanager
def on_loopback() -> Iterator[None]:
    """As on systems where Ray has no clusters: else it takes this machine's address for 127.0.0.1."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray._private.ray_constants.ENABLE_RAY_CLUSTER", False)
        yield


@contextmanager
def local_ray(num_cpus: int) -> Iterator[None]:
    """This process is the driver of a cluster of one node."""
    import ray

    with own_folder() as folder, on_loopback():
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                object_store_memory=STORE_BYTES,
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                _temp_dir=str(folder),
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            yield
        finally:
            ray.shutdown()


@contextmanager
def many_nodes(head_cpus: int) -> Iterator[Any]:
    """A `ray.cluster_utils.Cluster`, to which nodes can be added; this process is a driver on its head."""
    import ray
    from ray.cluster_utils import Cluster

    with own_folder(), on_loopback():
        cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": head_cpus})
        try:
            ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


class ManyRuns(CoordinatorActor):
    """One actor for many tests, as a process takes its time to start: each test begins a run of its own."""

    async def begin(self, folder: str) -> str:
        await self._stop()
        self._folder = Path(folder)
        return await self.ticket()

    async def forget_payloads(self) -> None:
        server, transport = await self._serving()
        server.blobs.release(counted_to=MAX_ROUND, offered_to=MAX_ROUND)
        transport._kept.clear()
