"""Rounds in modelled time: where bytes go, and that wide lines are used before narrow ones."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from thinwire.coordinator.protocol.streams import CHUNK_BYTES
from thinwire.node.bench.network import curves, swarm
from thinwire.node.bench.network.lines import (
    HOME,
    KINDS,
    MBIT,
    SESSION_S,
    draw,
    rest_of_session_s,
    session_s,
)
from thinwire.node.bench.network.swarm import Topology, simulate
from thinwire.node.bench.view import save_picture

N, N_BYTES = 40, 1_000_000


def figures(topology: Topology, own: float = 100 * MBIT, n_bytes: int = N_BYTES) -> dict[str, float]:
    return simulate(N, n_bytes, topology, own, KINDS, n_rounds=4)


@pytest.mark.parametrize("own", [100 * MBIT, 1000 * MBIT, 10_000 * MBIT])
def test_dealt_is_no_slower_than_either_simple_way(own: float) -> None:
    dealt = figures("dealt", own)["round_s"]
    assert dealt < 1.15 * min(figures("coordinator", own)["round_s"], figures("maker", own)["round_s"])


def test_a_narrow_coordinator_is_spared() -> None:
    one, dealt = figures("coordinator"), figures("dealt")
    assert dealt["round_s"] < one["round_s"] / 2
    assert dealt["coordinator_bytes"] < one["coordinator_bytes"] / 5


def test_every_copy_is_sent_once() -> None:
    for topology in ("coordinator", "maker", "dealt"):
        found = simulate(N, N_BYTES, topology, 1000 * MBIT, HOME, n_rounds=3)
        sent = N * found["peer_bytes"] + found["coordinator_bytes"]
        uploads_and_copies = (N + found["offers_counted"] * N * (N - 1)) * N_BYTES
        assert sent == pytest.approx(uploads_and_copies, rel=0.02)


@pytest.mark.parametrize("topology", ["maker", "dealt"])
def test_payloads_that_are_followed_stand_for_the_others(
    topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose makers have lines of their own."""
    found = []
    for most in (120, 30):
        monkeypatch.setattr(swarm, "FOLLOWED", most)
        found.append(simulate(120, 300_000, topology, 1000 * MBIT, KINDS, n_rounds=4))
    assert found[1]["round_s"] == pytest.approx(found[0]["round_s"], rel=0.3)
    assert found[1]["peer_bytes"] == pytest.approx(found[0]["peer_bytes"], rel=0.3)


def test_lines_are_not_known_from_payloads_of_one_chunk() -> None:
    """So that nobody passes any on: who can be reached gives its own."""
    one, two = (figures("dealt", MBIT, n_bytes) for n_bytes in (CHUNK_BYTES, CHUNK_BYTES + 1))
    assert one["most_of_a_peer_bytes"] < 1.01 * N * CHUNK_BYTES
    assert two["most_of_a_peer_bytes"] > 2 * N * CHUNK_BYTES


def test_inline_payloads_are_in_the_commit_alone() -> None:
    found = figures("dealt", n_bytes=16)
    assert found["peer_bytes"] == found["most_of_a_peer_bytes"] < 60
    assert found["coordinator_bytes"] < N * (N * 40 + 400)


def test_what_is_drawn_is_what_was_stated() -> None:
    made = random.Random(3)
    stays = [session_s(made) for _ in range(20_000)]
    assert sum(stays) / len(stays) == pytest.approx(SESSION_S, rel=0.1)
    # Of who is met at some moment, a half is over in the mean: E[s^2] / 2 E[s].
    stay_on = [rest_of_session_s(made) for _ in range(20_000)]
    expected_s = sum(s * s for s in stays) / (2 * sum(stays))
    assert sum(stay_on) / len(stay_on) == pytest.approx(expected_s, rel=0.15)
    machines = [draw(KINDS, 10.0, made) for _ in range(2000)]
    assert 0.04 < sum(machine.up > 500 * MBIT for machine in machines) / 2000 < 0.12
    assert 0.25 < sum(machine.is_reachable for machine in machines) / 2000 < 0.45


def test_a_picture_of_where_which_way_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image", reason="the picture is an extra")
    monkeypatch.setattr(curves, "SIZES", (1_000, 100_000))
    monkeypatch.setattr(curves, "PEERS", (10, 20))
    few = {name: curves.Panel(20, panel.own, 2) for name, panel in curves.PANELS.items()}
    monkeypatch.setattr(curves, "PANELS", few)
    save_picture(tmp_path / "x.png", [[{"bench": "network"}]])
    assert (tmp_path / "x.png").stat().st_size < 80_000
    pixels = image.imread(tmp_path / "x.png")
    shades = pixels[..., :3].max(axis=-1) - pixels[..., :3].min(axis=-1)
    assert (shades > 0.3).sum() > 1_000, "curves, in colours"
