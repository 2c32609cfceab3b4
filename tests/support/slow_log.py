"""A log whose records take their time."""

from __future__ import annotations

from tests.support.service_world import World
from thinwire.coordinator.protocol.messages import CommitBody
from thinwire.coordinator.quorum.log import Alone, OnSealed


class SlowLog:
    """Alone, but records are sealed when the test says so."""

    on_sealed: OnSealed

    def __init__(self, world: World) -> None:
        self._alone = Alone(world.ledger, world.key)
        self.proposed: list[tuple[CommitBody, bytes]] = []
        self.resting: dict[str, bytes] = {}

    @property
    def is_over(self) -> bool:
        return self._alone.is_over

    def propose(self, body: CommitBody, work: bytes, now_s: float) -> None:
        self.proposed.append((body, work))

    def seal(self, now_s: float) -> None:
        (body, work), self.proposed = self.proposed[0], self.proposed[1:]
        self._alone.on_sealed = self.on_sealed
        self._alone.propose(body, work, now_s)
