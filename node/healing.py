"""When replicas differ: replay the ledger from a start that needs nobody's word, and compare.

The ledger decides, never the majority (ARCHITECTURE.md, "Healing"). Who was wrong keeps the replay and
names the tensors; who was right goes on where it was. The others train on meanwhile.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from ..compression.errors import Incompatible, ReplicaDiverged, SwarmUnreachable
from ..compression.fingerprint import fingerprint
from ..coordinator.protocol.messages import Report
from .doctor.self_test import failed_kernels
from .history import History
from .joining import Joiner
from .links.base import Link
from .replica import Replica

log = logging.getLogger("thinwire.node")

_KEPT_SUMS = 16


class Healer:
    """Of one node. `peer_index`: its own; `discard`: called with a round: own snapshots after it are not to
    be trusted."""

    def __init__(
        self,
        link: Link,
        replica: Replica,
        history: History,
        joiner: Joiner,
        *,
        peer_index: int,
        device: torch.device,
        discard: Callable[[int], None],
    ) -> None:
        self._link, self._replica, self._history, self._joiner = link, replica, history, joiner
        self._me, self._device, self._discard = peer_index, device, discard
        self._sums: OrderedDict[int, dict[str, int]] = OrderedDict()
        self._checked: set[int] = set()
        self._tested: set[int] = set()

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
        """Rounds that it is this peer's turn to check now, in order.

        Raises Incompatible when replays disagree and this machine's kernels are broken, ReplicaDiverged when
        nobody can tell who is wrong.
        """
        verdicts, oldest = self._history.verdicts, self._joiner.kept_from()
        undecided = verdicts.undecided(oldest)
        if undecided is not None and undecided not in self._tested:
            self._tested.add(undecided)
            self._test_this_machine(undecided)
        rounds = [r for r in verdicts.to_check(self._me, oldest) if r not in self._checked]
        if rounds and not self._joiner.trusted_starts(at_most=rounds[0]):
            log.warning("round %d cannot be checked any more: its payloads are gone", rounds[0])
            self._checked.update(rounds)
            return []
        return rounds

    def check(self, rounds: Sequence[int]) -> bool:
        """Replays up to the last of these rounds. True: the replica was wrong, and is the replay's now."""
        log.warning(
            "the replicas differ after round %d: checking this one against the ledger; the others train on",
            rounds[0],
        )
        self._link.serve(None)
        saved = self._replica.saved()
        start = self._joiner.begin(
            lambda: self._joiner.trusted_starts(at_most=rounds[0]), with_local_state=False
        )
        self._checked.update(rounds)
        try:
            wrong = self._replay(start.round, rounds)
        except SwarmUnreachable as e:
            log.warning("round %d cannot be checked: %s", self._replica.round + 1, e)
            wrong = False
        if wrong:
            self._discard(start.round)
            return True
        self._replica.restore(saved)
        return False

    def _replay(self, after: int, rounds: Sequence[int]) -> bool:
        """From a trusted start up to the last of these rounds; whether this node had reported another one."""
        wrong = after in rounds and self._compare(after)
        commits = self._link.records(after)
        while self._replica.round < rounds[-1]:
            commit = next(commits, None)
            if commit is None:
                raise SwarmUnreachable("the link was closed")
            self._replica.apply(commit, self._link.payload, offered=False)
            wrong = (self._replica.round in rounds and self._compare(self._replica.round)) or wrong
        if not wrong:
            log.info("this replica is right: the ledger says the same")
        return wrong

    def _compare(self, round_: int) -> bool:
        """Reports what the replay has after this round; True if this node had said something else."""
        sums = self._replica.sums()
        found = fingerprint(sums)
        self._link.report(Report(round=round_, fingerprint=found, checked=True))
        if found == self._history.verdicts.fingerprint(self._me, round_):
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
        """Everybody's replay confirms what it had: one of the machines computes something else."""
        log.error("the replicas differ after round %d, and each peer's replay confirms its own", round_)
        failed = failed_kernels(self._device)
        if failed:
            raise Incompatible(
                f"this machine computes something else than the others: {', '.join(failed)} failed the "
                f"self-test. Try THINWIRE_KERNELS=torch, another device, or look at the memory."
            )
        if self._me in self._history.verdicts.smallest_group(round_):
            raise ReplicaDiverged(
                f"the replicas differ after round {round_}, each replay of the ledger confirms its own, and "
                f"this machine passes the self-test. This peer is in the smaller group and stops; compare "
                f"with thinwire replay on both machines."
            )
