"""The coordinators of a run, for people in a terminal: who leads since when, and how far the others are."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ...coordinator.protocol.figures import counted, short
from ..system.output import shown
from .status import waits_in_words

_STYLES = {"leads": "green", "follows": "green", "rests": "yellow", "looks on": "yellow"}
_DAY_S = 86_400


def are_several(seat: Mapping[str, Any]) -> bool:
    """Of a status's `seat`: whether several coordinators order the run, or are to."""
    return len(seat.get("seats", ())) > 1 or seat.get("wanted", 0) > 1 or bool(seat.get("onlookers"))


def seats_shown(status: Mapping[str, Any]) -> list[RenderableType]:
    """Lines and a row for each; nothing, where one coordinator orders the run alone. One of an earlier build
    does not say it."""
    seat = status.get("seat")
    if not isinstance(seat, dict) or not are_several(seat):
        return []
    lines: list[RenderableType] = []
    if waits_for := seat.get("waits_for"):
        lines.append(Text(shown(waits_in_words(str(waits_for))), style="bold red"))
    lines.append(_table(seat))
    lines.append(Text(shown(reign_in_words(seat))))
    return lines


def reign_in_words(seat: Mapping[str, Any]) -> str:
    """Who leads since when, and how many elections that one has seen who says it."""
    leader, n_wanted, n = seat.get("leader"), seat.get("wanted", 0), len(seat["seats"])
    words = "nobody leads" if leader is None else f"{short(str(leader))} leads"
    if leader is not None and isinstance(since_ms := seat.get("since_ms"), int):
        words += f" since {_clock(since_ms / 1000)}"
    if n_elections := seat.get("elections"):
        words += f", {counted(n_elections, 'election')} since this one was started"
    if n_wanted > n:
        words += f"; {n_wanted} are wanted, {n_wanted - n} more to come"
    if n == 2:
        words += "; with two the loss of either stops the run: add a third (--replica)"
    return f"coordinators: {words}"


def headline_of(status: Mapping[str, Any]) -> str | None:
    """Who leads, for a line among others; None: there is but one coordinator."""
    seat = status.get("seat")
    if not isinstance(seat, dict) or len(seat.get("seats", ())) < 2:
        return None
    n = sum(bool(each.get("reachable")) for each in seat["seats"])
    leader = seat.get("leader")
    who = "no coordinator leads" if leader is None else f"coordinator …{str(leader)[-6:]} leads"
    return f"{who}, {n} of {len(seat['seats'])} reachable"


def _table(seat: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("coordinator", "role", "round", "behind"):
        table.add_column(name, justify="left" if name in ("coordinator", "role") else "right")
    for each in seat["seats"]:
        role = str(each.get("role", "-"))
        numbers = [each.get(name) for name in ("head", "lag")]
        cells = ["-" if number is None else str(number) for number in numbers]
        table.add_row(
            shown(short(str(each["peer_id"]))), Text(shown(role), style=_STYLES.get(role, "red")), *cells
        )
    for each in seat.get("onlookers", ()):
        lacks = f"looks on, lacks {each['lacks']}" if each.get("lacks") else "looks on, up to date"
        table.add_row(shown(short(str(each["peer_id"]))), Text(shown(lacks), style="yellow"), "-", "-")
    return table


def _clock(at_s: float) -> str:
    pattern = "%H:%M:%S" if time.time() - at_s < _DAY_S else "%Y-%m-%d %H:%M"
    return time.strftime(pattern, time.localtime(at_s))
