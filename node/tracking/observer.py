"""What a runner tells of its run: the contract between training and whoever counts, measures or logs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ...coordinator.protocol.messages import Commit
from ...optim.base import Own
from ..local_work import Proposal
from .metrics import Audited


@dataclass(frozen=True, slots=True)
class OpenOffer:
    """An offer of this node whose round the replica has not applied yet. `sent_s`: when the link got it."""

    round: int
    sent_s: float


@dataclass(frozen=True, slots=True)
class Applied:
    """Commits that were applied at once, one or more, and what became of this node's offer for each.

    `offer`: the one that was open. All times by the runner's clock: `came_s`, when the last commit came;
    `began_s` and `ended_s` of applying them; `fetched_s`, the part of that spent waiting for payloads.
    `is_training`: this node takes part in rounds, it is not catching up.
    """

    commits: Sequence[Commit]
    owns: Sequence[Own]
    offer: OpenOffer | None
    came_s: float
    began_s: float
    ended_s: float
    fetched_s: float
    is_training: bool

    @property
    def own(self) -> Own:
        """What became of the offer that was open: there is one at most."""
        return next((own for own in self.owns if own is not None), None)


class Observer(Protocol):
    """Is told by the node's thread; decides nothing and raises nothing."""

    def started(self, round_: int) -> None:
        """The replica has its first weights, those after this round."""
        ...

    def training(self, is_training: bool) -> None:
        """Whether this node takes part in rounds from now on."""
        ...

    def proposed(self, proposal: Proposal) -> None:
        """Local work is done and packed; the offer goes out next."""
        ...

    def worked_ahead(self, duration_s: float) -> None:
        """A piece of the next round's local work is done while the open round's commit has not come."""
        ...

    def gave_up_offer(self) -> None:
        """The replica goes to another round: the open offer will not be settled."""
        ...

    def applied(self, applied: Applied) -> None: ...

    def replayed(self, round_: int, was_wrong: bool) -> None:
        """The ledger was replayed because replicas differ, and the replica is at this round now."""
        ...

    def fingerprint_reported(self) -> None: ...

    def audited(self, result: Audited) -> None:
        """This node has done another peer's work again."""
        ...

    def measured_held_out(self, round_: int, loss: float) -> None:
        """`loss`: of the replica after that round, in nats."""
        ...

    def ended(self, round_: int) -> None:
        """Training is over for this node, whatever the reason; the replica is at this round."""
        ...
