"""What records change of a run, in words: its settings, who orders it, who may come in; who has sealed it."""

from __future__ import annotations

from ....compression.errors import ConfigError, LedgerCorrupt
from ..figures import counted, short
from ..messages import AccessEntry, BadMessage, Commit, CommitBody, CommitteeEntry, GenesisBody
from ..settings import Course
from .seals import Committee, Seal


class Governing:
    """Follows the records of one run, which the caller has verified. `founder`: of record 0."""

    def __init__(self, founder: str) -> None:
        self.committee = Committee.founder(founder)
        """After the newest record."""
        self._access: AccessEntry | None = None

    def follow(self, commit: Commit) -> list[str]:
        """The next record; a line for each thing that it says."""
        body = commit.body
        if not body.governs:
            return []
        told = [f"{text} ({_sealed_by(commit, self.committee)})" for text in self._told(body)]
        if body.committee is not None:
            self.committee = Committee.named(body.round, body.committee)
        self._access = body.access or self._access
        return told

    def _told(self, body: CommitBody) -> list[str]:
        texts = told_of_seats(body)
        if body.access is not None:
            texts.append(_access(body.access, self._access))
        return texts


class Changing:
    """Follows what records change: settings of the run, who orders it, who may come in. `told`: in words."""

    def __init__(self, genesis: GenesisBody) -> None:
        self._config = genesis.config
        self._course: Course | None = None
        self._governing = Governing(genesis.coordinator)
        self.told: list[str] = []

    def follow(self, commit: Commit) -> None:
        """The next record. Raises LedgerCorrupt for changes that no run can make."""
        round_, changes = commit.body.round, commit.body.changes
        self.told += [f"round {round_}: {text}" for text in self._governing.follow(commit)]
        if not changes:
            return
        try:
            course = self._course or Course.of(self._config)
            self.told += [f"round {round_}: {text}" for text in course.told(changes)]
            self._course = course.after(changes)
        except ConfigError as e:
            raise LedgerCorrupt(f"record {round_}: {e}") from e


def told_of_seats(body: CommitBody) -> list[str]:
    """What a record says of the seats that order the run."""
    texts = [] if body.committee is None else [_committee(body.committee)]
    return [*texts, *(f"{short(r.seat)} votes again: it had lost its votes" for r in body.reseat)]


def _committee(entry: CommitteeEntry) -> str:
    names = ", ".join(short(seat.peer_id) for seat in entry.seats)
    text = f"the committee is now {names}"
    if len(entry.seats) > 1:
        text += f"; {entry.need} of {len(entry.seats)} must sign"
    return f"{text}; the run has a recovery key now" if entry.recovery else text


def _access(now: AccessEntry, before: AccessEntry | None) -> str:
    text = f"entry is {now.mode}"
    if now.mode == "listed":
        text += f" ({counted(len(now.listed), 'peer')})"
    if now.banned:
        text += f", {counted(len(now.banned), 'peer')} banned"
    return f"{text}, the token is a new one" if before is not None and before.token != now.token else text


def _sealed_by(commit: Commit, committee: Committee) -> str:
    """`committee`: before this record."""
    entry = commit.body.committee
    if entry is not None and entry.recovered_with:
        return "signed with the recovery key"
    if len(committee.seats) == 1:
        return f"signed by {short(committee.seats[0])}"
    try:
        places = sorted(Seal.parse(commit.signature).votes)
    except BadMessage:
        return "not sealed"
    return f"sealed by {', '.join(short(committee.seats[i]) for i in places if i < len(committee.seats))}"
