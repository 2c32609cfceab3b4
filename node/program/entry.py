"""Where the installed `thinwire` begins. Light: all else loads below, and whoever stops it meanwhile sees no
trace of where that was."""

from __future__ import annotations

import os
import signal
from typing import NoReturn


def entry() -> NoReturn:
    """The program: see `cli.main.entry`."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else whoever has begun it wants it ignored
        signal.signal(signal.SIGINT, _leave)
    from ..cli.main import entry as begin

    signal.signal(signal.SIGINT, before)
    begin()


def _leave(number: int, _frame: object) -> NoReturn:
    """Nothing has begun yet that would have to end well."""
    os._exit(128 + number)


if __name__ == "__main__":
    entry()
