"""What a link's network thread tells the node's threads: that commits came, events, and why it ended."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from ...compression.errors import ThinwireError
from .base import LinkEvent

_MAX_EVENTS = 256


class Mailbox:
    """Thread-safe. The network thread puts, the node's threads take and wait."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._events: deque[LinkEvent] = deque(maxlen=_MAX_EVENTS)
        self._error: ThinwireError | None = None
        self._is_closed = False

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    def commits_came(self) -> None:
        """Whoever waits for commits looks again."""
        with self._changed:
            self._changed.notify_all()

    def put_event(self, text: str, warning: bool = False) -> None:
        """The oldest events are forgotten when nobody reads them."""
        with self._changed:
            self._events.append(LinkEvent(text, warning))
            self._changed.notify_all()

    def fail(self, error: ThinwireError) -> None:
        """There will be no more commits; the first reason counts."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def wait(self, is_there: Callable[[], bool]) -> bool:
        """Blocks until `is_there`; False once closed. Raises the reason of a failure if it will never be."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or is_there() or self._error is not None)
            if self._is_closed:
                return False
            if self._error is not None and not is_there():
                raise self._error
            return True

    def take_event(self) -> LinkEvent | None:
        """Blocks. None once closed and all events are taken."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._events)
            return self._events.popleft() if self._events else None
