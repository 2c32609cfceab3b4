"""A Ray cluster from the driver's side: getting into one, finding room for peers, leaving nothing behind."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import psutil

from ...compression.errors import ConfigError, ThinwireError, first_line
from ...coordinator.protocol.figures import counted, human_seconds
from ..system.every import Every
from ..system.processes import Children

log = logging.getLogger("thinwire.ray")

WAIT_S: Final = 20.0
"""For room in a cluster that would be large enough if nobody else used it."""

KNOCK_S: Final = 10.0
LOCAL_STORE_BYTES: Final = 2**30
_LONGEST_TEMP_DIR: Final = (
    107
    - len("/thinwire-demo-12345678/ray")
    - len("/session_2026-01-01_00-00-00_123456_4194304/sockets/plasma_store")
)
"""Characters: a Unix socket's path has at most 107."""
_POLL_S: Final = 0.5
_TELL_EVERY_S: Final = 5.0


class NoRoom(ThinwireError):
    """The cluster has no place for the peers that were asked for."""


@dataclass(frozen=True, slots=True)
class PeerGroup:
    """`count` peers of a kind. `cpus`, `gpus`: of each rank; a rank has one GPU, or none."""

    count: int = 1
    ranks: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    accelerator_type: str | None = None

    def __post_init__(self) -> None:
        if self.count < 1 or self.ranks < 1 or self.cpus < 0:
            raise ConfigError("peers: at least 1, with at least 1 rank each, and no fewer than 0 CPUs")
        if self.accelerator_type is not None and not self.gpus:
            raise ConfigError(f"--accelerator-type {self.accelerator_type}: --gpus-per-peer is missing")

    @property
    def bundles(self) -> list[dict[str, float]]:
        """What one peer asks for: a bundle for each rank, all on one machine."""
        bundle = {"CPU": self.cpus} if self.cpus else {}
        if self.gpus:
            bundle["GPU"] = self.gpus
        if self.accelerator_type is not None:
            bundle[f"accelerator_type:{self.accelerator_type}"] = 0.001
        return [bundle or {"CPU": 0.001} for _ in range(self.ranks)]

    def __str__(self) -> str:
        kind = f" of type {self.accelerator_type}" if self.accelerator_type is not None else ""
        gpus = f" and {self.gpus:g} GPU{kind}" if self.gpus else ""
        ranks = f", {self.ranks} times on one machine," if self.ranks > 1 else ""
        peers = counted(self.count, "peer")
        return f"{peers} with {self.cpus:g} CPU{gpus}{ranks} each"


def group_of(
    count: int, gpus: int = 0, cpus: float | None = None, ranks: int | None = None, kind: str | None = None
) -> PeerGroup:
    """As users say it: `gpus` and `cpus` of a whole peer. Ranks: one for each GPU, or one."""
    if gpus < 0 or count < 1:
        raise ConfigError(f"{count} peers with {gpus} GPUs each: at least 1 peer, and no fewer than 0 GPUs")
    if gpus and ranks not in (None, gpus):
        raise ConfigError(f"{ranks} ranks with {gpus} GPUs: a rank has one GPU of its own")
    n = ranks or gpus or 1
    per_rank = 1.0 if cpus is None else cpus / n
    return PeerGroup(count, n, per_rank, 1.0 if gpus else 0.0, kind)


def parse_group(text: str) -> PeerGroup:
    """ "2:gpus=1,type=L4" -> two peers with one L4 each. Raises ConfigError."""
    count, _, rest = text.partition(":")
    pairs = dict(pair.partition("=")[::2] for pair in rest.split(",") if pair)
    unknown = pairs.keys() - {"gpus", "cpus", "ranks", "type"}
    try:
        if unknown:
            raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
        return group_of(
            int(count),
            gpus=int(pairs.get("gpus", 0)),
            cpus=float(pairs["cpus"]) if "cpus" in pairs else None,
            ranks=int(pairs["ranks"]) if "ranks" in pairs else None,
            kind=pairs.get("type"),
        )
    except ValueError as e:
        raise ConfigError(
            f"--peer {text}: {e}. Write it as COUNT:gpus=N,type=NAME,cpus=N,ranks=N, "
            "for example 2:gpus=1,type=L4"
        ) from None


def load_ray() -> Any:
    """The package. Raises ConfigError where it is missing."""
    # By default Ray looks for a cluster that is gone for many minutes.
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "2")
    try:
        import ray
    except ImportError as e:
        raise ConfigError(
            f"Ray is not installed here ({e}): pip install 'thinwire[ray]', "
            "here and on every machine of the cluster"
        ) from e
    return ray


@contextmanager
def connected(address: str | None, *, verbose: bool = False) -> Iterator[Any]:
    """This process is a driver meanwhile; gives the package `ray`.

    `address` None: where RAY_ADDRESS points, else the cluster that `ray start` began on this machine, else
    one that is started here and ends with this process. Who is connected already stays so. Raises
    ConfigError.
    """
    ray = load_ray()
    if address is not None and address.startswith("ray://"):
        raise ConfigError(
            f"--address {address}: thinwire cannot be driven through Ray's client. Submit it as a job: "
            "ray job submit -- thinwire ray RUN.toml ..."
        )
    if ray.is_initialized():
        yield ray
        return
    options = {"log_to_driver": verbose, "logging_level": logging.ERROR}
    handlers = _signal_handlers()
    wanted = address or os.environ.get("RAY_ADDRESS")
    with ExitStack() as stack:
        try:
            if wanted == "local" or not _has_joined(ray, wanted, options):
                log.info("starting a Ray cluster on this machine, for this run")
                # The folder goes with this process, however it ends.
                own = stack.enter_context(Children(_LONGEST_TEMP_DIR))
                with in_own_groups():
                    ray.init(
                        address="local",
                        include_dashboard=False,
                        object_store_memory=LOCAL_STORE_BYTES,
                        _temp_dir=str(own.folder / "ray"),
                        **options,
                    )
                for process in psutil.Process().children(recursive=True):
                    if process.name() != "sh":
                        own.wait_for(process.pid)  # their logs are in it, which they read when they end
            _restore(handlers)  # Ray has its own one for SIGTERM, which leaves everything as it is
            yield ray
        finally:
            ray.shutdown()
            _restore(handlers)


def _has_joined(ray: Any, wanted: str | None, options: dict[str, Any]) -> bool:
    """False: nobody has named a cluster, and there is none here. Raises ConfigError."""
    address = wanted or begun_here()
    if address is None:
        return False
    try:
        _knock(address)
        ray.init(address=address, **options)
    except ConnectionError as e:
        if wanted:
            raise ConfigError(f"there is no Ray cluster at {address}: {first_line(e)}") from e
        return False
    except (RuntimeError, ray.exceptions.RayError) as e:  # another version of Ray or Python, a wrong token
        raise ConfigError(f"the Ray cluster at {address} does not let us in: {e}") from e
    return True


def begun_here() -> str | None:
    """The cluster that `ray start` began on this machine. Ray's own "auto" takes any that it finds, also one
    that another command has for itself and ends with."""
    from ray._private.services import find_bootstrap_address

    found: str | None = find_bootstrap_address(None)
    return found


@contextmanager
def in_own_groups() -> Iterator[None]:
    """Meanwhile Ray starts processes in groups of their own. A signal to all of this command's group, as
    timeout and a shell's kill send it, would end them before the peers have left."""
    from ray._private import services

    before = services.ConsolePopen
    services.ConsolePopen = partial(before, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = before


def _knock(address: str) -> None:
    """Ray itself would try for minutes. Raises ConnectionError."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_S).close()
    except OSError as e:
        raise ConnectionError(str(e)) from e


def find_room(
    groups: Sequence[PeerGroup], name: str, wait_s: float | None, stopped: Callable[[], bool]
) -> list[Any]:
    """A placement group for each peer, all of them there; an empty list if `stopped`.

    `wait_s` None: as long as it takes others to make room, not for the cluster to grow. Raises NoRoom; then
    nothing is taken.
    """
    from ray.util import placement_group, remove_placement_group

    if wait_s is None and not _fits(groups, [node["Resources"] for node in _nodes()]):
        raise NoRoom(_no_room(groups, 0, "It is not large enough"))
    wanted = [group for group in groups for _ in range(group.count)]
    placements = [
        placement_group(group.bundles, strategy="STRICT_PACK", name=f"{name}-peer-{i}")
        for i, group in enumerate(wanted)
    ]
    try:
        n_ready = _wait(placements, WAIT_S if wait_s is None else wait_s, stopped)
        if n_ready < len(placements) and not stopped():
            raise NoRoom(_no_room(groups, n_ready, f"No more was free within {wait_s or WAIT_S:.0f} s"))
    except BaseException:
        for placement in placements:
            remove_placement_group(placement)
        raise
    if n_ready < len(placements):
        for placement in placements:
            remove_placement_group(placement)
        return []
    return placements


def is_placed(placement: Any) -> bool:
    """Whether the placement group is on living machines now, not waiting for one."""
    from ray.util import placement_group_table

    return bool(placement_group_table(placement).get("state") == "CREATED")


def give_back(actors: Sequence[Any], placements: Sequence[Any]) -> None:
    """Kills the actors and removes the placement groups, whatever they are doing. Raises nothing."""
    import ray
    from ray.util import remove_placement_group

    for actor in (actor for actor in actors if actor is not None):
        with suppress(ray.exceptions.RayError, ValueError):
            ray.kill(actor, no_restart=True)
    for placement in placements:
        with suppress(ray.exceptions.RayError, ValueError):
            remove_placement_group(placement)


def _wait(placements: Sequence[Any], wait_s: float, stopped: Callable[[], bool]) -> int:
    """How many of them are placed in the end."""
    began_s, telling = time.monotonic(), Every(_TELL_EVERY_S)
    n_ready = 0
    while n_ready < len(placements) and not stopped():
        left_s = began_s + wait_s - time.monotonic()
        if placements[n_ready].wait(max(0.0, min(_POLL_S, left_s))):
            n_ready += 1
            continue
        if left_s <= 0:
            return sum(is_placed(placement) for placement in placements)
        if telling.is_due():
            lasts = human_seconds(time.monotonic() - began_s)
            log.info(
                "waiting for room in the cluster for %s: %d of %d peers have a place",
                lasts,
                n_ready,
                len(placements),
            )
    return n_ready


def _nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _fits(groups: Sequence[PeerGroup], nodes: Sequence[dict[str, float]]) -> bool:
    """Whether the largest peers first, each on the first machine that has room, all find one."""
    free = [dict(node) for node in nodes]
    for group in sorted(groups, key=lambda g: (-g.gpus * g.ranks, -g.cpus * g.ranks)):
        need: dict[str, float] = {}
        for bundle in group.bundles:
            for key, n in bundle.items():
                need[key] = need.get(key, 0.0) + n
        for _ in range(group.count):
            home = next((n for n in free if all(n.get(k, 0.0) >= v - 1e-9 for k, v in need.items())), None)
            if home is None:
                return False
            for key, n in need.items():
                home[key] -= n
    return True


def _no_room(groups: Sequence[PeerGroup], n_ready: int, why: str) -> str:
    import ray

    there = [f"  {node['NodeManagerAddress']}: {_resources(node['Resources'])}" for node in _nodes()]
    n = sum(group.count for group in groups)
    lines = [
        f"there is no room for {n} peers in the Ray cluster: {n_ready} have a place. {why}.",
        "asked for:",
        *(f"  {group}" for group in groups),
        "there (a peer needs all of its own on one machine):",
        *there,
        f"free now, all machines together: {_resources(ray.available_resources())}",
        "ask for fewer --peers or for less (--cpus-per-peer 0.5, --gpus-per-peer); "
        "where the cluster grows by itself, let it --wait 600 seconds",
    ]
    return "\n".join(lines)


def _resources(resources: dict[str, float]) -> str:
    kinds = [key.partition(":")[2] for key in resources if key.startswith("accelerator_type:")]
    gpus = resources.get("GPU", 0)
    return f"{resources.get('CPU', 0):g} CPU, {gpus:g} GPU" + (f" ({', '.join(kinds)})" if kinds else "")


_HANDLED: Final = (signal.SIGINT, signal.SIGTERM)


def _signal_handlers() -> dict[int, Any]:
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.getsignal(number) for number in _HANDLED}


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        if handler is not None:
            signal.signal(number, handler)


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """Ray prints news of dying workers on standard output, where a command's data belongs: to the log."""

    class Log:
        def write(self, text: str) -> int:
            if text.strip():
                log.debug("%s", text.strip())
            return len(text)

        def flush(self) -> None: ...

        def isatty(self) -> bool:
            return False

    with redirect_stdout(Log()):
        yield
