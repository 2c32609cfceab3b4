"""A whole run on a Ray cluster, from a notebook, a Ray job or the command line.

    from thinwire.node.on_ray.train import train

    result = train("run.toml", num_peers=4, gpus_per_peer=1)
    print(result.metrics["held_out_last"], result.weights)

The coordinator and the peers are actors in a namespace of the run, and go with this process. What stays is
the run's state folder: the same call continues the run there, also on another cluster.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ...compression.errors import ConfigError, named_error
from ..system.folder import folder_of_run
from .cluster import PeerGroup, connected, find_room, give_back, group_of
from .peers import LATE_S, LEAVE_S, Peers, ask

if TYPE_CHECKING:
    from ..config import RunConfig
    from ..precision import Precision
    from .peer import PeerSpec

log = logging.getLogger("thinwire.ray")

POLL_S: Final = 0.3


@dataclass(frozen=True, slots=True)
class RayResult:
    """`metrics`: the fields of `thinwire demo --json`. `weights`: the folder with the trained weights and
    what they are; None if the run was stopped before its last round."""

    metrics: dict[str, Any]
    weights: Path | None
    state: Path


def train(
    run: str | Path | Mapping[str, Any] | RunConfig,
    num_peers: int = 2,
    *,
    gpus_per_peer: int = 0,
    cpus_per_peer: float | None = None,
    ranks_per_peer: int | None = None,
    accelerator_type: str | None = None,
    peers: Sequence[PeerGroup] = (),
    address: str | None = None,
    state: str | Path | None = None,
    node_state: str | Path | None = None,
    output: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    task: str | None = None,
    precision: Precision = "auto",
    wait_s: float | None = None,
    restarts: int = 10,
    patience_s: float = 600.0,
    verbose: bool = False,
    on_status: Callable[[Mapping[str, Any], bool], object] = lambda _status, _is_last: None,
    stopped: Callable[[], bool] = lambda: False,
) -> RayResult:
    """Trains until the last round of the run, or until `stopped`. Nothing is left in the cluster.

    `run`: a run file, or what it would say. `peers`: groups of different kinds, instead of `num_peers` of the
    same one. `state`: the coordinator's folder, on this machine (or shared with it); default: NAME-ray
    in the user's state directory.
    `node_state`: the peers' folder on their machines; where machines come and go, a shared one. `output`:
    where the weights go; default: `state`/weights. `task`: MODULE:FUNCTION of a custom task. `wait_s`: for
    room in a cluster that grows by itself. `restarts`: how often a peer's actor is started again; -1: always.
    `on_status` is called several times a second with the run's status.

    Raises ConfigError, NoRoom, and what ends a run everywhere else.
    """
    groups = tuple(peers) or (
        group_of(num_peers, gpus_per_peer, cpus_per_peer, ranks_per_peer, accelerator_type),
    )
    config = _config(run, overrides)
    folder = Path(state or folder_of_run(config.run.name, "ray")).absolute()
    _refuse(config, sum(group.count for group in groups))
    node_folder = None if node_state is None else str(Path(node_state).absolute())
    with connected(address, verbose=verbose), _room(groups, config, wait_s, stopped) as placements:
        if not placements:
            return RayResult({}, None, folder)
        paths = _RunPaths(_prepare(config, task, folder), folder, node_folder)
        driver = _Driver(config, groups, paths, task, precision, restarts, patience_s)
        with driver.started(placements):
            return driver.run(Path(output or folder / "weights"), on_status, stopped)


def _config(
    run: str | Path | Mapping[str, Any] | RunConfig, overrides: Mapping[str, Any] | None
) -> RunConfig:
    from ..config import RunConfig, load_config

    if isinstance(run, str | Path):
        return load_config(Path(run), overrides)
    sections = run.model_dump() if isinstance(run, RunConfig) else run
    return load_config(None, {**sections, **(overrides or {})})


def _refuse(config: RunConfig, n_peers: int) -> None:
    """Raises ConfigError for what could never begin."""
    if n_peers < config.run.min_peers:
        raise ConfigError(
            f"the run's first round waits for {config.run.min_peers} peers, and there are to be {n_peers}: "
            f"ask for more --peers, or --set run.min_peers={n_peers}"
        )
    if n_peers > config.limits.max_peers:
        raise ConfigError(f"--peers {n_peers}: the run's limits.max_peers is {config.limits.max_peers}")


@contextmanager
def _room(
    groups: Sequence[PeerGroup], config: RunConfig, wait_s: float | None, stopped: Callable[[], bool]
) -> Iterator[list[Any]]:
    """A placement group for each peer, given back at the end; none if `stopped`. Raises NoRoom."""
    placements = find_room(groups, f"thinwire-{config.run.name}", wait_s, stopped)
    try:
        yield placements
    finally:
        give_back([], placements)


def _prepare(config: RunConfig, import_path: str | None, folder: Path) -> str:
    """Makes the run in an empty folder, or checks the one that is there; returns its namespace. Leaves the
    folder unlocked. Raises ConfigError or LedgerCorrupt."""
    from ...coordinator.state import StateDir
    from ..cli.coordinator import open_server
    from ..founding.here import Here
    from ..tasks.registry import make_task

    with StateDir(folder) as state:
        server = open_server(state, config, Here(make_task(config.task, import_path, None)))
        server.ledger.close()
        return f"thinwire-{server.ledger.run_id.hex()[:16]}"


@dataclass(frozen=True, slots=True)
class _RunPaths:
    """Where things are: actors, the coordinator's folder, the peers' folders."""

    namespace: str
    folder: Path
    node_folder: str | None


@dataclass(slots=True)
class _Faults:
    """Peers that went and came back, as the status shows it."""

    seen: dict[str, str] = field(default_factory=dict)
    found: list[dict[str, Any]] = field(default_factory=list)

    def look(self, status: Mapping[str, Any]) -> None:
        """The next status of the run."""
        now = status["round"]
        for peer in status["peers"]:
            name, state = peer["peer_id"], peer["state"]
            before, self.seen[name] = self.seen.get(name), state
            fault = next((f for f in self.found if f["peer"] == name and f["back_at_round"] is None), None)
            if fault is None and state == "gone" and before in ("joining", "training"):
                self.found.append(
                    {
                        "node": name,
                        "peer": name,
                        "signal": None,
                        "killed_at_round": now,
                        "restarted_at_round": None,
                        "back_at_round": None,
                    }
                )
            elif fault is not None and state in ("joining", "training"):
                if fault["restarted_at_round"] is None:
                    fault["restarted_at_round"] = now
                if state == "training":
                    fault["back_at_round"] = now

    def forget_those_that_left(self, names: Sequence[str]) -> None:
        """Whoever ended properly is gone for good, and that is no fault."""
        self.found = [f for f in self.found if f["restarted_at_round"] or f["peer"] not in names]


class _Driver:
    """Starts the actors of one run, watches them, and ends them."""

    def __init__(
        self,
        config: RunConfig,
        groups: Sequence[PeerGroup],
        paths: _RunPaths,
        import_path: str | None,
        precision: Precision,
        restarts: int,
        patience_s: float,
    ) -> None:
        self._config, self._groups, self._paths = config, groups, paths
        self._import_path, self._precision = import_path, precision
        self._patience_s = patience_s
        self._coordinator: Any = None
        self._peers = Peers(restarts)
        self._faults = _Faults()

    # ----------------------------------------------------------------------------------- begin and end

    @contextmanager
    def started(self, placements: Sequence[Any]) -> Iterator[None]:
        """All actors are there meanwhile, and none of them afterwards."""
        try:
            self._start_coordinator()
            self._start_peers(placements)
            yield
        finally:
            self._peers.end()
            give_back([self._coordinator], [])

    def _start_coordinator(self) -> None:
        """On this machine, whose folder it serves; it needs no CPU that peers could have."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from .coordinator import CoordinatorActor
        from .transport import COORDINATOR

        here = ray.get_runtime_context().get_node_id()
        self._coordinator = (
            ray.remote(CoordinatorActor)
            .options(
                name=COORDINATOR,
                namespace=self._paths.namespace,
                num_cpus=0,
                max_restarts=-1,
                max_concurrency=100_000,  # every node has some calls that wait
                scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
            )
            .remote(str(self._paths.folder), self._paths.namespace)
        )
        self._status()

    def _start_peers(self, placements: Sequence[Any]) -> None:
        ticket = ask(self._coordinator.ticket)
        self._peers.start(self._groups, placements, lambda name, group: self._spec(name, group, ticket))

    def _spec(self, name: str, group: PeerGroup, ticket: str) -> PeerSpec:
        from .peer import PeerSpec

        return PeerSpec(
            name=name,
            namespace=self._paths.namespace,
            ticket=ticket,
            ranks=group.ranks,
            cpus=group.cpus,
            gpus=group.gpus,
            folder=self._paths.node_folder,
            import_path=self._import_path,
            precision=self._precision,
            patience_s=self._patience_s,
        )

    # --------------------------------------------------------------------------------------- the run

    def run(
        self,
        output: Path,
        on_status: Callable[[Mapping[str, Any], bool], object],
        stopped: Callable[[], bool],
    ) -> RayResult:
        """Until the last round is over, or `stopped`; weights go to `output`. Raises what ended the run."""
        end_s: float | None = None
        while True:
            if stopped():
                self._leave()
                return RayResult({}, None, self._paths.folder)
            status = self._status()
            self._peers.collect()
            is_over = status["acknowledged"] or status["state"] == "finished"
            if not is_over:
                self._faults.look(status)
                self._refuse_to_hang(status)
            elif end_s is None:
                end_s = time.monotonic() + LATE_S
            is_last = end_s is not None and self._peers.are_done(time.monotonic() > end_s)
            on_status(status, is_last)
            if is_last:
                break
            time.sleep(POLL_S)
        return self._result(output)

    def _refuse_to_hang(self, status: Mapping[str, Any]) -> None:
        """Raises what a peer has met when there are too few left to go on."""
        needed = self._config.run.min_peers if status["round"] == 0 else 1
        if self._peers.n_left < needed and self._peers.first_error is not None:
            raise self._peers.first_error

    def _result(self, output: Path) -> RayResult:
        from ..cli.view import figures

        self._peers.fetch(output)
        end = self._status()
        late = [peer.name for peer in self._peers.all if peer.result is None]
        self._faults.forget_those_that_left([peer.name for peer in self._peers.done])
        metrics = figures(
            end, end["strategy"], [peer.ranks for peer in self._peers.all], self._faults.found, late
        )
        self._peers.clean()
        ask(self._coordinator.stop)
        return RayResult(metrics, output, self._paths.folder)

    def _leave(self) -> None:
        """All peers leave the swarm, then the coordinator closes its folder."""
        import ray

        self._peers.leave()
        try:
            ray.get(self._coordinator.stop.remote(), timeout=LEAVE_S)
        except ray.exceptions.RayError as e:
            log.warning("the coordinator did not end by itself: %s", type(e).__name__)
        log.info("the run is kept in %s: the same command continues it", self._paths.folder)

    def _status(self) -> dict[str, Any]:
        """The coordinator's, see `CoordinatorActor.status`. Raises what has ended the run."""
        status: dict[str, Any] = ask(self._coordinator.status)
        if status["failed"] is not None:
            kind, text = status["failed"]
            raise named_error(kind, text)
        return {**status, "strategy": self._config.strategy["name"]}
