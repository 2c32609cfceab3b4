"""What a node tells of how large peers' payloads are."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tests.support.prometheus import check_conventions, samples, value
from thinwire.coordinator.protocol.messages import MAX_PEERS, MAX_SIZES, PeerSize
from thinwire.node.tracking.metrics import NodeMetrics
from thinwire.node.tracking.peer_sizes import FORGOTTEN_AFTER, RECENT_OFFERS, PeerSizes


@dataclass(frozen=True)
class Found:
    size: float
    kept: float = 1.0


def test_the_median_of_the_recent_ones_and_how_many_were_scaled_down() -> None:
    sizes = PeerSizes()
    assert sizes.next() == ()
    for round_, size in enumerate([1.0, 1.5, 500.0], 1):
        sizes.weighed(round_, [(0, Found(1.0)), (3, Found(size, min(1.0, 2.0 / size)))])
    assert sizes.next() == (
        PeerSize(peer=0, size=100, clipped=0),
        PeerSize(peer=3, size=150, clipped=33),
    )
    for round_ in range(4, 4 + RECENT_OFFERS):
        sizes.weighed(round_, [(3, Found(math.inf, 0.0)), (0, Found(math.nan))])
    assert sizes.next()[1] == PeerSize(peer=3, size=10**8, clipped=100)


def test_many_peers_are_told_of_in_turn() -> None:
    sizes = PeerSizes()
    sizes.weighed(1, [(peer, Found(1.0)) for peer in range(20)])
    told = [[one.peer for one in sizes.next()] for _ in range(5)]
    assert all(len(peers) == MAX_SIZES for peers in told)
    assert set().union(*told[:3]) == set(range(20))
    assert told[0] == list(range(8))


def test_those_that_are_gone_are_forgotten_and_the_others_bounded() -> None:
    sizes = PeerSizes()
    sizes.weighed(1, [(0, Found(9.0)), (1, Found(1.0))])
    for round_ in range(2, FORGOTTEN_AFTER + 3):
        sizes.weighed(round_, [(1, Found(1.0))])
    assert [one.peer for one in sizes.next()] == [1]
    sizes.weighed(100, [(peer, Found(1.0)) for peer in range(3 * MAX_PEERS)])
    told = {one.peer for _ in range(MAX_PEERS) for one in sizes.next()}
    assert len(told) == MAX_PEERS


def test_a_node_shows_the_farthest_and_names_nobody() -> None:
    metrics = NodeMetrics()
    assert "thinwire_farthest_peer_ratio" not in samples(metrics.text().decode())
    metrics.sizes.weighed(1, [(0, Found(1.0)), (1, Found(8.0, 0.25))])
    text = metrics.text().decode()
    check_conventions(text)
    assert value(text, "thinwire_farthest_peer_ratio") == 8
    assert value(text, "thinwire_clipped_payloads_ratio") == 0.5
