"""What a link's network thread hands to the node's thread: commits, events and the reason of an end."""

from __future__ import annotations

import threading
from collections import deque

from thinwire.compression.errors import ThinwireError
from thinwire.coordinator.messages import Commit
from thinwire.node.link import LinkEvent

MAX_COMMIT_BYTES = 32 * 2**20
"""Commits that wait for the node; the rest wait at the coordinator."""

_MAX_EVENTS = 256


class Mailbox:
    """Thread-safe. The network thread puts, the node's threads take and wait."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._commits: deque[Commit] = deque()
        self._n_bytes = 0
        self._events: deque[LinkEvent] = deque(maxlen=_MAX_EVENTS)
        self._error: ThinwireError | None = None
        self._is_closed = False

    @property
    def is_full(self) -> bool:
        with self._changed:
            return self._n_bytes >= MAX_COMMIT_BYTES

    def put_commit(self, commit: Commit) -> None:
        with self._changed:
            self._commits.append(commit)
            self._n_bytes += len(commit.record)
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

    def clear_commits(self) -> None:
        with self._changed:
            self._commits.clear()
            self._n_bytes = 0

    def take_commit(self) -> Commit | None:
        """Blocks. None once closed; raises the reason of a failure when all commits before it are taken."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._commits or self._error)
            if self._is_closed:
                return None
            if not self._commits and self._error is not None:
                raise self._error
            commit = self._commits.popleft()
            self._n_bytes -= len(commit.record)
            return commit

    def take_event(self) -> LinkEvent | None:
        """Blocks. None once closed and all events are taken."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._events)
            return self._events.popleft() if self._events else None
