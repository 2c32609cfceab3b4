"""What it takes to found a run: a contract. Models and strategies are built for it, so that it needs torch;
who serves the run for months afterwards does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ...coordinator.protocol.messages import GenesisBody
    from ..config import RunConfig


@dataclass(frozen=True, slots=True)
class Founded:
    """A new run. `body`: record 0; the blobs that it names are stored. `loss_unit`: of its task, in words."""

    body: GenesisBody
    loss_unit: str


@dataclass(frozen=True, slots=True)
class Compared:
    """A run file beside the run that is there. `differences`: in words; `loss_unit`: see Founded."""

    differences: tuple[str, ...]
    loss_unit: str


class Founder(Protocol):
    """Knows the run's task. Two implementations: `here.Here` and `child.Child`."""

    @property
    def name(self) -> str | None:
        """Of the task's code; None: it has none, and is compared with the run at every start."""
        ...

    def found(self, config: RunConfig, coordinator: str, recovery: bytes, blobs: Path) -> Founded:
        """`coordinator`: its peer id; `recovery`: see `GenesisBody`; `blobs`: folder of the coordinator's
        store. Raises ConfigError."""
        ...

    def compare(self, config: RunConfig, recorded: str) -> Compared:
        """`recorded`: the configuration in record 0. Raises ConfigError."""
        ...

    def check(self, table: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        """Whether a run's strategy may get these options now. Raises ConfigError."""
        ...
