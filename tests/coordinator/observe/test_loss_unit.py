"""What losses are measured in, and what tells how much text a token is."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from thinwire.coordinator.observe.loss_unit import LossUnit
from thinwire.coordinator.protocol.figures import bytes_per_token
from thinwire.coordinator.protocol.settings import TaskSection


def file_of(header: Any) -> io.BytesIO:
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return io.BytesIO(len(data).to_bytes(8, "little") + data)


@pytest.mark.parametrize(
    ("task", "unit"),
    [
        ({"name": "text"}, "nats/byte"),
        ({"name": "hf"}, "nats/token"),
        ({"name": "hf", "prompt": "{text} It was"}, "nats/example"),
        ({"name": "custom"}, "nats"),
        ({}, "nats"),
    ],
)
def test_the_unit_is_that_of_the_task(task: dict[str, Any], unit: str) -> None:
    assert TaskSection.model_validate({**task, "context": 64}).loss_unit == unit


def test_notes_beside_held_out_tokens_say_how_much_text_they_are() -> None:
    file = file_of({"__metadata__": {"bytes_per_token": "3.5000"}, "ids": {}})
    assert bytes_per_token(file) == 3.5
    assert LossUnit("nats/token", file_of({"__metadata__": {"bytes_per_token": "3.5"}})).figures() == {
        "loss_unit": "nats/token",
        "bytes_per_token": 3.5,
    }
    other = file_of({"__metadata__": {"bytes_per_token": "3.5"}})
    assert LossUnit("nats/byte", other).figures()["bytes_per_token"] is None
    assert other.closed
    assert LossUnit("nats", None).figures() == {"loss_unit": "nats", "bytes_per_token": None}


@pytest.mark.parametrize(
    "header",
    [
        {},
        [],
        {"__metadata__": {"bytes_per_token": "nan"}},
        {"__metadata__": {"bytes_per_token": "-1"}},
        {"__metadata__": {"bytes_per_token": []}},
        b"no json",
        b"[" * 60_000,
        b"\xff",
        b"x" * 70_000,
    ],
)
def test_held_out_data_of_any_other_kind_say_nothing(header: Any) -> None:
    assert bytes_per_token(file_of(header)) is None
    assert bytes_per_token(io.BytesIO(b"text of a run, held out")) is None
    assert bytes_per_token(io.BytesIO(b"")) is None
