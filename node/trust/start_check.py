"""Whether the snapshot that a node began at is what the ledger gives: said, verified, and given up if not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

from ..history import History
from ..joining import Joiner, NoStart, Start
from ..links.base import Link
from ..replica import Replica
from ..snapshots.publishing import SnapshotPublisher
from .verifying import Finding, Verification

log = logging.getLogger("thinwire.node")

Verify = Literal["background", "first", "off"]
"""What a node does about a snapshot that others vouch for: trains on it and verifies it meanwhile; begins
only where nobody's word is taken; trains on it."""


class StartCheck:
    """Of one node. `spare`: see `Verification`."""

    def __init__(
        self,
        link: Link,
        history: History,
        joiner: Joiner,
        publisher: SnapshotPublisher,
        spare: Callable[[], Replica],
        verify: Verify,
        *,
        me: Callable[[], int],
    ) -> None:
        self._link, self._history, self._joiner, self._publisher = link, history, joiner, publisher
        self._spare, self.verify, self._me = spare, verify, me
        self._running: Verification | None = None
        self._who = ""

    def begin(self) -> Start:
        """Brings the replica to the best start that it may begin at. Raises as `Joiner.begin` does."""
        if self.verify != "first":
            return self._joiner.begin()
        try:
            return self._joiner.begin(lambda: self._joiner.trusted_starts(self._link.head))
        except NoStart as e:
            raise NoStart(
                f"--verify first: the payloads of a replay from the base weights are gone, and this node has "
                f"verified no snapshot of a later round. --verify background begins at one that others vouch "
                f"for. {e}"
            ) from e

    def may_leave(self) -> bool:
        """Whether the replica may be left for a snapshot of the swarm's that is nearer to the head. One that
        is verified, of a node whose work has counted, is worth more than the time."""
        is_new = not self._history.standing.has_worked(self._me())
        return self.verify != "first" and (is_new or not self._publisher.is_verified)

    def began(self, start: Start) -> None:
        """The replica has a new start. Says so if it is not verified, and begins to verify it."""
        self._stop()
        target = self._joiner.stored
        if start.is_trusted or target is None:
            return
        self._who = _who(start, self._history)
        said = "the replica after round %d is one that this node has not verified: it takes %s for it. %s"
        if self.verify == "off":
            log.warning(said, target.round, self._who, "It stays so (--verify off)")
            return
        starts = self._joiner.trusted_starts(target.round - 1)
        if not starts:
            log.warning(said, target.round, self._who, "It stays so: the payloads of a replay are gone")
            return
        log.info(
            said, target.round, self._who, f"A replay from round {starts[0].round} verifies it meanwhile"
        )
        self._running = Verification(self._link, self._joiner, self._spare, target, starts)

    def is_refuted(self) -> bool:
        """Whether a replay has given something else than what this node began at; said once. What has led to
        nothing, or to the same, is settled by the way."""
        running = self._running
        finding = None if running is None else running.finding
        if running is None or finding is None:
            return False
        self._running = None
        return self._settled(running, finding)

    def _settled(self, running: Verification, finding: Finding) -> bool:
        round_ = running.target.round
        match finding.result:
            case "same":
                self._publisher.confirm()
                log.info(
                    "the snapshot after round %d is verified: a replay of the ledger gave the same", round_
                )
            case "unknown":
                log.warning("the snapshot after round %d stays unverified: %s", round_, finding.why)
            case "other":
                log.error("%s", self.refutation(round_))
                self._joiner.was_wrong(running.target.manifest)
                self._publisher.give_up()
        return finding.result == "other"

    def refutation(self, round_: int) -> str:
        """For this node's owner."""
        return (
            f"the snapshot after round {round_} is wrong: a replay of the ledger gave something else. This "
            f"node had taken {self._who} for it. Tell the run's owner, who can shut them out with thinwire "
            f"run STATE ban PEER"
        )

    def close(self) -> None:
        """At the end of the run. Says what was not verified until then."""
        running = self._running
        self._stop()
        if running is None:
            return
        round_ = running.target.round
        if running.finding is not None and running.finding.result == "other":
            log.error("%s", self.refutation(round_))
        elif running.finding is None or running.finding.result == "unknown":
            log.warning(
                "the snapshot after round %d was not verified by the end, nor is what came of it", round_
            )

    def _stop(self) -> None:
        """Nothing is verified any more."""
        if self._running is not None:
            self._running.close()
        self._running = None


def _who(start: Start, history: History) -> str:
    if start.attested is not None:
        return f"the word of {history.names(start.attested.peers)}"
    return "what it took of others before it was last started"
