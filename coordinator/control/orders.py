"""What the owner of a run wants changed, and the changes that the next record carries for it.

Pure: settings, the open round and an order in, changes out. The owner is whoever has the coordinator's key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, model_validator

from ...compression.errors import ConfigError
from ..protocol.messages import (
    MAX_CHANGES,
    MAX_ROUND,
    AccessEntry,
    Change,
    Changes,
    CommitBody,
    CommitteeEntry,
    PeerId,
    Record,
)
from ..protocol.settings import RUN_KEYS, Course, in_order, strategy_options

CheckStrategy = Callable[[Mapping[str, Any], Mapping[str, Any]], None]
"""Takes the strategy's table as it is, and the options that are to change. Raises ConfigError."""


MODES: Final = ("open", "invited", "listed")
"""See `EntryRules`."""

GUARDING: Final = ("ban", "unban", "rotate-token", *MODES)
"""Orders about who may come in: they hold at once. They stand in the state folder instead of the ledger,
unless the ledger tells who may come in: then in both."""

MAX_BANS: Final = 32
MAX_NAMED: Final = 1000
"""Peers of one order: banned ones, listed ones."""


SEATING: Final = ("seats", "replace", "remove")
"""Orders about which coordinators there are to be: they take effect once those who are to come are ready."""


class Order(Record):
    """`rounds`: more of them, for `extend`; how many coordinators, for `seats`; `changes`: in any order, for
    `set` and beside `extend`; `peers`: for `ban`, `unban`, `listed`, and one for `replace`, `remove`.
    `status` changes nothing: it asks how things are."""

    n_younger = 1
    what: Literal[
        "set",
        "extend",
        "pause",
        "resume",
        "stop",
        "ban",
        "unban",
        "rotate-token",
        "open",
        "invited",
        "listed",
        "seats",
        "replace",
        "remove",
        "status",
    ]
    rounds: Annotated[int, Field(ge=0, le=MAX_ROUND)] = 0
    changes: Annotated[tuple[Change, ...], Field(max_length=MAX_CHANGES)] = ()
    peers: Annotated[tuple[PeerId, ...], Field(max_length=MAX_NAMED)] = ()

    @model_validator(mode="after")
    def _names_few(self) -> Self:
        if self.what != "listed" and len(self.peers) > MAX_BANS:
            raise ValueError(f"at most {MAX_BANS} peers at a time")
        return self

    @property
    def is_guarding(self) -> bool:
        """See GUARDING."""
        return self.what in GUARDING

    @property
    def is_seating(self) -> bool:
        """See SEATING."""
        return self.what in SEATING


@dataclass(frozen=True, slots=True)
class Place:
    """Where the record of an order goes. `is_alone`: it takes a round of its own, else it closes the open
    one; `is_over`: the last round is committed."""

    round: int
    is_alone: bool
    is_over: bool


@dataclass(frozen=True, slots=True)
class Ordered:
    """`round`: whose record has the changes, and after which they hold; `told`: they in words. `is_done`: it
    holds already, and no record tells of it. `committee`, `access`: what else the record has for it."""

    round: int
    told: tuple[str, ...]
    changes: Changes
    is_done: bool = False
    committee: CommitteeEntry | None = None
    access: AccessEntry | None = None

    def is_in(self, body: CommitBody) -> bool:
        """Whether the record of its round has all of it."""
        has_changes = set(self.changes) <= set(body.changes)
        has_committee = self.committee is None or self.committee == body.committee
        return has_changes and has_committee and self.access in (None, body.access)


def no_strategy(_table: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """A coordinator that knows no strategies changes none of their options."""
    for name in options:
        raise ConfigError(f"strategy.{name}: this coordinator does not know the options of strategies")


def plan(order: Order, course: Course, place: Place, check: CheckStrategy) -> Ordered:
    """`course`: as it is when the record comes. Raises ConfigError, in words for the owner."""
    changes = {change.key: change for change in _wanted(order, course, place)}
    ordered = in_order(changes)
    _refuse_unknown(ordered)
    check(course.strategy, strategy_options(ordered))
    _refuse_place(course.after(ordered), place)
    return Ordered(place.round, tuple(course.told(ordered)), ordered)


def _wanted(order: Order, course: Course, place: Place) -> list[Change]:
    if order.is_guarding or order.is_seating:
        raise ConfigError(f"{order.what} is for a coordinator that runs: start it first")
    if place.is_over and order.what in ("pause", "resume", "stop"):
        raise ConfigError(f"the run is over after round {place.round - 1}: there is nothing to {order.what}")
    match order.what:
        case "set":
            if not order.changes:
                raise ConfigError("nothing to set: write KEY=VALUE, for example strategy.lr=0.001")
            return list(order.changes)
        case "extend":
            if order.rounds < 1:
                raise ConfigError("extend by one round at least: --rounds N")
            n_rounds = course.n_rounds + order.rounds + place.is_alone
            return [*order.changes, Change(key="run.rounds", value=n_rounds)]
        case "stop":
            return [_paused(False)] * course.is_paused + [Change(key="run.rounds", value=place.round)]
    if course.is_paused == (order.what == "pause"):
        raise ConfigError("the run is paused already" if course.is_paused else "the run is not paused")
    return [_paused(order.what == "pause")]


def _paused(is_paused: bool) -> Change:
    return Change(key="run.paused", value=is_paused)


def _refuse_unknown(changes: Changes) -> None:
    for change in changes:
        if change.key not in RUN_KEYS and not change.key.startswith("strategy."):
            known = ", ".join(key for key in RUN_KEYS if key != "run.paused")
            raise ConfigError(
                f"{change.key} stands in record 0 and cannot change. What can: {known}, and of [strategy] "
                f"lr, weight_decay and what else only acts in a round. For the rest start a new run."
            )


def _refuse_place(after: Course, place: Place) -> None:
    if place.is_over and after.n_rounds <= place.round:
        raise ConfigError(
            f"the run is over after round {place.round - 1}: this needs more rounds as well: "
            f"thinwire run STATE extend --rounds N --set KEY=VALUE"
        )
    if after.n_rounds < place.round:
        raise ConfigError(f"run.rounds: the run is at round {place.round} already: stop ends it now")
