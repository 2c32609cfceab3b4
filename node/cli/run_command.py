"""`thinwire run STATE ...`: change a run for everybody, in its ledger, with the coordinator's key."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...compression.errors import ConfigError
from ...coordinator.control.orders import Order
from ...coordinator.control.owner import give_order
from ...coordinator.control.wire import Answer
from ...coordinator.protocol.messages import MAX_CHANGES, MAX_ROUND, Change

if TYPE_CHECKING:
    from ..system.stopping import Stop

log = logging.getLogger("thinwire.coordinator")

What = Literal["set", "extend", "pause", "resume", "stop"]


def change_run(state: Path, what: What, rounds: int | None, settings: Mapping[str, Any], stop: Stop) -> str:
    """What has been done, in words. Raises ConfigError (refused), SwarmUnreachable and LedgerCorrupt."""
    order = _order(what, rounds, settings)
    answer = give_order(state, order, _check_changes, _tell, stop.is_set)
    return f"in the ledger, record {answer.round}: {'; '.join(answer.told)}"


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
