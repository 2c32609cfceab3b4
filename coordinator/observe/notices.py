"""What people are told in words while a run goes on: notices to its nodes, and lines of log and page."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from ..announcer import Announcer
from ..membership import Became, Membership, PeerState
from ..protocol.figures import RoundLines, counted, human_seconds, printable
from ..protocol.messages import MAX_TEXT, Notice
from ..rounds import RoundClosed, Rounds
from .page_history import HappeningKind, PageHistory
from .peer_names import PeerNames
from .quiet_log import QuietLog
from .run_statistics import RunStatistics

log = logging.getLogger("thinwire.coordinator")

FIRST_NOTICE_S: Final = 1.0
NOTICE_EVERY_S: Final = 5.0
SELDOM_S: Final = 300.0
"""What goes on is said after twice as long each time, but no more seldom."""

RESUME: Final = "thinwire run STATE resume (STATE: the coordinator's folder)"

TOLD_AFTER_MISSES: Final = 16
"""So many rounds in a row without an offer of its, and again after as many more: the peer is told."""

TOLD_OF_ERROR: Final = 500
"""Characters of the error that a node has left with."""

TOLD_ON_PAGE: Final = 150

NAMED_PEERS: Final = 8
NAMED_ON_PAGE: Final = 4


class Notices:
    """Of one run. `wall_ms`: the time that the page gives its lines.

    What is awaited is said after NOTICE_EVERY_S, more and more seldom while it stays the same, and
    FIRST_NOTICE_S after somebody has come.
    """

    def __init__(
        self,
        announcer: Announcer,
        members: Membership,
        names: PeerNames,
        page_history: PageHistory,
        wall_ms: Callable[[], int],
        now_s: float,
    ) -> None:
        self._announcer, self._members, self._names = announcer, members, names
        self._page_history, self._wall_ms = page_history, wall_ms
        self._round_lines = RoundLines()
        self.lines = QuietLog(log, time.monotonic)
        """For lines that peers cause."""
        self._last_word = ""
        """The error that a node has left with, since one was training."""
        self._said: Awaited | None = None
        self._since_s = now_s
        self._pause_s = NOTICE_EVERY_S
        self.next_s = now_s + FIRST_NOTICE_S
        """When it is to be said again what is awaited, in monotonic seconds."""

    def session_opened(self, now_s: float) -> None:
        """Whoever has come is soon told what is awaited."""
        self.next_s = min(self.next_s, now_s + FIRST_NOTICE_S)

    def changed(self, now_s: float) -> None:
        """The run's settings have: what is awaited now is said soon."""
        self.next_s = min(self.next_s, now_s + FIRST_NOTICE_S)

    def round_opened(self, now_s: float) -> None:
        """Nothing is said of what was awaited before."""
        self.next_s = now_s + NOTICE_EVERY_S

    def awaited(self, rounds: Rounds, min_peers: int, usual_s: float | None, now_s: float) -> None:
        """Says what is awaited, if it lasts longer than usual.

        `usual_s`: what a round takes, None before the first one.
        """
        if now_s < self.next_s:
            return
        found = awaited(rounds, min_peers, usual_s or 0.0, self._names.short, now_s)
        if found != self._said:
            self._said, self._since_s, self._pause_s = found, now_s, NOTICE_EVERY_S
        self.next_s = now_s + self._pause_s
        if found is None:
            return
        self._pause_s = min(2 * self._pause_s, SELDOM_S)
        text = found.told(now_s, self._since_s)
        if self._last_word and not rounds.training:
            text = f"{text}; nobody trains any more: {self._last_word}"
        log.info("%s", text)
        self._announcer.send(Notice(text=text[:MAX_TEXT], warning=False), self._members.connected())

    def closed(self, closed: RoundClosed, is_last: bool, now_s: float) -> None:
        """A line of log, of quick rounds for several together."""
        n_quiet = self._round_lines.due(now_s, is_last)
        if n_quiet is not None:
            since = f" ({n_quiet + 1} rounds since the last line)" if n_quiet else ""
            offers = counted(len(closed.peers), "offer")
            log.info("round %d: %s, %.2f s%s", closed.round, offers, closed.duration_s, since)

    def became(self, became: Became) -> None:
        """A peer's state has changed."""
        name = self._names.short(became.peer)
        self.lines.say(logging.INFO, name, became.state, "%s is %s: %s", name, became.state, became.reason)
        if became.state is PeerState.TRAINING:
            self._last_word = ""
        if (kind := _kind(became)) is not None and self._members.takes_part(became.peer):
            self._happened(kind, self._names.on_page(became.peer))

    def failed(self, peer: int, last_word: str) -> None:
        """A node leaves with an error."""
        word = printable(last_word, TOLD_OF_ERROR)
        name = self._names.short(peer)
        self._last_word = f"{name} stopped with {word}"
        self.lines.say(logging.ERROR, name, "last word", "%s", self._last_word)
        self._happened("failed", f"{self._names.on_page(peer)}: {word[:TOLD_ON_PAGE]}")

    def guarded(self, text: str) -> None:
        """The owner has changed who may come in."""
        log.info("%s", text)
        self._happened("changed", text)

    def differs(self, peer: int, round_: int, others: Iterable[int]) -> None:
        """A peer's fingerprint of a round is not that of `others`: everybody is told."""
        peers = sorted(others)
        names = ", ".join(self._names.short(other) for other in peers)
        text = f"round {round_}: the replica of {self._names.short(peer)} differs from that of {names}"
        self.lines.say(logging.ERROR, self._names.short(peer), "differs", "%s", text)
        self._announcer.send(Notice(text=text, warning=True), self._members.connected())
        named = ", ".join(self._names.on_page(other) for other in peers[:NAMED_ON_PAGE])
        self._happened("differs", f"round {round_}: {self._names.on_page(peer)} differs from {named}")

    def changed_offer(self, peer: int) -> None:
        """A second, different offer for the open round."""
        text = "your first offer of this round stands: a different one was refused"
        self._announcer.send(Notice(text=text, warning=True), [peer])

    def missed(self, missing: Iterable[int], statistics: RunStatistics) -> None:
        """A round has closed without these peers, and been counted: whose work never counts is told so."""
        for peer in missing:
            n = statistics.peer(peer).missed_in_a_row
            if n % TOLD_AFTER_MISSES == 0:
                self._announcer.send(Notice(text=_too_slow(n), warning=True), [peer])

    def refused_offer(self, peer: int, why: str) -> None:
        """An offer is not taken."""
        name = self._names.short(peer)
        self.lines.say(logging.INFO, name, "offer", "an offer of peer %d is not taken: %s", peer, why)

    def _happened(self, kind: HappeningKind, text: str) -> None:
        self._page_history.happened(self._wall_ms(), kind, text)


SIGNED_WITHIN_S: Final = 2.0
"""Before anybody is told that a record waits for its seal."""


@dataclass(frozen=True, slots=True)
class Awaited:
    """In words; between `what` and `then` stands for how long. `since_s`: monotonic; None: since it was first
    said."""

    what: str
    then: str = ""
    since_s: float | None = None

    def told(self, now_s: float, said_s: float) -> str:
        """`said_s`: when it was first said."""
        lasted_s = now_s - (said_s if self.since_s is None else self.since_s)
        return f"{self.what} for {human_seconds(lasted_s)}{self.then}" if lasted_s else self.what + self.then


def awaited(
    rounds: Rounds, min_peers: int, usual_s: float, name: Callable[[int], str], now_s: float
) -> Awaited | None:
    """None: nothing, or not for more than twice as long as rounds usually take."""
    if rounds.is_over:
        return None
    if rounds.is_paused:
        return Awaited("the run is paused", f" after round {rounds.head}; it goes on with: {RESUME}")
    if rounds.closing_s is not None:
        what = f"round {rounds.round}: waiting for a majority of the coordinators to sign its record"
        is_late = now_s - rounds.closing_s >= SIGNED_WITHIN_S
        return Awaited(what, since_s=rounds.closing_s) if is_late else None
    if rounds.opened_s is None:
        n = len(rounds.training)
        more = counted(min_peers - n, "more peer")
        return Awaited(f"waiting for {more}", f": {n} of {min_peers} are training")
    is_late = now_s - rounds.opened_s >= 2 * usual_s
    return _awaited_in_round(rounds, rounds.opened_s, name) if is_late else None


def _awaited_in_round(rounds: Rounds, opened_s: float, name: Callable[[int], str]) -> Awaited:
    missing = rounds.missing()
    if not missing:
        what = f"round {rounds.round}: waiting for anybody's offer"
        return Awaited(what, since_s=opened_s)
    names = ", ".join(map(name, missing[:NAMED_PEERS]))
    names += ", ..." if len(missing) > NAMED_PEERS else ""
    of = f"{len(missing)} of {counted(len(rounds.expected), 'peer')} ({names})"
    return Awaited(f"round {rounds.round}: waiting for {of}", since_s=opened_s)


def _kind(became: Became) -> HappeningKind | None:
    """What the page says of it, if anything."""
    if became.state is PeerState.TRAINING:
        return "joined"
    if became.cause is None:
        return None
    return "left" if became.cause == "said_so" else "lost"


def _too_slow(n_missed: int) -> str:
    return (
        f"the last {n_missed} rounds closed without an offer of yours: this machine or its link is much "
        f"slower than the others. With [work] round_s in the run's configuration every node does "
        f"as much as it can in that time."
    )
