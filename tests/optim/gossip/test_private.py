"""Noise that hides what a peer has learned, correlated between those that mix."""

from __future__ import annotations

import sys
from math import isnan
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.optim.gossip.test_gossip import FREE, N, Peer, mean, run, swarm, turn_of
from thinwire.compression.errors import ConfigError
from thinwire.optim.base import Share
from thinwire.optim.gossip.private import amounts, mixing_weights
from thinwire.optim.gossip.topology import edges_of
from thinwire.optim.registry import build_strategy

pytestmark = pytest.mark.usefixtures("one_thread")

PRIVACY = {"clip": 0.5, "noise": 4.0, "delta": 1e-5}
N_PEERS = 10


@pytest.fixture
def accountant() -> None:
    pytest.importorskip("dp_accounting", reason="dp-accounting is an extra (thinwire[privacy])")


@pytest.mark.parametrize(
    ("topology", "independent", "correlated"), [("ring", 0.333, 0.249), ("complete", 0.1, 0.010)]
)
def test_what_is_left_of_the_noise_after_mixing(topology: Any, independent: float, correlated: float) -> None:
    """Of ten peers, for noise that is 1 to all others: DECOR's figures, on a complete graph CorN's, too."""
    edges = tuple(edges_of(topology, N_PEERS, 0, 0))
    weights = mixing_weights(edges, in_pairs=False)
    laplacian = np.zeros((N_PEERS, N_PEERS))
    for i, j in edges:
        laplacian[[i, j], [i, j]] += 1
        laplacian[[i, j], [j, i]] -= 1
    mixing = np.eye(N_PEERS) - weights[0] * laplacian
    own, paired = amounts(edges, N_PEERS, weights)
    noise = own * np.eye(N_PEERS) + paired * laplacian
    assert np.linalg.inv(noise).diagonal().max() == pytest.approx(1)
    assert np.trace(mixing @ mixing.T) / N_PEERS == pytest.approx(independent, abs=1e-3)
    assert np.trace(mixing @ noise @ mixing.T) / N_PEERS == pytest.approx(correlated, abs=1e-3)


def test_steps_are_cut_and_models_hidden_but_their_mean_is_hardly_moved(accountant: None) -> None:
    """Of eight peers on a complete graph: what the round before has moved, in units of the clip."""
    _, peers = swarm(8, topology="complete", privacy=PRIVACY)
    _, plain = swarm(8, topology="complete", privacy={**PRIVACY, "noise": 1e-9})
    run(peers, range(1, 2))
    run(plain, range(1, 2))
    for p in plain:
        assert float(p.own().norm()) == pytest.approx(PRIVACY["clip"], rel=1e-4)
        assert p.strategy.last_loss is not None
        assert isnan(p.strategy.last_loss)
    usual = PRIVACY["noise"] * PRIVACY["clip"] * N**0.5
    assert all(float(p.own().norm()) > 1.2 * usual for p in peers)
    away = float((mean(peers) - mean(plain)).norm()) / usual
    edges = tuple(edges_of("complete", 8, 0, 0))
    own, _ = amounts(edges, 8, mixing_weights(edges, in_pairs=False))
    expected = (own / 8) ** 0.5
    assert expected < 0.4 / 8**0.5, "independent noise would be 1 / sqrt(8)"
    assert 0.5 * expected < away < 1.6 * expected  # no seed: 5 standard deviations


def test_in_a_merge_the_pairs_noise_is_gone(accountant: None) -> None:
    _, peers = swarm(6, topology="ring", privacy=PRIVACY, merge_every=1)
    turns = [turn_of(1, p.number, 0.0, 1000) for p in peers]
    payloads = [p.propose(turn) for p, turn in zip(peers, turns, strict=True)]
    usual = PRIVACY["noise"] * PRIVACY["clip"] * N**0.5
    sent = torch.stack([payload["x"][0] for payload in payloads])
    assert float(sent.norm(dim=1).min()) > 1.2 * usual
    shares = [Share(turn.own_seed, 1, payload) for turn, payload in zip(turns, payloads, strict=True)]
    peers[0].strategy.apply(shares, turns[0], "counted")
    assert float(peers[0].x.detach().norm()) < 0.35 * usual


def test_the_account_is_a_librarys_and_is_told(accountant: None) -> None:
    p = Peer({**FREE, "privacy": PRIVACY}, 0, None)
    told = p.strategy.told()
    assert told is not None
    assert "after 100," in told
    assert "(delta 1e-05)" in told
    few, many = (float(word.split()[0]) for word in told.removeprefix("privacy: epsilon ").split(", ")[:2])
    assert 0 < few < many
    p.draw()().backward()  # type: ignore[no-untyped-call]
    with pytest.raises(ConfigError, match="whole rounds"):
        p.strategy.step()


def test_without_the_library_and_with_bad_options_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(**options: Any) -> None:
        build_strategy({"name": "gossip", **options}, [("x", nn.Parameter(torch.zeros(4)))])

    for privacy, why in (
        ({"clip": 1.0}, r"privacy.noise = None: must be a number > 0"),
        ({**PRIVACY, "delta": 1}, r"privacy.delta = 1: must be"),
        ({**PRIVACY, "sigma": 1}, "privacy has no 'sigma'"),
        (True, "privacy: a table"),
    ):
        with pytest.raises(ConfigError, match=why):
            build(privacy=privacy)
    with pytest.raises(ConfigError, match='privacy with mixing = "dadao"'):
        build(privacy=PRIVACY, mixing="dadao", mu=1, smoothness=1, inner_steps=1, merge_every="end")
    for name in ("dp_accounting", "dp_accounting.rdp"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pip install 'thinwire\[privacy\]'"):
        build(privacy=PRIVACY)
