"""What several commands read from their arguments: tickets, addresses, options of a run file."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import tyro

from ...compression.errors import ConfigError

if TYPE_CHECKING:
    from ...coordinator.protocol.addresses import HttpAddress


optional = partial(tyro.conf.arg, help_behavior_hint="")
"""Of an option that nobody need give: its help says what holds then, and not that its default is None."""

_UNITS_S = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def read_ticket(text: str) -> str:
    if text == "-":
        return _ticket_of(sys.stdin)
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "not text"
        raise ConfigError(
            f"the ticket in {text[1:]}: {why}; thinwire coordinator --ticket-file writes one"
        ) from e


def _ticket_of(lines: TextIO) -> str:
    """Whole after the first line, unless it was wrapped; an empty line ends it, too."""
    from ...coordinator.protocol.ticket import MAX_CHARS

    text = ""
    while (line := lines.readline().strip()) and len(text) < MAX_CHARS:
        text += line
        if is_ticket(text):
            break
    return text


def with_whole_tickets(args: Sequence[str]) -> list[str]:
    """A ticket that was wrapped, and so came as several arguments, as one."""
    whole: list[str] = []
    for arg in args:
        is_piece = re.fullmatch(r"[\w-]+", arg) is not None and not arg.startswith("--")
        if is_piece and whole and whole[-1].startswith(("tw1-", "tw2-")) and not is_ticket(whole[-1]):
            whole[-1] += arg
        else:
            whole.append(arg)
    return whole


def is_ticket(text: str) -> bool:
    """Whether it is a whole one."""
    from ...coordinator.protocol.ticket import Ticket

    try:
        Ticket.parse(text)
    except ConfigError:
        return False
    return True


def http_address(text: str | None, token: str | None, names: Sequence[str] = ()) -> HttpAddress | None:
    """What --http, --http-token and --http-host say. Raises ConfigError."""
    from ...coordinator.protocol.addresses import HttpAddress

    if text is None:
        if token is not None:
            raise ConfigError("--http-token protects what --http HOST:PORT serves: say that, too")
        if names:
            raise ConfigError("--http-host names what --http HOST:PORT serves: say that, too")
        return None
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,253}", name):
            raise ConfigError(
                f"--http-host {name}: a name without a port is needed, for example swarm.example"
            )
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"--http {text}: write it as HOST:PORT, for example 127.0.0.1:9100")
    token = token or os.environ.get("THINWIRE_HTTP_TOKEN") or None
    return HttpAddress(host.strip("[]"), int(port), token, tuple(names))


def seconds_of(text: str, option: str) -> float:
    """A duration: 90s, 10m, 2h, 1d, 0, forever (infinite). Raises ConfigError."""
    if text == "forever":
        return math.inf
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h|d|)", text)
    if found is None or (not found[2] and float(found[1])):
        raise ConfigError(f"{option} {text}: write it as 90s, 10m, 2h, 0 or forever")
    return float(found[1]) * _UNITS_S[found[2]]


def overrides_of(pairs: Sequence[str]) -> dict[str, Any]:
    from ..config import literal

    overrides = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or "." not in key:
            raise ConfigError(f"--set {pair}: write it as section.key=value, for example run.rounds=500")
        overrides[key] = literal(value)
    return overrides
