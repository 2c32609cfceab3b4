"""What `thinwire doctor` finds, and how its checks run: each one bounded, none able to hide the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Literal

from ...compression.errors import ThinwireError

Status = Literal["ok", "warning", "failed", "skipped"]
Stopped = Callable[[], bool]

_POLL_S = 0.05
_GOODBYE_S = 5.0
"""A check that was asked to stop gets this long to clear up behind itself."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. `remedy`: what to do about a warning or a failure; `figures`: JSON-able, units in names."""

    name: str
    status: Status
    detail: str
    remedy: str | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        own = {"name": self.name, "status": self.status, "detail": self.detail, "remedy": self.remedy}
        return {**own, **self.figures}


def ok(name: str, detail: str, **figures: Any) -> Finding:
    return Finding(name, "ok", detail, None, figures)


def warning(name: str, detail: str, remedy: str, **figures: Any) -> Finding:
    return Finding(name, "warning", detail, remedy, figures)


def failed(name: str, detail: str, remedy: str, **figures: Any) -> Finding:
    return Finding(name, "failed", detail, remedy, figures)


def skipped(name: str, detail: str, **figures: Any) -> Finding:
    return Finding(name, "skipped", detail, None, figures)


@dataclass(frozen=True, slots=True)
class Check:
    """`run` may raise: its error becomes a failure named `name`. It looks at `stopped` in its loops."""

    name: str
    run: Callable[[Stopped], Iterable[Finding]]
    limit_s: float = 15.0


def examine(checks: Sequence[Check], stopped: Stopped) -> Iterator[Finding]:
    """All findings in order, as they come; ends early when `stopped`."""
    for check in checks:
        if stopped():
            return
        yield from _bounded(check, stopped)


def _bounded(check: Check, stopped: Stopped) -> Iterator[Finding]:
    """In a thread of its own, which is left alone if it hangs: a dead network disk, a stuck driver."""
    found: SimpleQueue[Finding | None] = SimpleQueue()
    Thread(target=_work, args=(check, stopped, found), name=f"doctor-{check.name}", daemon=True).start()
    deadline_s = time.monotonic() + check.limit_s
    is_stopping = False
    while True:
        try:
            finding = found.get(timeout=_POLL_S)
        except Empty:
            if stopped() and not is_stopping:
                is_stopping, deadline_s = True, time.monotonic() + _GOODBYE_S
            if time.monotonic() > deadline_s:
                if not is_stopping:
                    yield failed(
                        check.name,
                        f"no result within {check.limit_s:g} s",
                        "something hangs: a network disk, a driver, a name server? Try again.",
                    )
                return
            continue
        if finding is None:
            return
        yield finding


def _work(check: Check, stopped: Stopped, found: SimpleQueue[Finding | None]) -> None:
    try:
        for finding in check.run(stopped):
            found.put(finding)
    except ThinwireError as e:
        found.put(failed(check.name, str(e), "mend this and try again"))
    except Exception as e:  # noqa: BLE001 - the edge: a check that breaks says so in its line
        text = str(e).strip()
        detail = f"{type(e).__name__}: {text}" if text else type(e).__name__
        found.put(failed(check.name, f"this could not be found out: {detail}", "report this line"))
    finally:
        found.put(None)
