"""Gossip without a network: peers in one process that leave their messages on a board."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp, sqrt
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.support.gossip_board import Board
from thinwire.compression.base import Payload, Turn
from thinwire.compression.errors import BadPayload, ConfigError
from thinwire.optim.base import Closure, Share
from thinwire.optim.gossip.merging import first_merge, is_merge, last_taken
from thinwire.optim.gossip.strategy import Gossip
from thinwire.optim.gossip.topology import Edge, Spectrum, edges_of, matching_of, matching_spectrum, union_of
from thinwire.optim.registry import build_strategy, complete_config

pytestmark = pytest.mark.usefixtures("one_thread")

N = 48
DENSE = {"name": "dense"}
SGD = {
    "name": "gossip",
    "inner": "SGD",
    "lr": 1.0,
    "weight_decay": 0.0,
    "inner_steps": 1,
    "max_grad_norm": 0.0,
}
FREE = {**SGD, "compressor": DENSE, "merge_every": "end", "clip_neighbours": 1e6}


class Peer:
    """Its loss pulls its model towards a point of its own, `target`, with the rate of the round."""

    def __init__(self, config: dict[str, Any], number: int, board: Board | None) -> None:
        self.number = number
        self.x = nn.Parameter(torch.zeros(N))
        strategy = build_strategy(config, [("x", self.x)])
        assert isinstance(strategy, Gossip)
        self.strategy = strategy
        self.strategy.neighbours = None if board is None else board.of(f"peer-{number}")
        self.target = torch.randn(N, generator=torch.Generator().manual_seed(number))

    def draw(self) -> Closure:
        return lambda: 0.5 * (self.x - self.target).square().sum()

    def propose(self, turn: Turn) -> Payload:
        return self.strategy.propose(self.draw, turn)

    def own(self) -> Tensor:
        with self.strategy.own_model():
            return self.x.detach().clone()


def swarm(n: int, **options: Any) -> tuple[Board, list[Peer]]:
    board = Board([f"peer-{i}" for i in range(n)])
    return board, [Peer({**FREE, **options}, i, board) for i in range(n)]


def turn_of(round_: int, number: int, rate: float, n_rounds: int) -> Turn:
    return Turn(round_, 1000 + round_, (number * 2**61 + round_) % 2**64, rate, n_rounds)


def run(
    peers: Sequence[Peer],
    rounds: range,
    rate: Callable[[int], float] = lambda r: 1.0 if r == 1 else 0.0,
    n_rounds: int = 1000,
) -> None:
    """All offers count. By default only the first round's local steps do something: they take every model to
    its own target."""
    for r in rounds:
        turns = [turn_of(r, p.number, rate(r), n_rounds) for p in peers]
        payloads = [p.propose(turn) for p, turn in zip(peers, turns, strict=True)]
        shares = [Share(t.own_seed, 1, payload) for t, payload in zip(turns, payloads, strict=True)]
        for p, turn in zip(peers, turns, strict=True):
            for share in shares:
                p.strategy.check(share.payload, turn)
            p.strategy.apply(shares, turn, "counted")


def spread(peers: Sequence[Peer]) -> float:
    """Mean distance from the mean."""
    models = torch.stack([p.own() for p in peers])
    return float((models - models.mean(0)).norm(dim=1).mean())


def mean(peers: Sequence[Peer]) -> Tensor:
    return torch.stack([p.own() for p in peers]).mean(0)


# ------------------------------------------------------------------------------------------- mixing


@pytest.mark.parametrize(
    "options",
    [
        {"topology": "ring"},
        {"topology": "exponential"},
        {"topology": "random"},
        {"topology": "random", "degree": 2},
        {"topology": "complete"},
        {"topology": "file", "edges": [[0, 1], [3, 1], [2, 3]]},
        {"topology": "ring", "mixing": "a2cid2"},
        {"topology": "random", "mixing": "a2cid2"},
        {"topology": "ring", "compressor": {"name": "dense", "bits": 8}},
        {"topology": "ring", "mixing": "choco", "gamma": 1.0},
        {"topology": "ring", "mixing": "choco", "compressor": {"name": "topk", "k": 12, "group_size": 64}},
    ],
    ids=lambda o: " ".join(map(str, o.values())),
)
def test_models_come_together_and_their_mean_stays(options: dict[str, Any]) -> None:
    _, peers = swarm(4, **options)
    run(peers, range(1, 2))
    before, first = mean(peers), spread(peers)
    run(peers, range(2, 12))
    assert spread(peers) < 0.3 * first
    torch.testing.assert_close(mean(peers), before, atol=1e-5, rtol=0)
    assert all(p.strategy.replicated_tensors()["x"].eq(0).all() for p in peers)  # theta has not moved


def test_a_complete_graph_has_its_mean_after_a_round() -> None:
    _, peers = swarm(5, topology="complete")
    run(peers, range(1, 3))
    assert spread(peers) < 1e-5


def test_a_round_of_a2cid2_is_the_papers() -> None:
    """Against its equations, written with x and x~ of all peers as matrices."""
    _, peers = swarm(6, topology="ring", mixing="a2cid2")
    run(peers, range(1, 2))
    x_PN = torch.stack([p.own() for p in peers])
    ahead_PN = x_PN.clone()
    ring = tuple(union_of("ring", 6))
    chis = matching_spectrum(ring, 6)
    for round_ in range(1, 7):
        x_PN, ahead_PN = flowed(x_PN, ahead_PN, chis)
        for i, j in matching_of(ring, 1000 + round_):
            m = x_PN[i] - x_PN[j]
            for peer, sign in ((i, 1), (j, -1)):
                x_PN[peer] -= sign * m / 2
                ahead_PN[peer] -= sign * m * sqrt(chis.chi1 / chis.chi2) / 2
    x_PN, _ = flowed(x_PN, ahead_PN, chis)
    run(peers, range(2, 8))  # what is exchanged in a round is mixed in at the beginning of the next one
    torch.testing.assert_close(torch.stack([p.own() for p in peers]), x_PN, atol=1e-4, rtol=0)


def flowed(x: Tensor, ahead: Tensor, chis: Spectrum) -> tuple[Tensor, Tensor]:
    """Both copies over the time of a round, in small steps."""
    eta, n = 1 / (2 * sqrt(chis.chi1 * chis.chi2)), 4000
    for _ in range(n):
        x, ahead = x + eta / n * (ahead - x), ahead + eta / n * (x - ahead)
    return x, ahead


def test_a2cid2_is_nearer_to_consensus_on_a_ring_of_32_than_plain_gossip_after_as_many_messages() -> None:
    """arXiv 2306.08289: rounds to a consensus go with sqrt(chi1 chi2) in place of chi1."""
    n, n_messages = 32, 32 * 150
    start = np.random.default_rng(5).standard_normal((n, 20))
    start -= start.mean(0)
    x = start.copy()
    edges = edges_of("ring", n, 0, 0)
    for _ in range(n_messages // (2 * len(edges))):
        x = x + sum_of_pulls(x, edges, 1 / 3)
    plain = float(np.abs(x).mean())
    x, lead, sent, round_ = start.copy(), np.zeros_like(start), 0, 0
    ring = tuple(union_of("ring", n))
    chis = matching_spectrum(ring, n)
    left, more = exp(-1 / sqrt(chis.chi1 * chis.chi2)), sqrt(chis.chi1 / chis.chi2) - 1
    while sent < n_messages:
        round_ += 1
        x, lead = x + (1 - left) / 2 * lead, left * lead
        edges = matching_of(ring, round_)
        pulls = sum_of_pulls(x, edges, 1 / 2)
        x, lead, sent = x + pulls, lead + more * pulls, sent + 2 * len(edges)
    assert float(np.abs(x).mean()) < 0.1 * plain


def sum_of_pulls(x: Any, edges: Sequence[Edge], weight: float) -> Any:
    pulls = np.zeros_like(x)
    for i, j in edges:
        pulls[i] += weight * (x[j] - x[i])
        pulls[j] += weight * (x[i] - x[j])
    return pulls


def test_choco_with_few_coefficients_comes_to_a_consensus_that_needs_more_of_them() -> None:
    """arXiv 1902.00340: with any compressor, only slower."""
    left = []
    for k in (4, 24):
        compressor = {"name": "topk", "k": k, "group_size": 64, "bits": 16}
        _, peers = swarm(4, topology="ring", mixing="choco", compressor=compressor)
        run(peers, range(1, 10))
        left.append(spread(peers))
    assert left[1] < left[0] < sqrt(N)


def test_a_neighbour_that_is_gone_costs_nothing() -> None:
    board, peers = swarm(4, topology="ring")
    run(peers, range(1, 3))
    board.lost = lambda sender, receiver, round_: sender == "peer-2"
    rest = [p for p in peers if p.number != 2]
    run(rest, range(3, 15))
    assert spread(rest) < 0.05
    assert peers[1].strategy.counters["unheard"] == 12


@pytest.mark.parametrize("mixing", ["plain", "a2cid2"])
def test_an_edge_counts_for_both_ends_or_for_none(mixing: str) -> None:
    """Peer 1 was too late in round 2, for an evaluation, and worked in no round before 5: it sends and hears
    what the others do without."""
    board, peers = swarm(4, topology="complete", mixing=mixing)
    run(peers, range(1, 2))
    before = mean(peers)
    board.missed = {("peer-1", r) for r in (2, 3, 4)}
    run(peers, range(2, 3))
    run([p for p in peers if p.number != 1], range(3, 5))
    peers[1].strategy.counters["applied"] = 4
    run(peers, range(5, 8))
    torch.testing.assert_close(mean(peers), before, atol=1e-5, rtol=0)
    assert peers[1].strategy.counters["met"] > 0


def test_what_neighbours_send_is_checked_and_counted_by_reason() -> None:
    board, peers = swarm(3, topology="complete")
    bad = {"peer-1": b"nonsense", "peer-2": b""}
    board.changed = lambda sender, data: bad.get(sender, data[:-1] + bytes([data[-1] ^ 1]))
    run(peers, range(1, 4))
    assert peers[0].strategy.counters["refused truncated"] == 4
    assert peers[1].strategy.counters["refused checksum"] == 2
    assert [p.strategy.mixed.distance for p in peers if p.strategy.mixed] == [None] * 3
    torch.testing.assert_close(peers[0].own(), peers[0].target)


@pytest.mark.parametrize("mixing", ["plain", "choco", "a2cid2"])
def test_a_neighbour_of_a_thousand_times_the_size_moves_nobody_far(mixing: str) -> None:
    _, peers = swarm(5, topology="ring", mixing=mixing, clip_neighbours=3.0)
    peers[2].target *= 1000
    run(peers, range(1, 3))
    usual = peers[0].target.norm()
    for p in peers:
        if p.number != 2:
            assert (p.own() - p.target).norm() < 4 * usual
    assert sum(p.strategy.counters.get("clipped", 0) for p in peers) > 0


@pytest.mark.parametrize("mixing", ["plain", "a2cid2"])
def test_of_a_graph_from_a_file_peers_that_are_not_there_are_left_out(mixing: str) -> None:
    """Without peer 1 the path 0-1-2-3 has an end that mixes, and a peer that nobody mixes with."""
    board, peers = swarm(4, topology="file", edges=[[0, 1], [1, 2], [2, 3], [7, 8]], mixing=mixing)
    board.absent = {"peer-1"}
    run([p for p in peers if p.number != 1], range(1, 14))
    torch.testing.assert_close(peers[0].own(), peers[0].target)
    torch.testing.assert_close(peers[2].own(), peers[3].own(), atol=0.1, rtol=0)
    assert peers[2].strategy.met is not None
    assert list(peers[2].strategy.met.weights) == ["peer-3"]


def test_choco_asks_a_neighbour_that_it_lost_for_all_of_its_model_once() -> None:
    board, peers = swarm(4, topology="ring", mixing="choco", gamma=1.0)
    sizes: list[int] = []
    board.changed = lambda sender, data: sizes.append(data[0]) or data  # type: ignore[func-returns-value]
    board.lost = lambda sender, receiver, round_: sender == "peer-1" and round_ == 2
    run(peers, range(1, 12))
    assert sum(sizes) == 2  # one whole model, to both neighbours
    assert spread(peers) < 0.05


# ------------------------------------------------------------------------------------------- merging


def test_when_rounds_merge() -> None:
    assert [r for r in range(1, 13) if is_merge(5, r, 12)] == [5, 10, 12]
    assert [r for r in range(1, 1001) if is_merge("end", r, 1000)] == [997, 1000]
    assert [r for r in range(1, 101) if is_merge("end", r, 100)] == [100]
    assert [r for r in range(1, 13) if is_merge(5, r, 0)] == [5, 10]
    assert (first_merge(5, 12), first_merge(50, 12), first_merge("end", 1000)) == (5, 12, 997)


def test_since_when_a_peers_work_counts_in_a_merge() -> None:
    """With this seed it takes part in rounds 10, 25 and in all after 30, of the multiples of 5."""
    seeds = {10: 0, 25: 0} | dict.fromkeys((5, 15, 20, 30), 2**64 - 1)

    def after(round_: int, participation: float = 0.5, all_take: bool = False, every: int | str = 5) -> int:
        turn = turn_of(round_, 0, 1.0, 1000)
        return last_taken(every, participation, all_take, turn, lambda r: seeds.get(r, 0))

    assert [after(r) for r in (5, 10, 15, 25, 30, 35, 40)] == [0, 0, 10, 10, 25, 25, 35]
    assert [after(r, 1.0) for r in (5, 30)] == [0, 25]
    assert after(30, all_take=True) == 25
    assert (after(997, every="end"), after(1000, every="end")) == (0, 997)


@pytest.mark.parametrize("few", [1, 2**40])
def test_who_has_done_more_since_the_last_merge_counts_more_in_it(few: int) -> None:
    _, peers = swarm(3, topology="ring", merge_every=1, weights="work", bound=3.0, newcomers=1.0)
    turns = [turn_of(1, p.number, 1.0, 1000) for p in peers]
    payloads = [p.propose(turn) for p, turn in zip(peers, turns, strict=True)]
    shares = [Share(t.own_seed, few * n, load) for t, n, load in zip(turns, (1, 1, 9), payloads, strict=True)]
    peers[0].strategy.apply(shares, turns[0], "counted")
    expected = sum(p.target * n for p, n in zip(peers, (1, 1, 2), strict=True)) / 4
    torch.testing.assert_close(peers[0].x.detach(), expected)


def test_a_merge_is_the_mean_of_all_models_and_all_go_on_from_it() -> None:
    _, peers = swarm(4, topology="ring", merge_every=3)
    run(peers, range(1, 3))
    expected = mean(peers)
    assert all(p.strategy.has_own_model for p in peers)
    run(peers, range(3, 4))
    for p in peers:
        assert not p.strategy.has_own_model
        torch.testing.assert_close(p.x.detach(), expected)
        assert torch.equal(p.x, peers[0].x)


def test_the_last_round_merges_everybody() -> None:
    _, peers = swarm(4, topology="ring", participation=0.001)
    run(peers, range(1, 5), n_rounds=4)
    assert not any(p.strategy.has_own_model for p in peers)
    assert all(torch.equal(p.x, peers[0].x) for p in peers)
    assert float(peers[0].x.detach().abs().sum()) > 0


@pytest.mark.parametrize(("takes", "who"), [("s2s", {0, 1, 2, 3}), ("s2a", set(range(8)))])
def test_of_a_merge_in_which_some_take_part_those_or_all_go_on(takes: str, who: set[int]) -> None:
    """Seeds of these peers are i/8 of all: with S = 1/2 the first four take part."""
    _, peers = swarm(8, topology="ring", merge_every=2, participation=0.5, takes=takes)
    run(peers, range(1, 2))
    targets = torch.stack([p.target for p in peers[:4]]).mean(0)
    payload = peers[7].propose(turn_of(2, 7, 0.0, 1000))
    assert all(t.numel() == 0 for t in payload["x"])
    for p in peers:
        p.strategy.neighbours = None
    _, peers = swarm(8, topology="ring", merge_every=1, participation=0.5, takes=takes)
    run(peers, range(1, 2))
    assert {p.number for p in peers if not p.strategy.has_own_model} == who
    for p in peers:
        with p.strategy.replica():
            torch.testing.assert_close(p.x.detach(), targets)


def test_a_model_that_its_seed_has_not_chosen_is_not_counted() -> None:
    _, peers = swarm(2, merge_every=1, participation=0.5, compressor=DENSE)
    p, turn = peers[0], turn_of(1, 0, 1.0, 1000)
    payload = {"x": (torch.ones(N),)}
    p.strategy.check(payload, turn)
    p.strategy.apply([Share(2**64 - 1, 1, payload)], turn, None)
    assert not p.x.detach().any()
    p.strategy.apply([Share(5, 1, payload)], turn_of(2, 0, 1.0, 1000), None)
    assert p.x.detach().eq(-1).all()


def test_a_peer_that_comes_later_goes_on_from_a_neighbours_model() -> None:
    board, peers = swarm(4, topology="ring")
    run(peers, range(1, 9))
    new = Peer(FREE, 9, board)
    new.strategy.counters["applied"] = 8
    new.propose(turn_of(9, 9, 0.0, 1000))
    assert new.strategy.counters["borrowed"] == 1
    torch.testing.assert_close(new.own(), peers[0].own(), atol=0.05, rtol=0)
    after_merge = Peer({**FREE, "merge_every": 8}, 9, board)
    after_merge.strategy.counters["applied"] = 8
    after_merge.propose(turn_of(9, 9, 0.0, 1000))
    assert "borrowed" not in after_merge.strategy.counters


def test_payloads_of_other_rounds_are_refused() -> None:
    _, (p, _) = swarm(2, merge_every=2)
    gossip, merge = turn_of(1, 0, 1.0, 1000), turn_of(2, 0, 1.0, 1000)
    of_gossip, of_merge = {":distance": (torch.ones(1),)}, {"x": (torch.ones(N),)}
    p.strategy.check(of_gossip, gossip)
    p.strategy.check(of_merge, merge)
    for payload, turn in ((of_gossip, merge), (of_merge, gossip), ({":distance": (torch.ones(2),)}, gossip)):
        with pytest.raises(BadPayload):
            p.strategy.check(payload, turn)
    with pytest.raises(BadPayload, match="nan"):
        p.strategy.check({":distance": (torch.tensor([float("nan")]),)}, gossip)


# ------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"compressor": {"name": "topk"}}, "sends whole models"),
        ({"compressor": {"name": "dct_topk"}, "mixing": "a2cid2"}, "sends whole models"),
        ({"mixing": "choco", "topology": "random"}, "topology = complete or file or ring"),
        ({"mixing": "choco", "topology": "exponential"}, "topology = complete or file or ring"),
        ({"degree": 2, "topology": "ring"}, "degree = 2"),
        ({"degree": 2, "mixing": "a2cid2"}, "one partner at a time"),
        ({"topology": "file"}, "needs edges"),
        ({"topology": "ring", "edges": [[0, 1]]}, 'of topology = "file"'),
        ({"topology": "file", "edges": [[0, 1], [1, 1]]}, "1 1 joins a peer to itself"),
        ({"topology": "file", "edges": [[0, 1], [1, 0]]}, "0 1 is there twice"),
        ({"topology": "file", "edges": [[0, -1]]}, "no pair"),
        ({"topology": "file", "edges": [[0, 1]], "topology_file": "x"}, "who found a run"),
        ({"merge_every": 0}, "merge_every = 0"),
        ({"merge_every": "never"}, '"end"'),
        ({"merge_every": True}, "merge_every = True"),
        ({"mixing": "dadao"}, "0 < mu <= smoothness"),
        ({"mixing": "dadao", "mu": 2, "smoothness": 1}, "0 < mu <= smoothness"),
        ({"mixing": "dadao", "mu": 1, "smoothness": 4, "inner_steps": 1}, 'merge_every = "end"'),
        ({"mu": 1}, 'of mixing = "dadao"'),
        ({"participation": 0}, "participation = 0"),
        ({"topology": "star"}, "star"),
        ({"mixing": "a2cid"}, "a2cid2"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        build_strategy({"name": "gossip", **options}, [("x", nn.Parameter(torch.zeros(4)))])


def test_new_runs_send_eight_bits() -> None:
    assert complete_config({"name": "gossip"})["compressor"]["name"] == "dense"
    assert complete_config({"name": "gossip"})["compressor"]["bits"] == 8


def test_alone_it_trains_in_any_loop() -> None:
    p = Peer({**FREE, "lr": 0.1, "merge_every": 2}, 3, None)
    before = float(p.draw()().detach())
    for _ in range(20):
        p.strategy.step(p.draw())
    for _ in range(20):
        p.strategy.zero_grad()
        p.draw()().backward()  # type: ignore[no-untyped-call]
        p.strategy.step()
    with p.strategy.replica():
        assert float(p.draw()().detach()) < 0.01 * before
