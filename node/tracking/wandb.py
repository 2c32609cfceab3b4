"""A run's records in Weights & Biases (extra `[wandb]`): `wandb login` first, or WANDB_MODE=offline.

Project, entity and mode are W&B's own matter (WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE). Only what a record
has is sent: no code, no host name, no list of packages, no measurements of the machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .metrics import TrackerName
from .tensorboard import scalars


class WeightsAndBiases:
    """Every peer is one W&B run of the group that the swarm's run is; started again, it goes on in that."""

    name: TrackerName = "wandb"

    def __init__(self, folder: Path) -> None:
        import wandb

        self._wandb, self._folder = wandb, folder
        self._run: Any = None

    def track(self, record: Mapping[str, Any]) -> None:
        if record["kind"] == "start":
            self._start(record)
        elif self._run is None:
            raise RuntimeError("W&B was not started")
        if figures := scalars(record):
            self._run.log({"round": record["round"], **figures})

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()

    def _start(self, record: Mapping[str, Any]) -> None:
        peer = record["peer_id"][-12:]
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "thinwire"),
            group=record["run"],
            name=f"{record['run']} {peer[-6:]}",
            id=f"{record['run_id'][:16]}-{peer}",
            resume="allow",
            dir=str(self._folder),
            config={key: record[key] for key in ("run_id", "peer_id", "config")},
            settings=self._wandb.Settings(
                console="off",
                disable_git=True,
                disable_code=True,
                host="",
                x_disable_stats=True,
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
            ),
        )
        # Rounds are repeated after a replay: W&B's own steps only rise.
        self._run.define_metric("*", step_metric="round")
