"""What a seat tells its coordinator, and the times and roles that it knows."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Final, Literal


@dataclass(frozen=True, slots=True)
class Timing:
    """In seconds. `beat_s`: between two pings of a leader; `patience_s`: without a word, until another may
    lead, on a quick network (see `Patience`); `retry_s`: until something is said again."""

    beat_s: float = 0.5
    patience_s: float = 3.0
    retry_s: float = 1.0


DEFAULT_TIMING: Final = Timing()


class Role(Enum):
    FOLLOWING = auto()
    CANVASSING = auto()
    """Asks whether anybody would follow: nothing is promised yet."""
    PREPARING = auto()
    """Collects promises."""
    RECOVERING = auto()
    """Leads, and first proposes again what may have been sealed before."""
    LEADING = auto()


Why = Literal["another leads", "behind", "no majority", "outbid", "the committee has changed", "disk"]


@dataclass(frozen=True, slots=True)
class Leads:
    """This seat may propose the record after its head."""


@dataclass(frozen=True, slots=True)
class StepsDown:
    """It may not any more. What became of an open proposal is not known: it is never made anew, it may be
    recovered, by whoever leads next."""

    why: Why


@dataclass(frozen=True, slots=True)
class NewRecord:
    """The record of this round is sealed, and on the disk."""

    round: int


@dataclass(frozen=True, slots=True)
class Evidence:
    """A seat did what no seat of ours does: two records for one ballot, a seal that is none, a promise with
    a vote that nobody can have given."""

    seat: str
    what: Literal["two records", "bad seal", "bad promise"]


@dataclass(frozen=True, slots=True)
class DiskFailed:
    """Nothing could be written, so no word was given: the seat follows, and tries again."""

    error: str


SeatEvent = Leads | StepsDown | NewRecord | Evidence | DiskFailed
