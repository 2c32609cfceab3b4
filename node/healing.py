"""When replicas differ: replay the ledger from a start that needs nobody's word, and compare.

The ledger decides, never the majority (ARCHITECTURE.md, "Healing"). Who was wrong keeps the replay and names
the tensors; who was right goes on where it was, whatever the others say, and its owner hears who says
otherwise. The others train on meanwhile.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..compression.errors import Incompatible, SwarmUnreachable
from ..compression.fingerprint import fingerprint
from ..coordinator.protocol.messages import Report
from .doctor.self_test import failed_kernels
from .history import History
from .joining import Joiner, NoStart, Start
from .links.base import Link
from .replica import Replica, Saved

log = logging.getLogger("thinwire.node")

_KEPT_SUMS = 16

_DOUBLINGS = 6
"""A peer that a replay has contradicted again and again is not checked for twice as long each time, up to 64
times the rounds between snapshots."""


@dataclass(frozen=True, slots=True)
class _Doubt:
    """Of a round that this node has looked at: what it knows, in words; until which round others may heal
    before its owner hears of them."""

    known: str
    until: int


class Healer:
    """Of one node. `me`: its index, -1 until a commit has admitted it; `is_verified`: whether its replica
    began at a trusted start; `discard`: called with a round: own snapshots after it are not to be trusted."""

    def __init__(
        self,
        link: Link,
        replica: Replica,
        history: History,
        joiner: Joiner,
        *,
        me: Callable[[], int],
        device: torch.device,
        is_verified: Callable[[], bool],
        discard: Callable[[int], None],
    ) -> None:
        self._link, self._replica, self._history, self._joiner = link, replica, history, joiner
        self._me, self._device = me, device
        self._is_verified, self._discard = is_verified, discard
        self._sums: OrderedDict[int, dict[str, int]] = OrderedDict()
        self._checked: set[int] = set()
        self._watched: dict[int, _Doubt] = {}
        """By round."""
        self._told: set[int] = set()
        self._n_disproved: Counter[int] = Counter()

    def said(self, round_: int) -> bool:
        """Whether this node had told its fingerprint of this round, maybe a wrong one."""
        return round_ in self._sums

    def fingerprint(self, *, checked: bool) -> bytes:
        """The replica's, and remembers what it is made of, to be able to name a tensor later. `checked`: the
        replica is a replay of the ledger, which nobody needs to check again."""
        if checked:
            self._checked.add(self._replica.round)
        sums = self._sums[self._replica.round] = self._replica.sums()
        while len(self._sums) > _KEPT_SUMS:
            self._sums.popitem(last=False)
        return fingerprint(sums)

    def due(self) -> list[int]:
        """Rounds that it is this peer's turn to check now, in order. Tells this node's owner who says
        otherwise of those that were checked."""
        self._tell_who_differs()
        rounds = [r for r in self._history.verdicts.to_check(self._me()) if r not in self._checked]
        if not rounds:
            return []
        starts = self._joiner.own_starts(rounds[-1], verified=self._is_verified())
        first = min((start.round for start in starts), default=rounds[-1] + 1)
        gone = [r for r in rounds if r < first]
        if gone:
            self._give_up(gone, "no snapshot of its own is old enough, or payloads are gone")
        return rounds[len(gone) :]

    def check(self, rounds: Sequence[int]) -> Start | None:
        """Replays up to the last of these rounds. The start of the replay, if the replica was wrong: it is
        the replay's now; else None, and it is what it was.

        Raises Incompatible when this machine's kernels are broken."""
        log.warning(
            "the replicas differ after round %d: checking this one against the ledger; the others train on",
            rounds[0],
        )
        self._link.serve(None)
        saved = self._replica.saved()
        self._checked.update(rounds)
        try:
            start = self._joiner.begin(
                lambda: self._joiner.own_starts(rounds[0], verified=self._is_verified()),
                with_local_state=False,
            )
            wrong = self._replay(start, rounds)
        except (SwarmUnreachable, NoStart) as e:
            self._give_up(rounds, str(e))
            self._replica.restore(saved)
            return None
        if wrong:
            self._discard(start.round)
            return start
        self._was_right(start, rounds, saved)
        return None

    def _replay(self, start: Start, rounds: Sequence[int]) -> bool:
        """Up to the last of these rounds; whether this node had reported another one."""
        wrong = start.round in rounds and self._compare(start)
        commits = self._link.records(start.round)
        while self._replica.round < rounds[-1]:
            commit = next(commits, None)
            if commit is None:
                raise SwarmUnreachable("the link was closed")
            self._replica.apply(commit, self._link.payload, offered=False)
            wrong = (self._replica.round in rounds and self._compare(start)) or wrong
        return wrong

    def _was_right(self, start: Start, rounds: Sequence[int], saved: Saved) -> None:
        self._replica.restore(saved)
        log.info("this replica is right: the ledger says the same")
        self._test_this_machine(rounds[0])
        others = {other for r in rounds for other in self._history.verdicts.others(self._me(), r)}
        for other in others:
            n = min(self._n_disproved[other], _DOUBLINGS)
            self._n_disproved[other] += 1
            self._history.verdicts.disproved(other, self._history.round + self._history.every * 2**n)
        whence = "the base weights" if start.kind == "base" else f"its own snapshot after round {start.round}"
        doubt = "" if start.is_trusted else ", which nobody here has verified,"
        self._watch(rounds, f"its replay from {whence}{doubt} confirms what it has")

    def _give_up(self, rounds: Sequence[int], why: str) -> None:
        log.warning("round %d cannot be checked: %s", rounds[0], why)
        self._checked.update(rounds)
        self._watch(rounds, f"it cannot check its own ({why})")

    def _watch(self, rounds: Sequence[int], known: str) -> None:
        self._watched.update(dict.fromkeys(rounds, _Doubt(known, self._history.round + self._history.every)))

    def _tell_who_differs(self) -> None:
        """Once for each of them: when it has confirmed its own, or has had the time to heal."""
        verdicts = self._history.verdicts
        for round_, doubt in list(self._watched.items()):
            others = verdicts.others(self._me(), round_)
            if not others:
                del self._watched[round_]
                continue
            had_time = self._history.round >= doubt.until
            found = {p for p, entry in others.items() if entry.checked or had_time}
            if found - self._told:
                since = min(verdicts.differs_since(self._me(), other) for other in found)
                log.error("%s", _who_differs(self._history.names(found), since, doubt.known))
                self._told |= found

    def _compare(self, start: Start) -> bool:
        """Reports what the replay has after its round; True if this node had said something else."""
        sums, round_ = self._replica.sums(), self._replica.round
        found = fingerprint(sums)
        self._link.report(Report(round=round_, fingerprint=found, checked=start.is_trusted))
        if found == self._history.verdicts.fingerprint(self._me(), round_):
            return False
        before = self._sums.pop(round_, {})
        names = sorted(name for name in before if before[name] != sums[name])
        log.error(
            "this replica was wrong after round %d, in %s: healed by replaying the ledger",
            round_,
            ", ".join(names) if names else "tensors that are not known any more",
        )
        return True

    def _test_this_machine(self, round_: int) -> None:
        failed = failed_kernels(self._device)
        if failed:
            raise Incompatible(
                f"the replicas differ after round {round_}, and this machine computes something else than "
                f"the others: {', '.join(failed)} failed the self-test. Try THINWIRE_KERNELS=torch, another "
                f"device, or look at the memory."
            )


def _who_differs(names: str, since: int, known: str) -> str:
    return (
        f"since round {since} the replica of {names} is not what this node has, and {known}. This node "
        f"trains on as it is. To see who is wrong: thinwire ledger TICKET -o FILE, then thinwire replay FILE "
        f"on this machine and on another one; the run's owner can shut a peer out with thinwire run "
        f"STATE ban PEER"
    )
