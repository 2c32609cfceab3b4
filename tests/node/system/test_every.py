"""What is done every few seconds."""

from __future__ import annotations

from thinwire.node.system.every import Every


def test_it_is_due_after_so_many_seconds_and_then_again() -> None:
    now_s = 10.0
    every, at_once = Every(2.0, lambda: now_s), Every(2.0, lambda: now_s, at_once=True)
    due = []
    for second in range(10, 16):
        now_s = float(second)
        due.append((every.is_due(), at_once.is_due()))
    assert due == [(False, True), (False, False), (True, True), (False, False), (True, True), (False, False)]
