"""The log of a node's run as scalars for TensorBoard (extra `[tensorboard]`):
`tensorboard --logdir STATE-FOLDER`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .metrics import TrackerName


class TensorBoard:
    """One scalar for each number of an entry, with the round as its step."""

    name: TrackerName = "tensorboard"

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), flush_secs=10)

    def track(self, entry: Mapping[str, Any]) -> None:
        for name, value in scalars(entry).items():
            self._writer.add_scalar(name, value, entry["round"], entry["time"])

    def close(self) -> None:
        self._writer.close()


def scalars(entry: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an entry by the names of charts: `held_out/loss` for an event's, `bytes/sent` and
    `seconds/compute` for those with a unit, `loss` else."""
    found = {}
    for key, value in entry.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or key in {"time", "round"}:
            continue
        stem, _, unit = key.rpartition("_")
        if entry["kind"] != "round":
            found[f"{entry['kind']}/{key}"] = value
        elif unit == "s":
            found[f"seconds/{stem}"] = value
        elif unit == "bytes":
            found[f"bytes/{stem}"] = value
        else:
            found[key] = value
    return found
