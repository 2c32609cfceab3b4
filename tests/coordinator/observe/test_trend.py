"""What the page shows of a run's past: points of equally many rounds, the same live and after a restart."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from typing import Any

import pytest

from tests.support.records import commit_body, unsigned
from thinwire.coordinator.observe.page_history import (
    KEPT_HAPPENINGS,
    MAX_SAVED_BYTES,
    TOGETHER_MS,
    Happening,
    PageHistory,
    printable,
)
from thinwire.coordinator.observe.trend import MAX_POINTS, Trend
from thinwire.coordinator.protocol.figures import MAX_LOSS
from thinwire.coordinator.protocol.messages import (
    Commit,
    CommitBody,
    Heartbeat,
    OfferEntry,
    Phases,
)

RUN = "ab" * 32


def body(round_: int, *losses: float | None, time_ms: int | None = None, n_tokens: int = 10) -> CommitBody:
    offers = tuple(
        OfferEntry(
            peer=i, n_samples=i + 1, n_tokens=n_tokens, loss=loss, n_bytes=100, payload=b"", digest=None
        )
        for i, loss in enumerate(losses)
    )
    return commit_body(round_, offers=offers, time_ms=round_ * 500 if time_ms is None else time_ms)


def commit(*args: Any, **options: Any) -> Commit:
    return unsigned(body(*args, **options))


def commits(n: int) -> Iterable[Commit]:
    return (commit(i, 5 - i / n, 5 - i / n) for i in range(1, n + 1))


def beat(round_: int, sent_bytes: int = 0, *, rounds: int = 0, ms: int = 0) -> Heartbeat:
    """`ms`: total of each phase."""
    phases = Phases(rounds=rounds, compute_ms=ms, pack_ms=ms, exchange_ms=ms, apply_ms=ms)
    return Heartbeat(round=round_, sent_bytes=sent_bytes, received_bytes=0, payload_bytes=0, phases=phases)


def column(trend: Trend, name: str) -> dict[int, Any]:
    """Round -> what is known there."""
    points = trend.points()
    pairs = zip(points["round"], points[name], strict=True)
    return {round_: value for round_, value in pairs if value is not None}


def test_a_point_per_round_at_first() -> None:
    trend = Trend(n_params=1000)
    trend.held_out(0, 6.0)
    trend.committed(body(1, 5.0, 3.0))
    trend.committed(body(2, None, 2.0, 4.0, 3.0))
    trend.closed(2, 0.25)
    trend.held_out(2, 3.5)
    assert column(trend, "loss") == {1: 4.0, 2: 3.0}
    assert column(trend, "held_out") == {0: 6.0, 2: 3.5}
    assert column(trend, "payload") == {1: 100, 2: 100}
    assert column(trend, "ddp") == {1: 4000, 2: 6000}
    assert column(trend, "round_s") == {2: 0.25}
    trend.committed(body(3, 1.0))
    assert column(trend, "round_s") == {
        2: 0.25,
        3: 0.5,
    }  # by the ledger
    assert column(trend, "ddp")[3] == 4000  # one offer alone says little of how many there are


def test_data_parallel_does_not_jump_when_a_round_closes_with_one_offer() -> None:
    """It would send nothing at all then, by the formula."""
    trend = Trend(n_params=1000)
    for round_ in range(1, 60):
        trend.committed(body(round_, *([1.0] if round_ % 6 == 0 else [1.0] * 4)))
    assert set(trend.points()["ddp"][1:]) == {6000.0}


@pytest.mark.parametrize("n", [1, MAX_POINTS - 1, MAX_POINTS, 1000, 5000])
def test_points_are_bounded_and_hold_every_round_once(n: int) -> None:
    trend = Trend(n_params=1)
    for i in range(1, n + 1):
        trend.committed(body(i, float(i)))
        trend.held_out(i, float(-i))
    points = trend.points()
    assert MAX_POINTS / 2 <= len(points["round"]) <= MAX_POINTS or trend.width == 1
    assert points["round"] == sorted(set(points["round"]))
    assert points["round"][-1] == n
    width = trend.width
    for round_, loss in column(trend, "loss").items():
        inside = [i for i in range(round_ - round_ % width, round_ + 1) if i >= 1]
        assert loss == pytest.approx(sum(inside) / len(inside), rel=1e-4)


def test_a_million_rounds_stay_small() -> None:
    trend, one = Trend(n_params=10**9), body(1, 1.2345678, 2.3456789, time_ms=0)
    for i in range(1, 10**6 + 1, 97):  # rounds between them would go into the same points
        trend.committed(one.model_copy(update={"round": i, "time_ms": i}))
        trend.closed(i, 0.123456789)
        trend.spread(i, 97, compute=1.1, pack=0.1, exchange=3.3, apply=0.1, phased=97)
        trend.spread(i, 97, sent=123456.0, beaten=97)
    assert trend.points()["round"][-1] == 999_974
    assert len(json.dumps(trend.points(), allow_nan=False)) < 64_000
    assert len(json.dumps(trend.saved(), allow_nan=False)) < 64_000


def test_who_has_seen_a_stamp_gets_what_came_later() -> None:
    trend = Trend(n_params=1)
    seen: dict[int, Any] = {}
    since, width = 0, 1
    for i in range(1, 3 * MAX_POINTS):
        trend.committed(body(i, float(i)))
        if i % 7 == 0:
            trend.spread(i, 5, compute=1.0, pack=0.0, exchange=0.0, apply=0.0, phased=5)
        if i % 3 == 0:
            points = trend.points(since)
            since = trend.stamp
            if points["width"] != width:
                seen.clear()
            assert len(points["index"]) <= 8 or points["width"] != width
            width = points["width"]
            seen.update(dict(zip(points["index"], points["loss"], strict=True)))
            whole = trend.points()
            assert seen == dict(zip(whole["index"], whole["loss"], strict=True))
    assert trend.points(trend.stamp)["index"] == []


def test_what_is_heard_at_once_is_spread_over_its_rounds() -> None:
    trend = Trend(n_params=1)
    for i in range(1, 11):
        trend.committed(body(i, 1.0))
    trend.spread(8, 4, compute=2.0, pack=0.4, exchange=1.0, apply=0.1, phased=4)
    trend.spread(10, 2, compute=3.0, pack=0.0, exchange=0.0, apply=0.0, phased=2)
    assert column(trend, "compute") == {5: 0.5, 6: 0.5, 7: 0.5, 8: 0.5, 9: 1.5, 10: 1.5}
    assert column(trend, "pack")[5] == 0.1
    trend.spread(2**32 - 1, 2**39, compute=2.0**39, pack=0.0, exchange=0.0, apply=0.0, phased=2**39)
    assert column(trend, "compute")[1] == 1.0  # bounded, whoever says it
    assert len(column(trend, "compute")) == 10


@pytest.mark.parametrize("n", [10, 700, 3000])
def test_restored_beside_the_ledger_it_is_what_it_was(n: int) -> None:
    draw = random.Random(n)
    live, again = PageHistory(1000), PageHistory(1000)
    held_out = []
    last = beat(0)
    for one in commits(n):
        round_ = one.body.round
        live.committed(one)
        live.closed(draw.choice(["complete", "deadline"]), draw.random())
        if round_ % 10 == 0:
            held_out.append((round_, 4.0))
            live.trend.held_out(round_, 4.0)
        assert last.phases is not None
        last = beat(
            round_, last.sent_bytes + 500, rounds=round_, ms=last.phases.apply_ms + draw.randrange(100)
        )
        live.beat(0, last)
    live.opened(0, "one GPU")
    live.happened(7, "lost", "somebody", 3)
    data = live.saved(RUN)
    assert len(data) < MAX_SAVED_BYTES
    for one in commits(n):
        again.committed(one)
    for round_, loss in held_out:
        again.trend.held_out(round_, loss)
    from_ledger = again.trend.points()
    again.restore(data, RUN)
    now, before = again.trend.points(), live.trend.points()
    assert now.keys() == before.keys()
    for name, values in before.items():
        if name != "width":
            assert [v is None for v in now[name]] == [v is None for v in values], name
            assert [v or 0 for v in now[name]] == pytest.approx([v or 0 for v in values], rel=1e-3), name
    for name in ("loss", "held_out", "payload", "ddp", "index", "round", "width"):
        assert from_ledger[name] == before[name], name  # without any file
    assert again.entries == live.entries
    assert again.happenings == live.happenings
    assert again.devices == live.devices
    assert again.paces() == live.paces()
    assert again.saved(RUN) == data


def test_a_file_that_is_not_of_this_ledger() -> None:
    live = PageHistory(10)
    for one in commits(40):
        live.committed(one)
        live.closed("complete", 2.0)
    live.happened(1, "joined", "a")
    data = live.saved(RUN)
    older = PageHistory(10)  # the ledger was restored from an older copy
    for one in commits(40):
        if one.body.round <= 20:
            older.committed(one)
    older.restore(data, RUN)
    assert set(column(older.trend, "round_s")) == set(range(1, 21))
    assert column(older.trend, "round_s")[20] == 2.0
    other = PageHistory(10)
    other.restore(data, "cd" * 32)
    assert not other.happenings


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: b"",
        lambda d: b"\xff\xfe",
        lambda d: b"[]",
        lambda d: d[: len(d) // 2],
        lambda d: d.replace(b'"joined"', b'"haunted"'),
        lambda d: d.replace(b'"width":1', b'"width":0'),
        lambda d: d.replace(b'"width":1', b'"width":"x"'),
        lambda d: d.replace(b'"timed":[0', b'"timed":[NaN'),
        lambda d: d.replace(b'"timed":[0', b'"timed":[1,0'),
    ],
)
def test_a_damaged_file_costs_its_figures_and_nothing_else(
    damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    live = PageHistory(10)
    live.committed(commit(1, 1.0, 1.0))
    live.closed("complete", 2.0)
    live.happened(1, "joined", "a")
    data = damage(live.saved(RUN))
    assert data != live.saved(RUN)
    again = PageHistory(10)
    again.committed(commit(1, 1.0, 1.0))
    again.restore(data, RUN)
    assert not again.happenings
    assert again.entries[0].why is None
    assert "begins anew" in caplog.text


def test_heartbeats_count_from_the_second_one_on() -> None:
    page_history = PageHistory(10)
    for one in commits(20):
        page_history.committed(one)
    page_history.beat(0, beat(10, 10**9, rounds=10, ms=10**6))  # all that it did before we were started
    assert not column(page_history.trend, "sent")
    page_history.beat(0, beat(12, 10**9 + 500, rounds=12, ms=10**6 + 3000))
    assert column(page_history.trend, "sent") == {11: 250, 12: 250}
    assert column(page_history.trend, "exchange") == {11: 1.5, 12: 1.5}
    page_history.beat(0, beat(0))  # the node was started again
    page_history.beat(0, beat(14, 100, rounds=1, ms=700))
    assert column(page_history.trend, "exchange")[14] == 0.7
    silent = Heartbeat(round=20, sent_bytes=900, received_bytes=0, payload_bytes=0)
    page_history.beat(0, silent)
    assert 20 not in column(page_history.trend, "exchange")


def test_the_same_thing_again_is_counted() -> None:
    page_history = PageHistory(10)
    page_history.rejected(1000, {"late_offer": 3, "token": 1})
    page_history.rejected(2000, {"late_offer": 3, "token": 5})
    assert list(page_history.happenings) == [
        Happening(1000, "rejected", "late_offer", 3),
        Happening(2000, "rejected", "token", 5),
    ]
    page_history.rejected(2000 + TOGETHER_MS, {"late_offer": 3, "token": 6})
    assert [h.n for h in page_history.happenings] == [3, 5, 1]
    for i in range(1000):
        page_history.happened(i, "lost", f"peer {i}")
    assert len(page_history.happenings) == KEPT_HAPPENINGS


def test_speed_and_share_of_the_recent_rounds() -> None:
    page_history = PageHistory(10)
    assert page_history.paces() == {}
    page_history.committed(commit(1, 1.0, 1.0, 1.0))
    assert page_history.paces()[2].share == 0.5
    assert page_history.paces()[2].tokens_per_s is None
    for i in range(2, 40):
        page_history.committed(commit(i, 1.0, 1.0, time_ms=i * 500, n_tokens=0 if i % 2 else 10))
    paces = page_history.paces()
    assert set(paces) == {0, 1}  # the third has not counted for a while
    assert [round(p.share, 3) for p in paces.values()] == [0.333, 0.667]
    assert paces[0].tokens_per_s == 10
    assert paces[1].samples_per_s == 4


def test_what_peers_say_is_one_bounded_line() -> None:
    assert printable("AMD EPYC 7B13") == "AMD EPYC 7B13"
    assert printable("a\nb\x00c\u202ed\u200be") == "a bcde"
    assert printable("<script>alert(1)</script>") == "<script>alert(1)</script>"  # escaped where it is shown
    assert len(printable("x" * 1000)) == 60


def test_losses_beyond_reason_stay_numbers() -> None:
    page_history = PageHistory(10)
    for i in range(1, 2000):
        page_history.committed(commit(i, 1.7e308, 1.7e308))
    json.dumps(page_history.trend.points(), allow_nan=False)
    assert page_history.entries[-1].loss == MAX_LOSS
