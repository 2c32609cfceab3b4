"""Whom those are sent to who did not get a payload from whom they were told."""

from __future__ import annotations

from collections import Counter

from thinwire.coordinator.serving.deliveries import Deliveries
from thinwire.coordinator.serving.referring import Referring

MB = 10**6
X, Y = b"x" * 32, b"y" * 32


def test_what_a_lost_relay_was_to_give_is_shared_by_all_lines() -> None:
    deliveries = Deliveries()
    children = [f"p{i}" for i in range(9)]
    deliveries.told(X, dict.fromkeys(children, "relay") | {"q": "other"}, MB, "maker")
    deliveries.told(Y, dict.fromkeys(children, "relay"), MB, None)
    referring = Referring(deliveries, MB, {"relay": 1000 * MB, "other": 3 * MB, "maker": 2 * MB})
    named = [referring.instead(child, X, 0.0) for child in children]
    assert Counter(named) == {None: 1, "maker": 3, "other": 5}
    assert referring.instead("p0", Y, 0.0) is None, "nobody else has it, as far as others reach"
    assert referring.instead("other", X, 100.0) == "maker", "nobody is sent to itself"
    assert referring.instead("q", X, 200.0) == "maker", "the other one has given nothing"
    assert referring.instead("p0", b"?" * 32, 0.0) is None
    deliveries.asked("q", X)
    assert deliveries.holders(X) == (MB, set()), "in vain, what was said here, too"


def test_a_coordinator_with_the_widest_line_sends_by_itself() -> None:
    deliveries = Deliveries()
    deliveries.told(X, {"a": "relay", "b": "relay"}, MB, "maker")
    referring = Referring(deliveries, 1000 * MB, {"relay": MB, "maker": MB})
    assert {referring.instead(peer, X, 0.0) for peer in "ab"} == {None}
