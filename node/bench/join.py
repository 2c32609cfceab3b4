"""`thinwire bench join`: from the start of a process to its first offer, or to a coordinator's ticket, and
the memory that it has then; catching up with a run under way.

A run of SPSA on a small model: the time is that of Python, torch, libp2p and the coordinator.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Final, Self

from ...compression.errors import ThinwireError
from ...coordinator.protocol.identity import load_or_create, peer_id_of
from ...coordinator.server_thread import ServerThread
from ..config import RunConfig, load_config
from ..doctor.kernel_cache import is_compiled
from ..genesis import Genesis, make_genesis
from ..links.local import local_swarm
from ..replica import build_replica
from ..run_files.toml import toml_of
from ..runner import Runner
from ..system.processes import Child, Children
from ..tasks.registry import make_task

ROUNDS: Final = 100
TIMEOUT_S: Final = 120.0
_TASK: Final = {"layers": 2, "width": 64, "heads": 2, "context": 32, "batch": 4, "held_out_bytes": 2048}


def bench_join(n_params: int, n_repeats: int, device: str) -> dict[str, Any]:
    """Processes with caches that are warm: one that compiles kernels does not count."""
    del n_params, device
    with TemporaryDirectory(prefix="thinwire-bench-") as folder:
        nodes = started_nodes(Path(folder) / "processes", n_repeats)
        new, again = started_coordinators(Path(folder) / "coordinators", n_repeats)
        joined = [caught_up(Path(folder) / f"run-{i}") for i in range(n_repeats)]
    return {
        "process_to_first_offer": _of_starts(nodes),
        "new_coordinator_to_ticket": _of_starts(new),
        "coordinator_again_to_ticket": _of_starts(again),
        "rounds_behind": ROUNDS,
        "model_n_bytes": joined[0].n_bytes,
        "open_and_download": _spread([j.download_s for j in joined]),
        "catch_up": _spread([j.catch_up_s for j in joined]),
        "catch_up_per_round_s": median(j.catch_up_s for j in joined) / ROUNDS,
    }


@dataclass(frozen=True, slots=True)
class Start:
    """Of a process, until it had done what was waited for; CPU time and memory without libp2p's daemon."""

    wall_s: float
    cpu_s: float
    resident_bytes: int

    @classmethod
    def of(cls, child: Child, since_s: float) -> Self:
        import psutil

        wall_s, process = time.perf_counter() - since_s, psutil.Process(child.process.pid)
        cpu_s = sum(process.cpu_times()[:4])  # of children that are gone, too: the one that founds a run
        return cls(wall_s, cpu_s, process.memory_info().rss)


def started_nodes(folder: Path, n_repeats: int) -> list[Start]:
    """From the start of `thinwire join` until its first offer counts, at once: it is the only peer. Each
    node has a run of its own."""
    starts, n_warm_up = [], 0 if is_compiled() else 1
    for i in range(n_warm_up + n_repeats):
        path = folder / str(i)
        path.mkdir(parents=True)
        genesis = _genesis(path, rounds=10**6)
        with ServerThread(path, genesis.body, genesis.blobs) as server, Children() as children:
            args = ["join", "-", "--device", "cpu", "--threads", "1", "--host", "127.0.0.1"]
            args += ["--state", str(path / "node")]
            start_s = time.perf_counter()
            child = children.start("node", path / "log", args, line=server.ticket.line())
            while server.status()["round"] < 1:
                if child.process.poll() is not None or time.perf_counter() - start_s > TIMEOUT_S:
                    raise ThinwireError(f"the node made no offer; its log ends with:\n{child.log_tail()}")
                time.sleep(0.005)
            starts.append(Start.of(child, start_s))
    return starts[n_warm_up:]


def started_coordinators(folder: Path, n_repeats: int) -> tuple[list[Start], list[Start]]:
    """From the start of `thinwire coordinator` to its ticket, of new runs; of the same ones, once more."""
    starts: tuple[list[Start], list[Start]] = [], []
    for i in range(n_repeats):
        path = folder / str(i)
        path.mkdir(parents=True)
        run_file = path / "run.toml"
        run_file.write_text(toml_of({"run": {"rounds": 100}, "task": _TASK}))
        for found in starts:
            with Children() as children:
                args = ["coordinator", str(run_file), "--state", str(path / "state"), "--host", "127.0.0.1"]
                start_s = time.perf_counter()
                child = children.start("coordinator", path / "log", args, output=True)
                if not child.first_line(TIMEOUT_S):
                    raise ThinwireError(f"no ticket; the log of it ends with:\n{child.log_tail()}")
                found.append(Start.of(child, start_s))
    return starts


@dataclass(frozen=True, slots=True)
class Joined:
    """A replica that came late to a run of `ROUNDS` rounds."""

    n_bytes: int
    download_s: float
    catch_up_s: float


def caught_up(folder: Path) -> Joined:
    """In this process, without a network: base weights fetched and checked, then the ledger applied."""
    folder.mkdir()
    genesis = _genesis(folder, rounds=ROUNDS, base=_base(folder))
    key = load_or_create(folder / "key")
    (folder / "swarm").mkdir()
    with local_swarm(folder / "swarm", genesis.body, key, blobs=genesis.blobs) as swarm:
        Runner(swarm.link("first")).run()
        link = swarm.link("late")
        start_s = time.perf_counter()
        link.open()
        body, base = genesis.body, genesis.body.base
        assert base is not None
        replica = build_replica(link.run_id, body, make_task(_config(ROUNDS).task, None, None))
        replica.begin(link.fetch(base.digest, base.n_bytes))
        began_s = time.perf_counter()
        for commit in link.commits(0):
            replica.apply(commit, link.payload, offered=False)
            if replica.round == ROUNDS:
                break
        end_s = time.perf_counter()
        link.close()
    return Joined(base.n_bytes, began_s - start_s, end_s - began_s)


def _config(rounds: int, base: Path | None = None) -> RunConfig:
    run = {"rounds": rounds, "min_peers": 1, "eval_every": rounds + 1, "base": base and str(base)}
    flat: dict[str, Any] = {f"run.{key}": value for key, value in run.items() if value is not None}
    flat |= {f"task.{key}": value for key, value in _TASK.items()} | {"policy.name": "all"}
    strategy = {"name": "spsa", "lr": 1e-3, "eps": 1e-3, "probes": 4}
    return load_config(None, flat, environ={}).model_copy(update={"strategy": strategy})


def _genesis(folder: Path, rounds: int, base: Path | None = None) -> Genesis:
    config = _config(rounds, base)
    key = load_or_create(folder / "key")
    return make_genesis(config, make_task(config.task, None, None), peer_id_of(key.public_key()), 1)


def _base(folder: Path) -> Path:
    """Weights of the run's own initialisation, as a file."""
    (folder / "base").mkdir()
    genesis = _genesis(folder / "base", rounds=1)
    replica = build_replica(bytes(32), genesis.body, make_task(_config(1).task, None, None))
    replica.begin(None)
    path = folder / "base.safetensors"
    replica.save_weights(path)
    return path


def _of_starts(starts: Sequence[Start]) -> dict[str, float]:
    return {
        **_spread([start.wall_s for start in starts]),
        "cpu_s": median(start.cpu_s for start in starts),
        "resident_bytes": median(start.resident_bytes for start in starts),
    }


def _spread(seconds: list[float]) -> dict[str, float]:
    return {"median_s": median(seconds), "min_s": min(seconds), "max_s": max(seconds)}
