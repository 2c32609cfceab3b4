"""Changes of a run in its records: their bytes, what is refused, and the settings that follow from them."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from tests.support.records import OFFER, commit_body
from thinwire.compression.errors import ConfigError
from thinwire.coordinator.protocol.messages import (
    BadMessage,
    Change,
    CommitBody,
    OfferEntry,
    decode_record,
    encode_record,
)
from thinwire.coordinator.protocol.settings import Course
from thinwire.node.config import RunConfig


def body(*changes: Change, offers: tuple[OfferEntry, ...] = (OFFER,)) -> CommitBody:
    return commit_body(3, offers=offers, changes=changes)


def raw(changes: Any) -> bytes:
    packed: bytes = msgpack.packb([*body().to_list()[:9], changes])
    return packed


def test_a_record_without_changes_has_the_bytes_that_it_always_had() -> None:
    fields = msgpack.unpackb(encode_record(body()))
    assert len(fields) == 9
    assert decode_record(CommitBody, encode_record(body())).changes == ()


def test_changes_travel_in_records() -> None:
    changes = (
        Change(key="run.paused", value=False),
        Change(key="run.rounds", value=300),
        Change(key="schedule.name", value="constant"),
        Change(key="strategy.lr", value=0.001),
    )
    for offers in ((OFFER,), ()):
        sent = body(*changes, offers=offers)
        found = decode_record(CommitBody, encode_record(sent))
        assert found == sent
        assert [type(change.value) for change in found.changes] == [bool, int, str, float]


@pytest.mark.parametrize(
    "changes",
    [
        [],
        None,
        7,
        "strategy.lr",
        [["strategy.lr"]],
        [["strategy.lr", 1, 2]],
        [["strategy.lr", None]],
        [["strategy.lr", [1]]],
        [["strategy.lr", b"1"]],
        [["strategy.lr", float("nan")]],
        [["strategy.lr", float("inf")]],
        [["strategy.lr", "x" * 101]],
        [["lr", 1]],
        [["strategy.Lr", 1]],
        [["strategy." + "l" * 60, 1]],
        [["strategy.lr", 1], ["strategy.lr", 2]],
        [["strategy.lr", 1], ["run.rounds", 2]],
        [[f"strategy.a{i:02}", 1] for i in range(33)],
    ],
)
def test_bad_changes_are_refused(changes: Any) -> None:
    with pytest.raises(BadMessage):
        decode_record(CommitBody, raw(changes))


def test_every_cut_and_every_flipped_byte_is_read_or_refused() -> None:
    whole = encode_record(body(Change(key="strategy.lr", value=0.001)))
    for cut in range(len(whole)):
        with pytest.raises(BadMessage):
            decode_record(CommitBody, whole[:cut])
    for i in range(len(whole)):
        damaged = whole[:i] + bytes([whole[i] ^ 0x41]) + whole[i + 1 :]
        try:
            assert encode_record(decode_record(CommitBody, damaged)) is not None
        except BadMessage:
            continue


def test_a_number_fits_into_a_record() -> None:
    """Else it would be refused only while the record is written."""
    for number in (2**63, 2**70, -(2**63) - 1):
        encode_record(body(Change(key="strategy.lr", value=number)))


def test_a_record_has_offers_or_changes() -> None:
    with pytest.raises(ValueError, match="a commit has offers or changes"):
        body(offers=())


# ------------------------------------------------------------------------------------------------ settings


def course() -> Course:
    return Course.of(RunConfig(strategy={"name": "spsa", "lr": 0.01}).to_json())


def test_settings_follow_from_the_records() -> None:
    start = course()
    changed = start.after((Change(key="run.paused", value=True), Change(key="run.rounds", value=300)))
    changed = changed.after((Change(key="strategy.lr", value=0.001),))
    assert (changed.n_rounds, changed.is_paused, changed.strategy["lr"]) == (300, True, 0.001)
    assert (start.n_rounds, start.is_paused, start.strategy["lr"]) == (200, False, 0.01)
    assert changed == Course.of(RunConfig(strategy={"name": "spsa", "lr": 0.01}).to_json(), changed.changes)
    assert [c.key for c in changed.changes] == ["run.paused", "run.rounds", "strategy.lr"]
    later = changed.after((Change(key="run.paused", value=False),))
    assert [c.value for c in later.changes] == [False, 300, 0.001]


def test_words_in_a_record_move_no_cursor() -> None:
    (told,) = course().told((Change(key="strategy.name", value="a\x1b[2J"),))
    assert told == r"strategy.name spsa -> 'a\x1b[2J'"


def test_changes_are_told_with_what_was_there_before() -> None:
    told = course().told(
        (
            Change(key="run.paused", value=True),
            Change(key="schedule.name", value="constant"),
            Change(key="strategy.lr", value=0.001),
        )
    )
    assert told == ["paused", "schedule.name linear -> constant", "strategy.lr 0.01 -> 0.001"]


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("run.seed", 2, "run.seed cannot be changed"),
        ("task.batch", 2, "task.batch cannot be changed"),
        ("run.rounds", 0, "run.rounds"),
        ("run.rounds", "many", "run.rounds"),
        ("run.rounds", "10", "run.rounds"),
        ("run.rounds", True, "run.rounds"),
        ("schedule.warmup_rounds", 2.0, "schedule.warmup_rounds"),
        ("schedule.final_factor", True, "schedule.final_factor"),
        ("run.paused", 1, "true or false"),
        ("schedule.name", "wild", "schedule.name"),
        ("schedule.final_factor", 2.0, "schedule.final_factor"),
    ],
)
def test_what_stands_in_record_0_cannot_change(key: str, value: Any, text: str) -> None:
    if key in ("run.seed", "task.batch"):  # of a later thinwire, maybe
        with pytest.raises(ConfigError, match=text):
            course().told((Change(key=key, value=value),))
    with pytest.raises(ConfigError, match=text):
        course().after((Change(key=key, value=value),))
