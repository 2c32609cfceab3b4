"""Who exchanges with whom, and the numbers that say how well that mixes."""

from __future__ import annotations

from math import cos, pi

import pytest

from thinwire.optim.gossip.topology import (
    Edge,
    Topology,
    edges_of,
    matching_of,
    mixing_weight,
    spectrum,
    union_of,
)

TOPOLOGIES: list[Topology] = ["ring", "exponential", "random", "complete"]
SIZES = (2, 3, 4, 5, 8, 9)

every_topology = pytest.mark.parametrize("topology", TOPOLOGIES)


def reached(edges: set[Edge]) -> set[int]:
    """From peer 0."""
    found = {0}
    for _ in edges:
        found |= {peer for edge in edges if found & set(edge) for peer in edge}
    return found


@every_topology
@pytest.mark.parametrize("n", SIZES)
def test_all_are_connected_and_weights_are_doubly_stochastic(topology: Topology, n: int) -> None:
    union: set[Edge] = set()
    for round_ in range(12):
        edges = edges_of(topology, n, round_, 1000 + round_)
        assert all(0 <= i < j < n for i, j in edges)
        assert len(edges) == len(set(edges)) > 0
        for i in range(n):
            partners = [sum(edge) - i for edge in edges if i in edge]
            weights = [mixing_weight(edges, i, j) for j in partners]
            assert weights == [mixing_weight(edges, j, i) for j in partners]
            assert sum(weights) < 1
        union |= set(edges)
    assert reached(union) == set(range(n))


@every_topology
@pytest.mark.parametrize("n", SIZES)
def test_a_matching_has_every_peer_once_and_could_not_be_larger(topology: Topology, n: int) -> None:
    drawn = [matching_of(union_of(topology, n), r) for r in range(20)]
    for edges in drawn:
        met = [peer for edge in edges for peer in edge]
        assert len(met) == len(set(met))
        assert 2 * len(edges) >= n // 2
    assert reached({edge for edges in drawn for edge in edges}) == set(range(n))


def test_ring_and_complete_graph_are_what_they_are_called() -> None:
    assert edges_of("ring", 5, 3, 7) == [(0, 1), (0, 4), (1, 2), (2, 3), (3, 4)]
    assert len(edges_of("complete", 6, 0, 0)) == 15
    assert edges_of("exponential", 8, 2, 0) == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert edges_of("ring", 1, 1, 1) == []


def test_random_partners_are_other_ones_in_every_round() -> None:
    drawn = {tuple(edges_of("random", 8, r, r)) for r in range(20)}
    assert len(drawn) > 15
    assert all(len(edges) == 4 for edges in drawn)
    assert len(edges_of("random", 8, 1, 1, degree=3)) > 8
    assert edges_of("random", 9, 5, 77) == edges_of("random", 9, 6, 77)


def test_chis_are_those_of_known_graphs() -> None:
    """A ring: lambda_2 = 2 - 2 cos(2 pi / n), and between neighbours 1 against n - 1 resistors."""
    ring = spectrum(edges_of("ring", 32, 0, 0), 32, rate=0.5)
    assert ring.chi1 == pytest.approx(1 / (0.5 * (2 - 2 * cos(2 * pi / 32))))
    assert ring.chi2 == pytest.approx(31 / 32 / 2 / 0.5)
    complete = spectrum(edges_of("complete", 6, 0, 0), 6, rate=1.0)
    assert complete.chi1 == pytest.approx(1 / 6)
    assert complete.chi2 == pytest.approx(1 / 6)
