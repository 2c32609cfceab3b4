"""Objects as plain data: what comes back is what was kept, and nothing but data of our own classes does."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from types import SimpleNamespace
from typing import Any

import msgpack
import pytest

from thinwire.coordinator.checkpoints.objects import Unkept, decode, encode
from thinwire.coordinator.observe.peer_sizes import Size
from thinwire.coordinator.observe.trend import Trend
from thinwire.coordinator.protocol.messages import Change, NodeState
from thinwire.coordinator.rounds import Rounds

LEDGER = SimpleNamespace()


def through(x: Any) -> Any:
    data = encode(x, lambda thing: "ledger" if thing is LEDGER else None)
    return decode(data, {"ledger": LEDGER}.__getitem__)


@pytest.mark.parametrize(
    "x",
    [
        [None, True, 0, -(2**63), 2**64 - 1, 0.1, float("inf"), "text", b"bytes", [], {}],
        {"a": (1, "b", (2.5,)), 7: {b"k": frozenset({1, 2})}, (1, 2): {3, 4}},
        [
            deque([1, 2], maxlen=5),
            deque(),
            Counter("abca"),
            defaultdict(list, {1: [2]}),
            defaultdict(Counter),
        ],
        [NodeState.LEAVING, Change(key="run.rounds", value=7), Size(1.5, 0.0, 3)],
    ],
)
def test_values_come_back_as_they_were(x: Any) -> None:
    again = through(x)
    assert again == x
    assert repr(again) == repr(x)
    assert encode(again, lambda _: None) == encode(x, lambda _: None)


def test_what_is_shared_is_shared_again_in_circles_too() -> None:
    circle: list[Any] = [LEDGER]
    circle += [circle, {"me": circle}]
    again = through(circle)
    assert again[0] is LEDGER
    assert again[1] is again
    assert again[2]["me"] is again


def test_objects_of_our_classes_and_their_methods() -> None:
    trend = Trend(100)
    trend.held_out(3, 2.5)
    again, method = through([trend, trend.held_out])
    assert type(again) is Trend
    assert method.__self__ is again
    method(4, 2.25)
    trend.held_out(4, 2.25)
    assert vars(again).keys() == vars(trend).keys()
    assert encode(again, lambda _: None) == encode(trend, lambda _: None)


@pytest.mark.parametrize(
    "x",
    [SimpleNamespace(), len, Trend, [2**64], OrderedDict(a=1), defaultdict(lambda: 3), [].append, lambda: 1],
)
def test_other_things_are_not_kept(x: Any) -> None:
    with pytest.raises(Unkept):
        encode([x], lambda _: None)


@pytest.mark.parametrize(
    "contents",
    [
        [],
        [[]],
        [["object", "os", "system", {}]],
        [["object", "builtins", "object", None]],
        [["object", "thinwire.coordinator.rounds", "replace", None]],  # a function
        [["object", "thinwire.coordinator.rounds", "Counter", None]],  # of another module
        [["object", "thinwire.coordinator.nothing", "Rounds", None]],
        [["type", [1]]],
        [["list", [[0, 9]]]],
        [["list", [[4, [5, "ledger"], "__init__"]]]],
        [["list", [[4, [0, 0], "append"]]]],
        [["list", [[5, "nothing"]]]],
        [["list", [[77]]]],
        [["list", [[6, "thinwire.coordinator.rounds", "Rounds", []]]]],
        [["list", [[6, "thinwire.coordinator.observe.peer_sizes", "Size", [1]]]]],
        [["list", 5]],
        [["dict", [1], []]],
        [["defaultdict", [], [], "eval"]],
        {"a": 1},
        7,
    ],
)
def test_other_bytes_are_refused(contents: Any) -> None:
    assert Rounds.__module__ == "thinwire.coordinator.rounds"
    with pytest.raises(Unkept):
        decode(msgpack.packb(contents), {"ledger": LEDGER}.__getitem__)
    with pytest.raises(Unkept):
        decode(msgpack.packb(contents)[:-1] + b"\xc1", {"ledger": LEDGER}.__getitem__)
