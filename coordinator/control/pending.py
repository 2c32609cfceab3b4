"""Changes of a run that its owner has ordered and no record carries yet."""

from __future__ import annotations

from ..protocol.messages import Change, Changes
from ..protocol.settings import Course, in_order
from .orders import CheckStrategy, Order, Ordered, Place, plan


class PendingChanges:
    """Wait for the record that closes the open round. `check`: of the strategy's options."""

    def __init__(self, check: CheckStrategy) -> None:
        self._check = check
        self._by_key: dict[str, Change] = {}

    def __bool__(self) -> bool:
        return bool(self._by_key)

    def add(self, order: Order, course: Course, place: Place) -> Ordered:
        """`course`: after the newest record. Raises ConfigError, with nothing added."""
        ordered = plan(order, self.course(course), place, self._check)
        self._by_key.update((change.key, change) for change in ordered.changes)
        return ordered

    def course(self, course: Course) -> Course:
        """What holds once they are in the ledger."""
        return course.after(in_order(self._by_key))

    def take(self) -> Changes:
        """For a record: none waits any more."""
        changes, self._by_key = in_order(self._by_key), {}
        return changes
