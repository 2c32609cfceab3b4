"""The ledger as a link follows it: commits into this node's copy, and their payloads fetched ahead."""

from __future__ import annotations

from collections.abc import Iterator

from ...compression.errors import LedgerCorrupt
from ...coordinator.protocol.chain import REPAIR_FORK, Forked
from ...coordinator.protocol.ledger_copy import LedgerCopy
from ...coordinator.protocol.messages import Commit, Digest, OfferEntry
from .mailbox import Mailbox
from .payloads import AHEAD, Payloads

_RETURNED_AT_ONCE = 64
_TOGETHER = 256


class CommitFeed:
    """Lives in the event loop; `head` and `taken` are used from any thread."""

    def __init__(self, copy: LedgerCopy, payloads: Payloads, mailbox: Mailbox) -> None:
        self._copy, self._payloads, self._mailbox = copy, payloads, mailbox
        self._taken: int | None = None
        self._ahead = range(0)
        """Rounds whose payloads were looked for last."""
        self._together: list[Commit] = []
        self.head = copy.head_round
        """The newest round that is known to be committed; the copy may be behind it."""

    @property
    def copied_round(self) -> int:
        """The last one whose commit this node has."""
        return self._copy.head_round

    @property
    def taken_round(self) -> int:
        """The last one that the node has taken to apply it; 0: none yet."""
        return self._taken or 0

    def keep_genesis(self, record: bytes, signature: bytes) -> None:
        """Record 0, verified."""
        self._copy.keep_genesis(record, signature)

    def over_after(self) -> int | None:
        """The run's last round, if that is committed as far as this node has heard."""
        return self.head if self._copy.is_over(self.head) else None

    def heard_of(self, round_: int) -> None:
        """The coordinator has committed this round."""
        self.head = max(self.head, round_)

    def known_head(self) -> tuple[int | None, Digest | None]:
        """Round and digest of the last commit that this node has; None: it has none."""
        copy = self._copy
        return (copy.head_round, copy.head_digest) if copy.head_round else (None, None)

    def missing(self, after: int, up_to: int) -> Iterator[Commit]:
        """Commits that the coordinator has lost, for as long as the copy is open."""
        while after < up_to and (batch := self._copy.commits(after, min(_RETURNED_AT_ONCE, up_to - after))):
            yield from batch
            after += len(batch)

    def append(self, commit: Commit) -> list[Commit]:
        """The next commit. Far behind the head those that come are taken together: returns which were taken
        now. Raises LedgerCorrupt."""
        self._together.append(commit)
        is_behind = self.copied_round + len(self._together) < self.head
        return [] if is_behind and len(self._together) < _TOGETHER else self.take()

    def take(self) -> list[Commit]:
        """Those that have come so far. Raises LedgerCorrupt."""
        commits, self._together = self._together, []
        if not commits:
            return []
        try:
            self._copy.append(*commits)
        except Forked as e:
            raise LedgerCorrupt(f"{e}. {REPAIR_FORK}") from e
        self._came(commits)
        return commits

    def forget(self) -> None:
        """Another session begins: what was not taken comes again."""
        self._together.clear()

    def _came(self, commits: list[Commit]) -> None:
        round_ = self._copy.head_round
        self.heard_of(round_)
        for commit in commits:
            self._payloads.committed(commit)
        if self._taken is not None and round_ <= self._taken + AHEAD:
            self.fetch_ahead()
        self._mailbox.commits_came()

    def taken(self, round_: int) -> bool:
        """The node works on this commit now, and will take those after it next. Whether payloads of these
        are still to be looked for, by `fetch_ahead`."""
        self._taken = round_
        return round_ not in self._ahead or min(round_ + AHEAD, self._copy.head_round) not in self._ahead

    async def payload(self, entry: OfferEntry) -> bytes:
        """See `Link.payload`."""
        return await self._payloads.get(entry, self._copy.peers.get(entry.peer))

    def fetch_ahead(self) -> None:
        """Payloads of the commit that the node works on, and of those that it takes next."""
        assert self._taken is not None
        commits = self._copy.commits(self._taken - 1, AHEAD + 1)
        self._ahead = range(self._taken, self._taken + len(commits))
        self._payloads.want(commits, self._copy.peers)
