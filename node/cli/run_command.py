"""`thinwire run STATE ...`: change a run for everybody, in its ledger, with the coordinator's key."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...compression.errors import ConfigError
from ...coordinator.control.orders import MAX_BANS, MAX_NAMED, Order
from ...coordinator.control.owner import give_order
from ...coordinator.control.wire import Answer
from ...coordinator.entry.tickets import ticket_with
from ...coordinator.protocol.messages import MAX_CHANGES, MAX_ROUND, Change

if TYPE_CHECKING:
    from ..system.stopping import Stop

log = logging.getLogger("thinwire.coordinator")

What = Literal["set", "extend", "pause", "resume", "stop"]
Guard = Literal["ban", "unban", "rotate-token", "open", "invited", "listed"]
Seating = Literal["seats", "replace", "remove"]


def change_run(state: Path, what: What, rounds: int | None, settings: Mapping[str, Any], stop: Stop) -> str:
    """What has been done, in words. Raises ConfigError (refused), SwarmUnreachable and LedgerCorrupt."""
    order = _order(what, rounds, settings)
    answer = give_order(state, order, _check_changes, _tell, stop.is_set)
    return f"in the ledger, record {answer.round}: {'; '.join(answer.told)}"


def guard_run(state: Path, what: Guard, peers: Sequence[str], stop: Stop) -> str:
    """What has been done about who may come in, in words, or the new ticket. Raises as `change_run` does."""
    if what == "rotate-token" and peers:
        raise ConfigError("rotate-token takes nothing else: thinwire run STATE rotate-token")
    most = MAX_NAMED if what == "listed" else MAX_BANS
    if len(peers) > most or any(not 1 <= len(peer) <= 100 for peer in peers):
        raise ConfigError(f"{what} takes peer ids (12D3Koo...), at most {most} at a time")
    answer = give_order(state, Order(what=what, peers=tuple(peers)), _check_changes, _tell, stop.is_set)
    if what != "rotate-token":
        return "; ".join(answer.told)
    log.info("%s. The new ticket:", "; ".join(answer.told))
    return ticket_with(state, (state / "token").read_text("ascii").strip()).line()


def seat_run(state: Path, what: Seating, words: Sequence[str], stop: Stop) -> str:
    """What is to become of the run's coordinators, in words. Raises as `change_run` does."""
    if len(words) != 1:
        raise ConfigError(
            f"{what} takes one word: thinwire run STATE seats 3, or replace | remove 12D3Koo..."
        )
    if what != "seats":
        order = Order(what=what, peers=(words[0],))
    elif words[0].isdigit() and len(words[0]) < 3:
        order = Order(what=what, rounds=int(words[0]))
    else:
        raise ConfigError(f"seats {words[0]}: how many coordinators are there to be?")
    return "; ".join(give_order(state, order, _check_changes, _tell, stop.is_set).told)


def _order(what: What, rounds: int | None, settings: Mapping[str, Any]) -> Order:
    if (rounds is not None) != (what == "extend"):
        raise ConfigError("--rounds N goes with extend, which needs it: thinwire run STATE extend --rounds N")
    if settings and what not in ("set", "extend"):
        raise ConfigError(f"{what} takes no settings: thinwire run STATE set KEY=VALUE")
    if not 0 <= (rounds or 0) <= MAX_ROUND or len(settings) > MAX_CHANGES:
        raise ConfigError(f"at most {MAX_ROUND} rounds and {MAX_CHANGES} settings")
    return Order(what=what, rounds=rounds or 0, changes=tuple(map(_change, settings, settings.values())))


def _change(key: str, value: Any) -> Change:
    try:
        return Change(key=key, value=value)
    except ValueError:
        raise ConfigError(
            f"{key}={value}: write it as section.key=value, with a number, a word or true"
        ) from None


def _check_changes(table: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    from ...optim.registry import check_changes

    check_changes(table, options)


def _tell(answer: Answer) -> None:
    log.info("comes with the record that closes round %d: %s (waiting)", answer.round, "; ".join(answer.told))
