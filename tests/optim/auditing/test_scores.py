"""Payloads against those of the others: which ones point another way."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.optim.auditing.test_audit import DECOUPLED, DILOCO, batch
from tests.support.replicas import Replica
from thinwire.compression.base import Payload
from thinwire.node.auditing.scores import FEWEST, WINDOW, Scores

N_PEERS = 4
ROUNDS = 12
DENSE: dict[str, Any] = {**DECOUPLED, "compressor": {"name": "dense"}}


def flipped(payload: Payload) -> Payload:
    """Of a compressor of plain float32 values."""
    return {name: (-packed[0], *packed[1:]) for name, packed in payload.items()}


@pytest.mark.parametrize("config", [DENSE, DILOCO], ids=["decoupled", "diloco"])
def test_a_payload_that_is_turned_points_away(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))
    peers = [
        Replica(config, i, copy.deepcopy(model), batch, lr_factor=lambda round: 1.0) for i in range(N_PEERS)
    ]
    seen = Scores()
    for round_ in range(1, ROUNDS + 1):
        offers = [peer.offer(round_) for peer in peers]
        payloads = [peers[0].decode(data, round_) for data in offers]
        turned = [*payloads[:-1], flipped(payloads[-1])]
        turn, strategy = peers[0].turn(round_), peers[0].strategy
        scores = strategy.scores(turned, turn)
        assert scores is not None
        with monkeypatch.context() as large:
            large.setattr("thinwire.optim.auditing.scores.MOST_KEPT", 0)
            assert scores == strategy.scores(strategy.scored_parts(turned, turn), turn)
        assert scores[-1] < min(scores[:-1])
        theirs = strategy.cosines(payloads[0], payloads, turn), strategy.cosines(payloads[0], turned, turn)
        assert theirs[0] is not None
        assert theirs[0][0] == pytest.approx(1.0)
        assert max(theirs[0][1:]) < 0.999
        assert theirs[1] == pytest.approx([*theirs[0][:-1], -theirs[0][-1]])
        seen.add(dict(enumerate(scores)))
        for peer in peers:
            peer.apply(round_, [(q.seed(round_), data) for q, data in zip(peers, offers, strict=True)], None)
    assert [seen.is_suspect(peer) for peer in range(N_PEERS)] == [False] * 3 + [True]


def test_spsa_has_no_scores() -> None:
    """Every probe has a direction of its own."""
    model = nn.Linear(16, 4)
    peer = Replica({"name": "spsa", "lr": 1e-3, "probes": 2}, 0, model, batch)
    assert peer.strategy.scored_parts([{}], peer.turn(1)) == [{}]
    assert peer.strategy.scores([], peer.turn(1)) is None
    assert peer.strategy.cosines({}, [], peer.turn(1)) is None


def test_who_keeps_pointing_away_is_suspect_and_chance_is_no_reason() -> None:
    seen = Scores()
    for _ in range(FEWEST - 1):
        seen.add({1: -0.5, 2: 0.0, 3: 0.5, 4: float("nan")})
    assert not any(map(seen.is_suspect, range(6)))
    seen.add({1: -0.5, 2: 0.0, 3: 0.5, 4: float("nan")})
    assert [peer for peer in range(6) if seen.is_suspect(peer)] == [1, 2, 4]
    for i in range(WINDOW):
        seen.add({1: 0.5, 2: -0.5 if i % 2 else 0.5, 3: -0.5 if i % 4 else 0.5})
    assert [peer for peer in (1, 2, 3) if seen.is_suspect(peer)] == [3]
