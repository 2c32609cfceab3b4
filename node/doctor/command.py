"""`thinwire doctor`: is this machine fit to join? A tick or a remedy per line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ...coordinator.protocol.ticket import Ticket
from ..system.folder import default_folder
from ..system.output import make_console, to_stdout
from .findings import Check, Finding, Status, Stopped, examine

_SIGNS: Final[dict[Status, tuple[str, str, str]]] = {  # sign, the same in ASCII, colour
    "ok": ("✓", "ok", "green"),
    "warning": ("!", "!!", "yellow"),
    "failed": ("✗", "XX", "bold red"),
    "skipped": ("-", "--", "dim"),
}
_NAME_WIDTH = 24
_MARGIN = 4


def doctor(
    ticket: str | None,
    *,
    state: Path | None,
    host: str,
    port: int,
    announce: tuple[str, ...],
    as_json: bool,
    stopped: Stopped,
) -> bool:
    """Prints what it finds on stdout; whether nothing failed. Raises ConfigError for bad arguments."""
    parsed = None if ticket is None else Ticket.parse(ticket)
    folder = default_folder(os.environ) if state is None else state
    found = list(_shown(_checks(parsed, folder, host, port, announce), stopped, as_json))
    is_ok = all(finding.status != "failed" for finding in found)
    if stopped():
        return is_ok
    if as_json:
        to_stdout(json.dumps({"ok": is_ok, "checks": [finding.as_json() for finding in found]}))
    else:
        _console().print(_verdict(found))
    return is_ok


def _checks(
    ticket: Ticket | None, folder: Path, host: str, port: int, announce: tuple[str, ...]
) -> list[Check]:
    from .disk import check_disk
    from .machine import check_machine, check_python
    from .network import NetworkPlan, check_network

    plan = NetworkPlan(host, port, announce, ticket)
    return [
        Check("python", check_python),
        Check("machine", check_machine, limit_s=60.0),
        Check("kernels", _check_compilers, limit_s=60.0),
        Check("devices", _check_devices, limit_s=60.0),
        Check("self-test", _check_kernels, limit_s=120.0),
        Check("disk", partial(check_disk, folder)),
        Check("network", partial(check_network, plan), limit_s=60.0),
    ]


# Importing torch is part of these checks: a broken one is a line, not a traceback.


def _check_compilers(stopped: Stopped) -> Iterator[Finding]:
    from .compute import check_compilers

    return check_compilers(stopped)


def _check_devices(stopped: Stopped) -> Iterator[Finding]:
    from .compute import check_devices

    return check_devices(stopped)


def _check_kernels(stopped: Stopped) -> Iterator[Finding]:
    from .compute import check_kernels

    return check_kernels(stopped)


def _shown(checks: Sequence[Check], stopped: Stopped, as_json: bool) -> Iterator[Finding]:
    for finding in examine(checks, stopped):
        if not as_json:
            _print(finding)
        yield finding


def _print(finding: Finding) -> None:
    sign, ascii_sign, colour = _SIGNS[finding.status]
    can_show, console = _can_show("✓✗→"), _console()
    style = "dim" if finding.status == "skipped" else ""
    head = ((f"{sign if can_show else ascii_sign} ", colour), (f"{finding.name:{_NAME_WIDTH}} ", style))
    console.print(_line(Text.assemble(*head), Text(finding.detail, style)))
    if finding.remedy is not None:
        arrow = f"{' ' * _MARGIN}{'→' if can_show else '->'} "
        console.print(_line(Text(arrow, colour), Text(finding.remedy, colour)))


def _line(head: Text, text: Text) -> Table:
    """Where the terminal is too narrow, the text goes on below its beginning."""
    line = Table.grid()
    line.add_column(no_wrap=True)
    line.add_column(overflow="fold")
    line.add_row(head, text)
    return line


def _can_show(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _console() -> Console:
    """On stdout: in colour and as wide as the terminal; plain and one line each where there is none."""
    return make_console(highlight=False, markup=False)


def _verdict(found: Sequence[Finding]) -> str:
    n_failed, n_warnings = (sum(f.status == status for f in found) for status in ("failed", "warning"))
    warnings = f"{n_warnings} warning{'s' * (n_warnings != 1)}" if n_warnings else "no warnings"
    if n_failed:
        return f"{n_failed} to mend before this machine joins, {warnings}"
    return f"this machine can join ({warnings})"
