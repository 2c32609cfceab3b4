"""The log of a node's run in Weights & Biases (extra `[wandb]`): `wandb login` first, or WANDB_MODE=offline.

Project, entity and mode are W&B's own matter (WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE). Only what an entry
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

    def track(self, entry: Mapping[str, Any]) -> None:
        if entry["kind"] == "start":
            self._start(entry)
        elif self._run is None:
            raise RuntimeError("W&B was not started")
        if figures := scalars(entry):
            self._run.log({"round": entry["round"], **figures})

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()

    def _start(self, entry: Mapping[str, Any]) -> None:
        peer = entry["peer_id"][-12:]
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "thinwire"),
            group=entry["run"],
            name=f"{entry['run']} {peer[-6:]}",
            id=f"{entry['run_id'][:16]}-{peer}",
            resume="allow",
            dir=str(self._folder),
            config={key: entry[key] for key in ("run_id", "peer_id", "config")},
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
