"""Training loops of a user's own over a swarm in this process: a small model, its batches and its loss."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor, nn

from thinwire.coordinator.protocol.identity import peer_id_of
from thinwire.node.config import load_config
from thinwire.node.genesis import make_genesis
from thinwire.node.links.local import LocalLink, LocalSwarm, local_swarm
from thinwire.node.loop.swarm import Outcome, Swarm
from thinwire.node.loop.task import LoopRun, LoopTask, Loss
from thinwire.node.runner import Runner

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))

WIDTH = 8


class Net(nn.Module):
    """16 numbers in, 4 out; dropout, so that the mode matters; a buffer that stays what it is."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, WIDTH), nn.Linear(WIDTH, 4)
        self.drop = nn.Dropout(0.1)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x_BI: Tensor) -> Tensor:
        y_BO: Tensor = self.down(self.drop(torch.tanh(self.up(x_BI)))) * self.scale
        return y_BO


def examples(seed: int, n: int = 6) -> list[dict[str, Tensor]]:
    """Batches of four; the target is a fixed map of the input."""
    generator = torch.Generator().manual_seed(seed)
    x_NBI = torch.randn(n, 4, 16, generator=generator)
    return [{"x": x_BI, "y": x_BI[:, :4] - x_BI[:, 4:8]} for x_BI in x_NBI]


def loss_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch["x"]), batch["y"])


STRATEGIES: dict[str, dict[str, Any]] = {
    "decoupled": {"name": "decoupled", "lr": 1e-2, "compressor": {"name": "dense"}},
    "diloco": {"name": "diloco", "lr": 1e-2, "inner_steps": 3, "compressor": {"name": "dense"}},
    "spsa": {"name": "spsa", "lr": 1e-3, "eps": 1e-3, "probes": 2},
}


@contextmanager
def swarm_of(
    folder: Path, model: nn.Module, strategy: str = "decoupled", *, evaluated: bool = False, **run: Any
) -> Iterator[LocalSwarm]:
    """A run of the model, whose initial values are zeros, normal noise for matrices."""
    folder.mkdir(exist_ok=True)
    keys = {f"run.{k}": v for k, v in {"rounds": 6, "verify_every": 2, "snapshot_every": 2, **run}.items()}
    keys |= {"task.name": "custom", "policy.name": "all", "network.heartbeat_s": 0.2}
    config = load_config(None, {**keys, "strategy": STRATEGIES[strategy]}, environ={})
    genesis = make_genesis(config, LoopRun(model, evaluated=evaluated), peer_id_of(KEY.public_key()), 1)
    with local_swarm(folder, genesis.body, KEY, blobs=genesis.blobs) as swarm:
        yield swarm


def status_of(swarm: LocalSwarm) -> dict[str, Any]:
    return swarm.call(lambda service, now_s: service.status(now_s))


def node(
    link: LocalLink,
    model: nn.Module,
    batches: Any = None,
    folder: Path | None = None,
    loss: Loss = loss_of,
    **options: Any,
) -> Swarm:
    """What `join` gives, over a link of this process."""
    task = LoopTask(model, examples(0) if batches is None else batches, loss, **options)

    @contextmanager
    def opening() -> Iterator[Runner]:
        try:
            yield Runner(link, task=task, folder=folder)
        finally:
            link.close()

    return Swarm(opening())


@contextmanager
def other_node(link: LocalLink, **options: Any) -> Iterator[list[Outcome]]:
    """Another one trains to the end in a thread meanwhile; its outcomes."""
    outcomes: list[Outcome] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            with node(link, Net(), examples(7), **options) as swarm:
                outcomes.extend(swarm)
        except Exception as e:  # noqa: BLE001 - told by whoever waits
            errors.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield outcomes
    finally:
        thread.join(60)
    assert not thread.is_alive()
    assert errors == []
