"""Waiting for something that another thread or process does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

WAIT_S = 20.0
"""For what takes milliseconds where nothing else is to do."""


def wait_until(condition: Callable[[], bool], timeout_s: float, why: Callable[[], str]) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, why()
        time.sleep(0.02)


def eventually(condition: Callable[[], bool], timeout_s: float = WAIT_S) -> bool:
    """Whether it comes true in time."""
    deadline_s = time.monotonic() + timeout_s
    while not (is_true := condition()) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return is_true


def within(what: Callable[[], Any], timeout_s: float = WAIT_S) -> Any:
    """The result of `what`, run in a thread of its own for at most so long."""
    result: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            result.append(what())
        except BaseException as e:  # noqa: BLE001 - handed on to the test
            errors.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    assert not thread.is_alive(), "still waiting"
    if errors:
        raise errors[0]
    return result[0]
