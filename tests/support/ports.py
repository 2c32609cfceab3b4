"""Ports for servers that have to be told one beforehand."""

from __future__ import annotations

import itertools
import os
import socket

FIRST, LAST = 10_000, 32_000
"""Below those that a system gives out by itself: to whoever asks for any while this one is not bound yet."""

_WORKERS = 16
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _WORKERS
_first = os.getppid() * 131 % ((LAST - FIRST) // _WORKERS) * _WORKERS
_numbers = itertools.count(_first + _worker, _WORKERS)
"""Those of one worker are no other's: between this moment and the next anybody may bind what is free."""


def free_port() -> int:
    """Of 127.0.0.1, at this moment; not the same twice."""
    for number in _numbers:
        port = FIRST + number % (LAST - FIRST)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("numbers do not end")
