"""Who gives payloads to whom: what each line carries, and that everybody gets everything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest

from thinwire.coordinator.serving.fanout import CHILDREN, KNOWN_LINES, Fanout

MBIT = 1e6 / 8


def sent(
    rates: Mapping[str, float], own: float, n_bytes: int, reachable: set[str] | None = None
) -> tuple[Counter[str], int]:
    """Payloads that each node sends in a round, its upload among them, and what the coordinator sends."""
    fanout = Fanout(own)
    for peer, rate in rates.items():
        fanout.uploaded(peer, int(rate), 1.0)
    by_peer, by_coordinator = Counter(dict.fromkeys(rates, 1)), 0
    for origin in rates:
        others = [peer for peer in rates if peer != origin]
        relays = rates.keys() if reachable is None else reachable
        sources = fanout.sources(n_bytes, origin, others, relays)
        assert sorted(sources) == sorted(others)
        got = {origin}
        for peer, source in sources.items():
            assert source is None or source in got, "who passes on is told first, and has it from elsewhere"
            got.add(peer)
            by_peer[source] += source is not None
            by_coordinator += source is None
    del by_peer[None]  # type: ignore[arg-type]
    return by_peer, by_coordinator


def alike(n: int, rate: float = 20 * MBIT) -> dict[str, float]:
    return {f"p{i}": rate for i in range(n)}


@pytest.mark.parametrize("n", [4, 8, 16, 64])
def test_a_coordinator_with_a_wide_line_sends_all_copies_and_nodes_upload_once(n: int) -> None:
    by_peer, by_coordinator = sent(alike(n), 10_000 * MBIT, 50_000)
    assert set(by_peer.values()) == {1}
    assert by_coordinator == n * (n - 1)


@pytest.mark.parametrize("n", [8, 16, 64])
def test_narrow_lines_upload_once_where_a_few_are_wide(n: int) -> None:
    """Bytes of all nodes stay what they are; whose they are does not."""
    wide = {f"r{i}": 10_000 * MBIT for i in range(max(2, n // 8))}
    by_peer, by_coordinator = sent(alike(n - len(wide)) | wide, 100 * MBIT, 1_000_000)
    assert {by_peer[peer] for peer in by_peer if peer not in wide} == {1}
    assert by_coordinator + sum(by_peer.values()) == n * n
    shares = [by_peer[peer] for peer in wide]
    assert max(shares) <= 1.6 * min(shares), "which of them carries what is dealt evenly"


def test_lines_that_are_alike_carry_alike() -> None:
    by_peer, by_coordinator = sent(alike(16), 20 * MBIT, 1_000_000)
    assert set(by_peer.values()) <= {14, 15}
    assert 15 <= by_coordinator <= 20


def test_lines_are_filled_in_proportion() -> None:
    """The coordinator takes a quarter longer, and what parts of copies add."""
    rates = {f"p{i}": (20 + 20 * i) * MBIT for i in range(16)}
    by_peer, by_coordinator = sent(rates, 100 * MBIT, 1_000_000)
    times_s = [by_peer[peer] * 1e6 / rate for peer, rate in rates.items()]
    least_s = 16 * 16 * 1e6 / (sum(rates.values()) + 100 * MBIT)
    assert all(0.75 * least_s < time_s < 1.5 * least_s for time_s in times_s[1:])
    assert by_coordinator * 1e6 / (100 * MBIT) < 1.5 * least_s


def test_who_cannot_be_reached_gives_nothing() -> None:
    rates = alike(8) | {"wide": 1000 * MBIT}
    by_peer, _ = sent(rates, 20 * MBIT, 1_000_000, reachable={"p0", "p1"})
    assert {peer for peer, n in by_peer.items() if n > 1} == {"p0", "p1"}


def test_a_coordinator_has_a_tenth_of_a_round_to_send_copies_in() -> None:
    fanout = Fanout(MBIT)
    others = ["b", "c"]
    assert fanout.sources(10**6, "a", others, ["a"]) == {"b": "a", "c": "a"}
    fanout.round_took(500.0)
    assert fanout.sources(10**6, "a", others, ["a"]) == {"b": None, "c": None}


def test_a_line_that_nobody_has_measured_carries_its_own_payload() -> None:
    fanout = Fanout(MBIT)
    others = ["b", "c"]
    sources = fanout.sources(10**6, "a", others, ["a", *others])
    assert sources == {"b": "a", "c": "a"}
    assert fanout.sources(10**6, "a", others, others) == {"b": None, "c": None}


def test_lines_of_who_uploaded_long_ago_are_forgotten() -> None:
    fanout, others = Fanout(1e6), ["a", "b", "c"]
    fanout.uploaded("narrow", 1, 1.0)
    for i in range(KNOWN_LINES - 1):
        fanout.uploaded(f"p{i}", 1000, 1.0)
    assert set(fanout.sources(10**6, "narrow", others, {"narrow"}).values()) == {None}
    fanout.uploaded("another", 1000, 1.0)
    assert set(fanout.sources(10**6, "narrow", others, {"narrow"}).values()) == {"narrow"}, "not measured"


def test_a_relay_has_a_few_children_where_there_are_more_relays() -> None:
    wide = {f"r{i}": 10_000 * MBIT for i in range(8)}
    fanout = Fanout(20_000 * MBIT)
    for peer, rate in (alike(56) | wide).items():
        fanout.uploaded(peer, int(rate), 1.0)
    others = [peer for peer in alike(56) | wide if peer != "p0"]
    sources = fanout.sources(10**8, "p0", others, ["p0", *others])
    children = Counter(sources.values())
    assert all(relay in wide and n <= 2 * CHILDREN for relay, n in children.items() if relay is not None)
    assert sources[next(r for r in children if r is not None)] is None
