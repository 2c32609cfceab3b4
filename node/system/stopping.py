"""Signals: the first one asks a command to stop cleanly, the second one stops it at once."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

log = logging.getLogger("thinwire.cli")


@dataclass
class Stop:
    """Set by the first signal; `on_stop` callbacks run in the signal handler."""

    signal: int = 0
    on_stop: list[Callable[[], object]] = field(default_factory=list)

    def is_set(self) -> bool:
        return self.signal != 0

    def request(self, number: int) -> None:
        """As that signal does; only the first one counts."""
        if not self.signal:
            self.signal = number
            for callback in self.on_stop:
                callback()


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """The first Ctrl-C, SIGTERM or SIGHUP asks to stop cleanly, the second one stops at once.

    What was ignored when the command was started stays so: SIGHUP under nohup, SIGINT in a script's
    background job. SIGTERM always ends it.
    """
    stop = Stop()

    def tell() -> None:
        log.warning("%s: leaving cleanly (again to stop at once)", signal.Signals(stop.signal).name)

    def handle(number: int, _frame: FrameType | None) -> None:
        if stop.signal:
            raise KeyboardInterrupt
        stop.request(number)

    stop.on_stop.append(tell)

    ignored = {s for s in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(s) is signal.SIG_IGN}
    handled = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP} - ignored
    before = {s: signal.signal(s, handle) for s in handled}
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
