"""Whole runs on a Ray cluster of this machine: the replicas are the same as anywhere else, whatever dies."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import tyro
from safetensors import safe_open

from tests.support.paths import ROOT
from tests.support.ray_cluster import NODE, many_nodes
from thinwire.compression.errors import ConfigError, SwarmUnreachable
from thinwire.coordinator.blobs import BlobStore
from thinwire.coordinator.ledger import Ledger
from thinwire.coordinator.protocol.identity import load_or_create, new_key, peer_id_of
from thinwire.coordinator.protocol.messages import GenesisBody, OfferEntry
from thinwire.coordinator.protocol.ticket import Ticket
from thinwire.coordinator.server import CoordinatorServer
from thinwire.coordinator.server_thread import ServerThread
from thinwire.coordinator.state import StateDir
from thinwire.node.bench.ray import measure_rounds
from thinwire.node.bench.round import PAYLOAD_BYTES
from thinwire.node.cli.coordinator import open_server
from thinwire.node.cli.main import Command
from thinwire.node.cli.swarm_commands import Ray
from thinwire.node.config import load_config
from thinwire.node.founding.here import Here
from thinwire.node.links.hivemind import HivemindLink
from thinwire.node.links.local import local_swarm
from thinwire.node.on_ray.cluster import NoRoom, PeerGroup, begun_here, in_own_groups, parse_group
from thinwire.node.runner import Runner
from thinwire.node.tasks.registry import make_task

pytestmark = pytest.mark.usefixtures("one_thread")  # local work is the same to the bit then

ROUNDS = 12
DECOUPLED = {
    "name": "decoupled",
    "lr": 1e-2,
    "beta": 0.9,
    # Payloads are larger than what travels inside of a commit, so that they take the way of blobs.
    "compressor": {"name": "dense", "bits": 8},
}
SPSA = {"name": "spsa", "lr": 1e-3, "eps": 1e-3, "probes": 4}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head with room for five CPUs' worth of actors."""
    pytest.importorskip("ray", reason="Ray is an extra")
    with many_nodes(head_cpus=5) as cluster:
        yield cluster


def run_of(strategy: Mapping[str, Any], **run: Any) -> dict[str, Any]:
    return {
        "run": {"name": "test", "rounds": ROUNDS, "min_peers": 2, "eval_every": 1000, **run},
        "task": {"layers": 1, "width": 16, "heads": 2, "context": 16, "batch": 2, "held_out_bytes": 2048},
        "strategy": dict(strategy),
        "schedule": {"name": "linear", "warmup_rounds": 2, "final_factor": 0.5},
        "policy": {"name": "all"},
        "network": {"heartbeat_s": 0.5},
    }


def train_on_ray(tmp_path: Path, run: Mapping[str, Any], **options: Any) -> Any:
    from thinwire.node.on_ray.train import train

    return train(run, state=tmp_path / "state", node_state=tmp_path / "nodes", **options)


def is_empty() -> bool:
    """Whether there is no actor and no placement group in the cluster."""
    import ray
    from ray.util import list_named_actors, placement_group_table

    groups = placement_group_table().values()
    everything_free = ray.available_resources().get("CPU", 0) == ray.cluster_resources().get("CPU", 0)
    return (
        not list_named_actors(all_namespaces=True)
        and all(group["state"] == "REMOVED" for group in groups)
        and everything_free
    )


def assert_left_empty() -> None:
    """Ray gives resources back a moment after it was told to."""
    event = threading.Event()
    for _ in range(600):
        if is_empty():
            return
        event.wait(0.05)
    pytest.fail("something is left in the cluster")


def what_counted(path: Path) -> tuple[GenesisBody, dict[int, str], list[list[tuple[int, OfferEntry]]]]:
    """Record 0, the peers by index, and every round's offers, as a ledger has them."""
    ledger = Ledger.open(path / "ledger.db", load_or_create(path / "key").public_key())
    try:
        offers = [[(o.peer, o) for o in c.body.offers] for c in ledger.commits(0, 1000)]
        return ledger.genesis, ledger.peers(), offers
    finally:
        ledger.close()


def train_locally(folder: Path, state: Path) -> tuple[set[str], list[list[tuple[int, OfferEntry]]]]:
    """The run of that state folder once more, as threads: fingerprints and offers."""
    genesis, peers, _ = what_counted(state)
    key = load_or_create(state / "key")
    blobs = BlobStore(state / "blobs")
    assert genesis.held_out is not None
    folder.mkdir()
    with local_swarm(folder, genesis, key, blobs=[blobs.read(genesis.held_out.digest)]) as swarm:
        runners = [Runner(swarm.link(name)) for _, name in sorted(peers.items())]
        for runner in runners:  # admitted in the same order
            runner.link.open()
        threads = [threading.Thread(target=runner.run, daemon=True) for runner in runners]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(100)
            assert not thread.is_alive()
        fingerprints = {runner.replica.fingerprint().hex() for runner in runners}
        return fingerprints, [[(o.peer, o) for o in c.body.offers] for c in swarm.service.commits(0, 1000)]


@pytest.mark.swarm
@pytest.mark.parametrize("strategy", [DECOUPLED, SPSA], ids=["decoupled", "spsa"])
def test_actors_train_as_threads_do(tmp_path: Path, cluster: Any, strategy: Mapping[str, Any]) -> None:
    seen: list[int] = []
    result = train_on_ray(
        tmp_path, run_of(strategy), num_peers=2, on_status=lambda s, _last: seen.append(s["round"])
    )
    metrics = result.metrics
    fingerprints = set(metrics["fingerprints"].values())
    assert metrics["rounds"] == ROUNDS == seen[-1]
    assert metrics["strategy"] == strategy["name"]
    assert metrics["ranks"] == [1, 1]
    assert metrics["faults"] == []
    assert sorted(metrics["fingerprints"]) == [f"peer-{i}" for i in range(2)]
    assert len(fingerprints) == 1
    _, _, offers = what_counted(tmp_path / "state")
    is_inline = strategy["name"] == "spsa"
    assert all((o.payload is not None) == is_inline for round_ in offers for _, o in round_)

    assert train_locally(tmp_path / "local", tmp_path / "state") == (fingerprints, offers)

    with safe_open(result.weights / "model.safetensors", "pt") as weights:
        assert weights.keys()
    assert (result.weights / "config.json").exists()
    assert list((tmp_path / "nodes").iterdir()) == []
    assert_left_empty()


@pytest.mark.swarm
@pytest.mark.timeout(240)
def test_actors_join_a_swarm_beside_a_volunteer(
    tmp_path: Path, cluster: Any, caplog: pytest.LogCaptureFixture
) -> None:
    from thinwire.node.on_ray.joining import join_swarm

    config = load_config(None, run_of(DECOUPLED, min_peers=3))
    task = make_task(config.task, None, None)
    (tmp_path / "state").mkdir()

    def opened(state: StateDir) -> CoordinatorServer:
        return open_server(state, config, Here(task), host="127.0.0.1")

    caplog.set_level(logging.INFO, "thinwire.ray")
    with ServerThread(tmp_path / "state", make=opened) as coordinator:
        volunteer = HivemindLink(coordinator.ticket, host="127.0.0.1")
        runner = Runner(volunteer)
        training = threading.Thread(target=runner.run, daemon=True)
        training.start()
        joined = join_swarm(
            coordinator.ticket.line(),
            [PeerGroup(2)],
            node_state=tmp_path / "nodes",
            output=tmp_path / "weights",
            host="127.0.0.1",
        )
        training.join(100)
        volunteer.close()
        status = coordinator.status()
    assert joined is not None
    assert joined["weights"] == str(tmp_path / "weights")
    results = joined["peers"]
    assert sorted(results) == ["peer-0", "peer-1"]
    assert {(r["rounds"], r["counted"]) for r in results.values()} == {(ROUNDS, ROUNDS)}
    fingerprints = {result["fingerprint"] for result in results.values()}
    assert fingerprints == {runner.replica.fingerprint().hex()}
    assert len(status["peers"]) == 3
    assert (tmp_path / "weights" / "model.safetensors").exists()
    assert list((tmp_path / "nodes").iterdir()) == []
    assert "peer-0: run test: " in caplog.text
    assert_left_empty()


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ([], "name a run file, or a swarm to --join"),
        (["run.toml", "--join", "tw1-x"], "--join takes no run file"),
        (["--join", "tw1-x", "--rounds", "3"], "--rounds"),
        (["run.toml", "--max-upload", "1MB/s"], "--max-upload"),
    ],
)
def test_what_belongs_to_one_s_own_run_does_not_to_a_swarm_s(line: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        tyro.cli(Ray, args=line).run()


def test_a_coordinator_that_is_gone_is_named_before_a_cluster_begins(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("ray", reason="Ray is an extra")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # where there is none, which would be named
    peer_id = peer_id_of(new_key().public_key())
    ticket = Ticket(peer_id=peer_id, run_id=bytes(32), token="t" * 32, addresses=("/ip4/127.0.0.1/tcp/1",))
    with pytest.raises(SwarmUnreachable, match=r"/tcp/1: connection refused"):
        tyro.cli(Ray, args=["--join", ticket.line()]).run()


def test_only_a_cluster_that_was_begun_for_many_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of another command ends with it."""
    pytest.importorskip("ray", reason="Ray is an extra")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    other = [sys.executable, "-c", "input()", "--gcs-address=127.0.0.1:1234"]  # by which Ray finds any
    with subprocess.Popen(other, stdin=subprocess.PIPE) as process:
        assert begun_here() is None
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text("10.1.2.3:6379")
        assert begun_here() == "10.1.2.3:6379"
        process.communicate(b"\n")


def test_a_signal_to_the_command_s_group_does_not_reach_ray() -> None:
    """Ray ends when the peers have left."""
    pytest.importorskip("ray", reason="Ray is an extra")
    from ray._private import services

    with in_own_groups():
        process = services.start_ray_process(
            [sys.executable, "-c", "input()"], "test", False, pipe_stdin=True
        )
    assert os.getpgid(process.process.pid) == process.process.pid
    process.process.communicate(b"\n")
    assert services.ConsolePopen is not None
    assert not isinstance(services.ConsolePopen, partial)


class Doer:
    """Does one thing after the other during a run, each as soon as the status allows."""

    def __init__(self, *steps: Callable[[Mapping[str, Any]], bool]) -> None:
        self._steps = list(steps)
        self.statuses: list[Mapping[str, Any]] = []

    def look(self, status: Mapping[str, Any], _is_last: bool) -> None:
        self.statuses.append(status)
        if self._steps and self._steps[0](status):
            self._steps.pop(0)

    def is_done(self) -> bool:
        return not self._steps


def states(status: Mapping[str, Any]) -> dict[str, str]:
    return {p["peer_id"]: p["state"] for p in status["peers"]}


def agree_after(rounds_later: int, names: set[str]) -> Callable[[Mapping[str, Any]], bool]:
    """All train, and have since then reported fingerprints for so many rounds, of which none differed."""
    begun: list[int] = []

    def look(status: Mapping[str, Any]) -> bool:
        if {name for name, state in states(status).items() if state == "training"} != names:
            begun.clear()
            return False
        begun.append(status["round"])
        rounds = [p["fingerprint_round"] for p in status["peers"]]
        assert status["mismatches"] == 0
        return all(round_ is not None and round_ >= begun[0] + rounds_later for round_ in rounds)

    return look


def kill(find: Callable[[], int]) -> Callable[[Mapping[str, Any]], bool]:
    def do(_status: Mapping[str, Any]) -> bool:
        os.kill(find(), signal.SIGKILL)
        return True

    return do


def is_gone(name: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda status: states(status)[name] != "training"


def pid_of(actor: str) -> int:
    """The process of the only actor of this class; Ray gives processes such titles."""
    (process,) = [p for p in psutil.Process().children(recursive=True) if f"ray::{actor}" in title(p)]
    return process.pid


def title(process: psutil.Process) -> str:
    """None of one that has just ended."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


@pytest.mark.swarm
@pytest.mark.timeout(400)
def test_what_dies_comes_back_and_agrees(tmp_path: Path, cluster: Any) -> None:
    """In one run: a rank of a peer of two, the coordinator, and the machine of a third peer."""
    machines = [cluster.add_node(**NODE, num_cpus=2)]
    peers = {"peer-0", "peer-1", "peer-2"}

    def take_the_machine_away(_status: Mapping[str, Any]) -> bool:
        machines.append(cluster.add_node(**NODE, num_cpus=2))
        cluster.remove_node(machines.pop(0), allow_graceful=False)
        return True

    doer = Doer(
        agree_after(2, peers),
        kill(lambda: pid_of("RankActor")),
        is_gone("peer-1"),
        agree_after(2, peers),
        kill(lambda: pid_of("CoordinatorActor")),
        agree_after(2, peers),
        take_the_machine_away,
        is_gone("peer-2"),
        agree_after(2, peers),
    )
    result = train_on_ray(
        tmp_path,
        run_of(DECOUPLED, rounds=10**6, min_peers=3, verify_every=1, snapshot_every=20),
        # The head has no room for the third: 5 CPUs of its own.
        peers=[PeerGroup(1, 1, 2.0), PeerGroup(1, 2, 1.0), PeerGroup(1, 1, 2.0)],
        on_status=doer.look,
        stopped=doer.is_done,
    )
    assert doer.is_done()
    assert result.weights is None
    rounds = [status["round"] for status in doer.statuses]
    assert rounds == sorted(rounds)
    assert doer.statuses[-1]["mismatches"] == 0
    _, known, _ = what_counted(tmp_path / "state")
    assert set(known.values()) == peers
    cluster.remove_node(machines.pop())
    assert_left_empty()


@pytest.mark.swarm
def test_too_many_peers_are_told_what_is_there(tmp_path: Path, cluster: Any) -> None:
    with pytest.raises(NoRoom) as error:
        train_on_ray(tmp_path, run_of(SPSA), num_peers=4, gpus_per_peer=1, accelerator_type="H100")
    text = str(error.value)
    assert "4 peers with 1 CPU and 1 GPU of type H100 each" in text
    assert "127.0.0.1: 5 CPU, 0 GPU" in text
    with pytest.raises(NoRoom, match="0 have a place"):  # two machines of half the size would do
        train_on_ray(tmp_path, run_of(SPSA, min_peers=1), num_peers=1, cpus_per_peer=8, wait_s=0.5)
    assert not (tmp_path / "state").exists()
    assert_left_empty()


@pytest.mark.swarm
def test_the_benchmark_of_rounds_runs_on_any_cluster(cluster: Any) -> None:
    import ray

    result = measure_rounds(ray, n_peers=2, n_rounds=5)
    assert (result["peers"], result["rounds"]) == (2, 5)
    assert 0 < result["round_p50_s"] <= result["round_p99_s"] <= result["round_max_s"]
    assert result["sent_bytes_per_peer_and_round"] > PAYLOAD_BYTES
    assert_left_empty()


def test_groups_of_peers_as_they_are_written() -> None:
    assert parse_group("2:gpus=1,type=L4") == PeerGroup(2, 1, 1.0, 1.0, "L4")
    assert parse_group("1:gpus=8,cpus=16") == PeerGroup(1, 8, 2.0, 1.0, None)
    assert parse_group("3:ranks=2") == PeerGroup(3, 2, 1.0, 0.0, None)
    assert parse_group("1:gpus=2,type=T4").bundles == [
        {"CPU": 1.0, "GPU": 1.0, "accelerator_type:T4": 0.001},
        {"CPU": 1.0, "GPU": 1.0, "accelerator_type:T4": 0.001},
    ]
    for text in ("x", "0", "1:gpu=1", "1:gpus=one", "2:gpus=2,ranks=3", "1:type=T4", "-1"):
        with pytest.raises(ConfigError):
            parse_group(text)


def test_a_run_that_could_never_begin_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="waits for 4 peers"):
        train_on_ray(tmp_path, run_of(SPSA, min_peers=4), num_peers=3)
    with pytest.raises(ConfigError, match="max_peers"):
        train_on_ray(tmp_path, run_of(SPSA), num_peers=65)
    with pytest.raises(ConfigError, match="job"):
        train_on_ray(tmp_path, run_of(SPSA), num_peers=4, address="ray://127.0.0.1:10001")
    assert not (tmp_path / "state").exists()


def test_the_job_for_kubernetes_is_one_that_the_command_understands() -> None:
    yaml = pytest.importorskip("yaml", reason="comes with Ray")
    path = ROOT / "deploy" / "kubernetes" / "rayjob.yaml"
    run, *claims, job = yaml.safe_load_all(path.read_text())
    program, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert program == "thinwire"
    command = tyro.cli(
        Command, args=arguments, config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes)
    )
    assert isinstance(command, Ray)
    config = load_config(None, tomllib.loads(run["data"]["run.toml"]), environ={})
    assert command.peers is not None
    assert config.run.min_peers <= command.peers
    cluster = job["spec"]["rayClusterSpec"]
    head, *workers = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert sum(group["maxReplicas"] for group in workers) >= command.peers
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert command.state is not None
    claimed = set()
    for group, folder in [
        (head, command.state.parent),
        *((worker, command.node_state) for worker in workers),
    ]:
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"].endswith(f":{cluster['rayVersion']}")
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
        claimed.add(volumes[mounts[str(folder)]]["persistentVolumeClaim"]["claimName"])
    assert claimed == {claim["metadata"]["name"] for claim in claims}
    constraints = (path.parents[2] / "constraints.txt").read_text().splitlines()
    assert f"ray=={cluster['rayVersion']}" in constraints


WITHOUT_RAY = """
import sys
sys.modules["ray"] = None
from thinwire.node.cli.main import main
from thinwire.node.on_ray.train import train
sys.exit(main(["ray", "run.toml", "--peers", "2"]))
"""


def test_without_ray_the_extra_is_named(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_RAY], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert ran.returncode == 2, ran.stderr
    assert ran.stdout == ""
    assert "pip install 'thinwire[ray]'" in ran.stderr
    assert "Traceback" not in ran.stderr
