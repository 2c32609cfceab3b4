"""The weights of a run from a state folder into a model of one's own, without a server."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..states.opening import open_state
from ..states.replica import newest_replica
from ..tasks.base import device_of
from .task import ModelTask


def load_weights(state: Path | str, model: nn.Module) -> int:
    """The newest weights that a coordinator's or a node's state folder holds go into `model`, where it is.
    Returns the round after which the run had them. The folder is not changed, and may be in use.

    Raises ConfigError, LedgerCorrupt, Incompatible (another model) and ThinwireError (the folder does not
    hold enough, and what would).
    """
    task, device = ModelTask(model), device_of(model)
    try:
        with open_state(Path(state)) as there:
            return newest_replica(there, None, task).replica.round
    finally:
        model.to(device)
