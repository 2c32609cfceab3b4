"""What peers are worth to others, from the ledger alone: pure, fed with commits in order, the same for all.

Identities cost nothing; counted work does. A peer whose offers were counted may report, attest and audit,
with the weight of what it has done. Audits in the ledger take it away: who has failed too many is condemned,
from the next commit on, for a term; then it is back with its failures forgotten, and the next term is twice
as long.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Protocol

from ..messages import AuditEntry, CommitBody, Verdict
from .audits import check_audit, payload_digest, signed_bytes
from .drawing import MIN_AUDITORS, Draw, audits_of
from .flood import Flood
from .judging import REPORT_ROUNDS, Judged, Judging, OpenAudit
from .paces import Paces
from .stock import ROUND, Stock
from .worked import Worked

LAST: Final = 4
"""Times `failures`: so many of a peer's newest audits are looked at. Who was good for long and turns bad is
out after half as many failures; who is audited often and passes nearly always stays."""

FIRST_OFFERS: Final = 20
"""Of a newcomer: so many are audited at the rate for newcomers, or until an audit has passed."""

SEASONED: Final = 5
"""Counted offers in rounds with too few auditors for their peer: who has so many is known without an audit,
in runs with `newcomers_budget`. There nobody can be found out anyway; those who come later are new."""

USUAL_ROUNDS: Final = 2
"""After an offer that was drawn: its auditors have reported by then, if all goes well."""

MAX_DOUBLINGS: Final = 20
"""Of a term."""


class Rules(Protocol):
    """The run's `[audits]`, as record 0 has them."""

    @property
    def rate(self) -> float: ...

    @property
    def failures(self) -> int: ...

    @property
    def window_rounds(self) -> int: ...

    @property
    def own_data_auditors(self) -> bool: ...

    @property
    def newcomers_rate(self) -> float: ...

    @property
    def newcomers_budget(self) -> float: ...

    @property
    def flood_failures(self) -> int: ...


@dataclass(slots=True)
class _Tried:
    """A peer that was audited. `judged`: round of the offer and whether it failed, of the last ones in the
    window; `passed`, `failed`: ever; `is_vetted`: it has passed one since it was condemned last; `n_terms`:
    how often it was, the last time until `last`; `turns`: the first rounds in which it is new no more, is
    again, and so on in turn; `falls`: in which its last audit has failed, has not, and so on."""

    judged: deque[tuple[int, bool]] = field(default_factory=deque)
    passed: int = 0
    failed: int = 0
    is_vetted: bool = False
    n_terms: int = 0
    last: int = 0
    turns: list[int] = field(default_factory=list)
    falls: list[int] = field(default_factory=list)

    def note(self, judged: Judged, n_kept: int, next_round: int) -> None:
        """`next_round`: the first one in which it matters."""
        if judged.failed == self.is_known(next_round):
            self.turns.append(next_round)
        if judged.failed != self.has_failed(next_round):
            self.falls.append(next_round)
        self.judged.append((judged.round, judged.failed))
        while len(self.judged) > n_kept:
            self.judged.popleft()
        self.passed += not judged.failed
        self.failed += judged.failed
        self.is_vetted |= not judged.failed

    def is_known(self, round_: int) -> bool:
        """Whether the last audit that was decided before this round has passed."""
        return bisect_right(self.turns, round_) % 2 == 1

    def season(self, next_round: int) -> None:
        """As if an audit had passed, unless there was one."""
        if not self.turns and self.passed == self.failed == 0:
            self.turns.append(next_round)

    def has_failed(self, round_: int) -> bool:
        """Whether it has failed."""
        return bisect_right(self.falls, round_) % 2 == 1

    def n_failed(self, after: int) -> int:
        """Of the offers of rounds after this one; what was before is forgotten."""
        while self.judged and self.judged[0][0] <= after:
            self.judged.popleft()
        return sum(failed for _, failed in self.judged)

    def is_too_much(self, rules: Rules, after: int) -> bool:
        """So many failures among the last ones, and no fewer than passes."""
        n_failed = self.n_failed(after)
        return n_failed >= rules.failures and 2 * n_failed >= len(self.judged)


class Standing:
    """Every node, every coordinator and every replay that was fed the same commits says the same.

    `rules`: None, the run has no audits. A commit that is known already changes nothing, so that several
    readers of one ledger can share one of these. Over any number of rounds it stays small: a few numbers for
    each peer, and its last few audits.
    """

    def __init__(
        self,
        run_id: bytes = b"",
        rules: Rules | None = None,
        paces: Paces | None = None,
        worked: Worked | None = None,
    ) -> None:
        """`paces`, `worked`: fed with every commit, too; None: nobody asks how often peers offer, or how much
        they have done."""
        self._run_id, self._rules, self.paces, self.worked = run_id, rules, paces, worked
        self.round = 0
        """The newest commit that is known."""
        self._work: Counter[int] = Counter()
        self._peer_ids: dict[int, str] = {}
        self._tried: dict[int, _Tried] = {}
        self._terms: dict[int, int] = {}
        """The last round of each term that is not over, by peer."""
        self._ever: list[tuple[int, int, int]] = []
        """Peer, first and last round of every term: few, because they double."""
        self._judging = Judging()
        self._drawn: dict[int, tuple[Draw, ...]] = {}
        budget = 0 if rules is None else round(rules.newcomers_budget * rules.rate * ROUND)
        self._stock = Stock(budget) if budget > 0 else None
        failures = 0 if rules is None or budget == 0 else rules.flood_failures
        self._flood = Flood(failures) if failures > 0 else None
        self._fallen: set[int] = set()
        self._among_few: Counter[int] = Counter()
        self._settled: int | None = None
        """The first round after one in which half of the peers were known: from then on others are new."""

    def committed(self, body: CommitBody, digest: bytes = b"") -> None:
        """The next commit, or one that is known. `digest`: its own; what is drawn comes from it."""
        if body.round <= self.round:
            return
        if self._rules is not None and not (digest and body.round == self.round + 1):
            raise ValueError("commits are needed in order, and their digests: audits are drawn from them")
        for entry in body.audits:
            if not self.is_condemned(entry.auditor):
                self._heard(entry)
        for told in (self.paces, self.worked):
            if told is not None:
                told.committed(body, self._terms)
        self._worked(body)
        self.round = body.round
        if self._rules is not None:
            self._peer_ids.update({a.index: a.peer_id for a in body.admitted})
            self._judge(self._rules)
            if self._stock is not None:
                self._season(body)
                self._settle(body)
            self._draw(body, digest, self._rules)

    # -------------------------------------------------------------------------------------- what it says

    def work(self, peer: int) -> int:
        """Offers of the peer that counted: those with samples, of rounds in which it was not condemned."""
        return self._work[peer]

    @property
    def is_untouched(self) -> bool:
        """Whether no work has counted yet: the weights are those that the run began with."""
        return not self._work

    def has_worked(self, peer: int) -> bool:
        """Whether what the peer reports is listened to."""
        return self.work(peer) > 0 and not self.is_condemned(peer)

    def is_condemned(self, peer: int) -> bool:
        """Whether the peer's offer of the next round weighs nothing."""
        return peer in self._terms

    def condemned_in(self, round_: int) -> frozenset[int]:
        """Peers whose offers of this round weigh nothing; of any round up to the one after the newest that is
        known: ValueError for others."""
        if self._rules is not None and round_ > self.round + 1:
            raise ValueError(f"who is condemned in round {round_} is not known after round {self.round}")
        if round_ == self.round + 1:
            return frozenset(self._terms)
        return frozenset(peer for peer, first, last in self._ever if first <= round_ <= last)

    def is_new_in(self, peer: int, round_: int) -> bool:
        """Whether the last audit of the peer's offers that was decided before this round, one of those that
        are known and the next one, has not passed, or there was none. At the beginning of a run everybody is
        new, and so nobody, in runs with `newcomers_budget`."""
        if self._stock is not None and (self._settled is None or round_ < self._settled):
            return False
        tried = self._tried.get(peer)
        return tried is None or not tried.is_known(round_)

    def new_among(self, body: CommitBody) -> frozenset[int]:
        """Peers with an offer in this commit, which is known, that are new in its round. In runs with
        `newcomers_budget` who cannot be audited is not: there is no way out."""
        new = frozenset(o.peer for o in body.offers if self.is_new_in(o.peer, body.round))
        if not new or self._stock is None:
            return new
        able = self._able_in(body)
        return frozenset(peer for peer in new if len(able - {peer}) >= MIN_AUDITORS)

    def has_failed_in(self, peer: int, round_: int) -> bool:
        """Whether it has failed, in runs with `newcomers_budget`."""
        tried = self._tried.get(peer)
        return self._stock is not None and tried is not None and tried.has_failed(round_)

    def weightless_among(self, body: CommitBody) -> frozenset[int]:
        """Peers with an offer in this commit, which is known, that weigh nothing in its round, the condemned
        ones apart: whose last audit has failed, and in a flood who is new, where somebody else is there."""
        peers = frozenset(o.peer for o in body.offers)
        failed = frozenset(peer for peer in peers if self.has_failed_in(peer, body.round))
        if self._flood is None or not self._flood.is_on(body.round):
            return failed
        new = self.new_among(body)
        return failed | new if peers - failed - new else failed

    def flood_turns(self) -> bool | None:
        """Whether the newest commit has begun a flood, True, or ended one, False."""
        if self._flood is None or self._flood.is_on(self.round) == (now := self._flood.is_on(self.round + 1)):
            return None
        return now

    def is_known(self, peer: int) -> bool:
        """Whether the last audit of the peer's offers that was decided has passed."""
        tried = self._tried.get(peer)
        return tried is not None and tried.is_known(self.round + 1)

    def is_looked_at(self, peer: int) -> bool:
        """Whether reports on one of the peer's last offers are still to come, as far as those are in time."""
        rounds = range(self.round - USUAL_ROUNDS, self.round)
        return any(self._judging.waiting(round_, peer) is not None for round_ in rounds)

    def changed(self) -> tuple[list[int], list[int]]:
        """Who is condemned since the newest commit, and whose term is over with it; sorted."""
        before, now = self.condemned_in(self.round), self.condemned_in(self.round + 1)
        return sorted(now - before), sorted(before - now)

    def fallen(self) -> list[int]:
        """Whose last audit has failed since the newest commit, so that their offers weigh nothing until one
        passes; sorted, without the condemned ones."""
        return sorted(peer for peer in self._fallen if not self.is_condemned(peer))

    def condemned_until(self, peer: int) -> int | None:
        """The last round of the peer's term; None: it is not condemned."""
        return self._terms.get(peer)

    def is_suspect(self, peer: int) -> bool:
        """Whether the peer's offers are audited more often: it has never passed an audit, or not since it was
        condemned, or has failed one lately."""
        tried, rules = self._tried.get(peer), self._rules
        if tried is None or rules is None or not tried.is_vetted:
            return True
        return tried.n_failed(self.round - rules.window_rounds) > 0

    def is_fresh(self, peer: int) -> bool:
        """Whether the peer has done little so far, and passed no audit."""
        tried = self._tried.get(peer)
        if self._stock is not None and self.is_known(peer):
            return False
        return self.work(peer) <= FIRST_OFFERS and (tried is None or not tried.is_vetted)

    def audited(self, peer: int) -> tuple[int, int]:
        """How many audits of the peer's offers have passed and failed, ever."""
        tried = self._tried.get(peer)
        return (0, 0) if tried is None else (tried.passed, tried.failed)

    def drawn(self, round_: int) -> tuple[Draw, ...]:
        """The audits of the offers that this round's commit has counted; none, once it is too late for their
        reports."""
        return self._drawn.get(round_, ())

    def awaits(self, round_: int, target: int, auditor: int) -> bool:
        """Whether that auditor's report on that offer still counts, and has not come."""
        audit = self._judging.waiting(round_, target)
        return (
            audit is not None
            and auditor in audit.work
            and auditor not in audit.failed
            and not self.is_condemned(auditor)
        )

    def claim(self, entry: AuditEntry) -> bytes | None:
        """What the auditor of this report must have signed; None: the offer's audit is over, or was none."""
        audit = self._judging.waiting(entry.round, entry.target)
        if audit is None:
            return None
        target = self._peer_ids.get(entry.target, "")
        return signed_bytes(self._run_id, entry.round, target, audit.digest, entry.verdict)

    # ------------------------------------------------------------------------------------- what it learns

    def _worked(self, body: CommitBody) -> None:
        self._work.update(o.peer for o in body.offers if o.n_samples > 0 and o.peer not in self._terms)

    def _heard(self, entry: AuditEntry) -> None:
        """A coordinator that invents a report finds no ear: its auditor's signature is not on it."""
        audit, claim = self._judging.waiting(entry.round, entry.target), self.claim(entry)
        if audit is None or claim is None or entry.auditor not in audit.work or entry.auditor in audit.failed:
            return
        if check_audit(self._peer_ids.get(entry.auditor, ""), entry.signature, claim):
            self._judging.heard(audit, entry.auditor, entry.verdict == Verdict.FAILED)

    def _judge(self, rules: Rules) -> None:
        self._terms = {peer: last for peer, last in self._terms.items() if last > self.round}
        after = self.round - rules.window_rounds
        self._fallen.clear()
        first_audits = list[bool]()
        for judged in self._judging.judge(self.round, self.is_condemned):
            tried = self._tried.setdefault(judged.target, _Tried())
            if judged.round <= tried.last:
                continue  # of before its term, or while it lasts
            if tried.passed == tried.failed == 0:
                first_audits.append(judged.failed)
            tried.note(judged, LAST * rules.failures, self.round + 1)
            if judged.failed and self._stock is not None:
                self._fallen.add(judged.target)
            if tried.is_too_much(rules, after):
                self._condemn(judged.target, tried, rules)
        if self._flood is not None:
            self._flood.committed(self.round, first_audits)

    def _heard_in(self, body: CommitBody) -> list[int]:
        """Whose offers weigh something."""
        condemned = self.condemned_in(body.round)
        return [o.peer for o in body.offers if o.n_samples > 0 and o.peer not in condemned]

    def _able_in(self, body: CommitBody) -> frozenset[int]:
        """Those of them who can be drawn as auditors."""
        of_all = self._rules is None or self._rules.own_data_auditors
        own_data = {o.peer for o in body.offers if o.own_data and not of_all}
        return frozenset(self._heard_in(body)) - own_data

    def _season(self, body: CommitBody) -> None:
        able = self._able_in(body)
        if len(able) > MIN_AUDITORS:
            return
        self._among_few.update(able)
        for peer in sorted(able):
            if self._among_few[peer] == SEASONED:
                self._tried.setdefault(peer, _Tried()).season(body.round + 1)

    def _settle(self, body: CommitBody) -> None:
        if self._settled is None:
            heard = self._heard_in(body)
            if heard and 2 * sum(map(self.is_known, heard)) >= len(heard):
                self._settled = body.round + 1

    def _condemn(self, peer: int, tried: _Tried, rules: Rules) -> None:
        term = rules.window_rounds << min(tried.n_terms, MAX_DOUBLINGS)
        tried.n_terms, tried.last = tried.n_terms + 1, self.round + term
        tried.judged.clear()
        tried.is_vetted = False
        self._terms[peer] = tried.last
        self._ever.append((peer, self.round + 1, tried.last))

    def _draw(self, body: CommitBody, digest: bytes, rules: Rules) -> None:
        options = rules.rate, rules.own_data_auditors, rules.newcomers_rate, self._stock
        draws = audits_of(self._run_id, digest, body, self, *options)
        self._drawn.pop(body.round - REPORT_ROUNDS, None)
        if draws:
            self._drawn[body.round] = draws
            self._begin(body, draws)

    def _begin(self, body: CommitBody, draws: Iterable[Draw]) -> None:
        offers = {offer.peer: offer for offer in body.offers}
        for draw in draws:
            work = {auditor: self._work[auditor] for auditor in draw.auditors}
            audit = OpenAudit(body.round, draw, payload_digest(offers[draw.target]), work)
            self._judging.begin(audit)
