"""One rank of a node for test_ranks.py, over a local swarm in which rank 0 runs another node as well.

python -m tests.support.node_ranks RANK WORLD_SIZE FOLDER: trains with one strategy after another, prints what
came out.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.support.local_nodes import Told
from thinwire.coordinator.control.orders import Order
from thinwire.coordinator.protocol.identity import peer_id_of
from thinwire.coordinator.protocol.messages import Change, Commit, digest_of
from thinwire.node.auditing.earlier import Earlier
from thinwire.node.config import RunConfig, load_config
from thinwire.node.genesis import make_genesis
from thinwire.node.links.local import LocalSwarm, local_swarm
from thinwire.node.ranks.leader import Follower, Leader, open_channel
from thinwire.node.ranks.sharding import Sharding, join_node
from thinwire.node.replica import data_seed
from thinwire.node.result import Result
from thinwire.node.runner import Runner
from thinwire.node.snapshots.store import SnapshotStore
from thinwire.node.tasks.registry import make_task
from thinwire.optim.base import Own
from thinwire.optim.parts.ranks import Ranks

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
CPU = torch.device("cpu")
SMALL = {"name": "dct_topk", "k": 8, "group_size": 64}
ROUNDS = {"healed": 24}
# Strategy, samples of a batch (with one of them a rank has none), what is special about the ranks.
RUNS: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    "decoupled": ({"name": "decoupled", "lr": 1e-2, "beta": 0.9, "compressor": SMALL, "overlap": 1}, 3, {}),
    "spsa": ({"name": "spsa", "lr": 1e-3, "probes": 3}, 1, {}),
    "diloco": (
        {"name": "diloco", "lr": 1e-2, "inner_steps": 2, "fragments": 2, "mix": 0.5, "overlap": 1,
         "outer_momentum": 0.9, "compressor": SMALL},
        4,
        {"precision": "bf16", "activation_checkpointing": True},
    ),
    "healed": ({"name": "decoupled", "lr": 1e-2, "compressor": SMALL}, 2, {}),
}  # fmt: skip


def config_of(strategy: dict[str, Any], batch: int, rounds: int) -> RunConfig:
    flat = {
        "run.rounds": rounds, "run.eval_every": 3, "run.verify_every": 2, "run.snapshot_every": 2,
        "task.layers": 2, "task.width": 20, "task.heads": 2, "task.context": 12, "task.batch": batch,
        "task.held_out_bytes": 1500, "policy.name": "all", "network.heartbeat_s": 0.2,
    }  # fmt: skip
    base = load_config(None, flat, environ={}).model_dump()
    return RunConfig.model_validate({**base, "strategy": strategy})


def lead(name: str, channel: Ranks, world_size: int, folder: Path) -> dict[str, Any]:
    """Rank 0: a node of one rank in a thread, and its own, which all ranks make up."""
    strategy, batch, special = RUNS[name]
    config = config_of(strategy, batch, ROUNDS.get(name, 6))
    genesis = make_genesis(config, make_task(config.task, None, None), peer_id_of(KEY.public_key()), 1)
    (folder / "coordinator").mkdir(parents=True)
    leading = Leader(channel, CPU, Sharding(world_size, **special))
    audits = Audits(), Audits()
    try:
        with local_swarm(folder / "coordinator", genesis.body, KEY, blobs=genesis.blobs) as swarm:
            links = swarm.link("single"), swarm.link("several")
            told = [Told(link) for link in links]
            single = Runner(
                links[0],
                folder=folder / "single",
                on_proposing=lambda runner: (
                    told[0].wait(runner),
                    halve_lr(swarm, runner, strategy["lr"]),
                    audits[0].look(runner),
                ),
            )
            several = Runner(
                links[1],
                folder=folder / "several",
                leader=leading,
                on_prepared=meddle if name == "healed" else leave_alone,
                on_proposing=lambda runner: (
                    told[1].wait(runner) if name != "healed" else None,
                    audits[1].look(runner),
                ),
            )
            results = run_both(single, several)
            assert several.replica.strategy.option("lr") == strategy["lr"] / 2
            return {
                "rounds": [r.rounds for r in results],
                "fingerprints": [r.fingerprint for r in results],
                "held_out": [len(r.held_out) for r in results],
                "agreements": [a.agreements for a in audits],
                **snapshots(swarm, single, several, folder),
            }
    finally:
        leading.stop()


class Audits:
    """What a node finds of the offers of round 3, whoever made them."""

    def __init__(self) -> None:
        self.agreements: list[float | None] = []
        self._kept: Earlier | None = None

    def look(self, runner: Runner) -> None:
        if runner.replica.round == 2:
            self._kept = runner.work.keep()
        if runner.replica.round != 3 or self._kept is None:
            return
        at, replica, link = self._kept, runner.replica, runner.prepared.link
        for offer in next(link.records(2)).body.offers:
            peer = replica.peers[offer.peer]
            payload = replica.decode(link.payload(offer), at.turn_of(peer))
            seed = partial(data_seed, replica.run_id, 3, peer)
            (found,) = runner.work.audit({peer: payload}, at, seed, 1)
            self.agreements.append(None if found is None else found.agreement)


def halve_lr(swarm: LocalSwarm, runner: Runner, lr: float) -> None:
    """From round 5 on: with the record of the round that is open."""
    if runner.replica.round != 3:
        return
    order = Order(what="set", changes=(Change(key="strategy.lr", value=lr / 2),))
    swarm.call(lambda service, now_s: service.order(order, now_s))


def meddle(runner: Runner) -> None:
    """Once, after round 5, rank 0's rows are not what the ledger says."""
    replica, apply = runner.replica, runner.replica.apply_batch

    def apply_wrong(commits: Sequence[Commit], *arguments: Any, **options: Any) -> list[Own]:
        owns = apply(commits, *arguments, **options)
        if replica.round == 5:
            replica.apply_batch = apply  # type: ignore[method-assign]
            replica.tensors()["head.weight"].view(-1)[0] += 1.0
        return owns

    replica.apply_batch = apply_wrong  # type: ignore[method-assign]


def leave_alone(_runner: Runner) -> None: ...


def run_both(single: Runner, several: Runner) -> list[Result]:
    results: list[Result] = []
    for runner in (single, several):
        runner.link.open()

    def run_single() -> None:
        try:
            results.append(single.run())
        except BaseException:  # noqa: BLE001 - told, and the end of the test
            traceback.print_exc()
            os._exit(1)  # or rank 0 would wait for its offers

    thread = threading.Thread(target=run_single)
    thread.start()
    own = several.run()
    thread.join()
    return [*results, own]


def snapshots(swarm: LocalSwarm, single: Runner, several: Runner, folder: Path) -> dict[str, Any]:
    """Of each node, and what the other one makes of them."""
    stores = [SnapshotStore(folder / n / "snapshots", swarm.run_id) for n in ("single", "several")]
    newest = [store.stored()[-1] for store in stores]
    folders = [store.folder_of(stored) for store, stored in zip(stores, newest, strict=True)]
    commit: Commit = next(single.link.records(newest[0].round - 1))
    for runner in (single, several):
        runner.replica.begin(None)
    single.replica.take(stores[1], newest[1], commit)
    several.replica.take(stores[0], newest[0], commit)
    files = [folder / f"{n}.safetensors" for n in ("single", "several")]
    single.replica.save_weights(files[0])
    several.replica.save_weights(files[1])
    loaded = [r.replica.fingerprint().hex() for r in (single, several)]
    taken = [several.replica.take_local_state(f) for f in folders]
    for runner in (single, several):
        runner.replica.begin(files[0].read_bytes())
    return {
        "manifests": [[(s.round, s.manifest.hex()) for s in store.stored()] for store in stores],
        "data": [digest_of((f / "data.safetensors").read_bytes()).hex() for f in folders],
        "loaded": loaded,
        "begun": [r.replica.fingerprint().hex() for r in (single, several)],
        "weights": [digest_of(f.read_bytes()).hex() for f in files],
        "local": [sorted(path.name for path in f.glob("local*")) for f in folders],
        "local_is_taken": taken,
    }


def main(rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING)
    join_node(CPU, rank, world_size, folder / "meeting")
    channel = open_channel()
    results = {}
    for name, (_, _, special) in RUNS.items():
        if rank == 0:
            results[name] = lead(name, channel, world_size, folder / name)
        else:
            Follower(channel, CPU, Sharding(world_size, **special), import_path=None, data=None).run()
    json.dump(results, sys.stdout)
    sys.stdout.flush()
    channel.gather(b"")  # nobody closes connections while another one still uses them
    os._exit(0)


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
