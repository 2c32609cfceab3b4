"""What a demo is to show."""

from __future__ import annotations

from dataclasses import dataclass

from ...compression.errors import ThinwireError
from ...coordinator.protocol.addresses import HttpAddress
from ..system.processes import Child


class DemoFailed(ThinwireError):
    """A process of the demo ended or hung; the message has the end of its log."""


def ended(child: Child) -> DemoFailed:
    """Of one that was not to end like this."""
    return DemoFailed(
        f"{child.name} ended with exit code {child.process.poll()}; its log ends with:\n{child.log_tail()}"
    )


@dataclass(frozen=True, slots=True)
class DemoPlan:
    """What is to be shown. `faults`: kill a node at a third of the rounds and start it again. `ranks`: of the
    nodes, over and over. `http`: what the first coordinator serves meanwhile. `n_coordinators`: more than one
    are a committee, whose leader is killed at two thirds of the rounds, if anything is."""

    strategy: str
    n_peers: int
    rounds: int
    faults: bool
    ranks: tuple[int, ...] = (1,)
    http: HttpAddress | None = None
    n_coordinators: int = 1
