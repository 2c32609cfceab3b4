"""Batches of commits: where a ledger is cut, and that a replica ends as if it had applied them one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from thinwire.compression.base import Turn
from thinwire.compression.errors import ReplicaDiverged
from thinwire.compression.exact import to_float32
from thinwire.coordinator.protocol.identity import peer_id_of
from thinwire.coordinator.protocol.messages import (
    Admission,
    Commit,
    CommitBody,
    OfferEntry,
    digest_of,
    encode_record,
)
from thinwire.coordinator.protocol.schedule import float32_bits
from thinwire.node.batches import MAX_ROUNDS, batches
from thinwire.node.config import load_config
from thinwire.node.genesis import initialise, make_genesis
from thinwire.node.replica import Replica, build_replica, round_seed
from thinwire.node.tasks.registry import make_task
from thinwire.optim.base import Share
from thinwire.optim.spsa import CODES

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
PEERS = [peer_id_of(Ed25519PrivateKey.from_private_bytes(bytes([i] * 32)).public_key()) for i in (1, 2, 3)]
SPSA = {"name": "spsa", "lr": 1e-3, "weight_decay": 0.1, "probes": 4}
DECOUPLED = {"name": "decoupled", "lr": 1e-3, "compressor": {"name": "dct_topk", "k": 8}}
BAD_ROUND, ADMITTING_ROUND = 4, 6


def replica_of(strategy: Mapping[str, Any], width: int = 16) -> Replica:
    """Before round 1; it belongs to the first peer."""
    task = {"layers": 1, "width": width, "heads": 2, "context": 16, "batch": 4, "held_out_bytes": 2048}
    flat = {f"task.{key}": value for key, value in task.items()}
    config = load_config(None, flat, environ={}).model_copy(update={"strategy": strategy})
    text = make_task(config.task, None, None)
    body = make_genesis(config, text, peer_id_of(KEY.public_key()), 1).body
    replica = build_replica(digest_of(encode_record(body)), body, text, PEERS[0])
    initialise(replica.model, body, config.run.seed, None)
    return replica


def commit_of(round: int, parent: bytes, payloads: list[bytes], n_bytes: int | None = None) -> Commit:
    """Two peers from round 1 on, a third one from ADMITTING_ROUND; each round has its learning rate."""
    admitted = {1: (0, 1), ADMITTING_ROUND: (2,)}.get(round, ())
    entry = {"n_samples": 1, "n_tokens": 1, "loss": None, "digest": None}
    body = CommitBody(
        round=round,
        parent=parent,
        offers=tuple(
            OfferEntry(peer=i, n_bytes=len(p) if n_bytes is None else n_bytes, payload=p, **entry)
            for i, p in enumerate(payloads)
        ),
        admitted=tuple(Admission(index=i, peer_id=PEERS[i]) for i in admitted),
        lr_factor_bits=float32_bits(1 / round),
        reports=(),
        snapshots=(),
        evaluator=None,
        time_ms=round,
    )
    record = encode_record(body)
    return Commit(record=record, signature=KEY.sign(record))


def spsa_ledger(n_rounds: int) -> list[Commit]:
    """Any codes; the first peer's payload of BAD_ROUND is damaged."""
    writer, generator = replica_of(SPSA), np.random.default_rng(1)
    parent, commits = writer.run_id, list[Commit]()
    for r in range(1, n_rounds + 1):
        turn = writer.turn()
        payloads = []
        for _ in range(2 if r < ADMITTING_ROUND else 3):
            codes = torch.from_numpy(generator.integers(40, 90, 4).astype(np.uint8))
            payloads.append(writer.encode({CODES: (codes,)}, turn))
        if r == BAD_ROUND:
            payloads[0] = payloads[0][:-1]
        commits.append(commit_of(r, parent, payloads))
        parent, writer.round = commits[-1].digest, r
    return commits


def inline(offer: OfferEntry) -> bytes:
    assert offer.payload is not None
    return offer.payload


def state_of(replica: Replica) -> list[Any]:
    return [
        *(replica.round, replica.digest, replica.turn(), dict(replica.peers), dict(replica.bad)),
        *(replica.fingerprint(), replica.strategy.state_dict()["counters"]),
    ]


# ------------------------------------------------------------------------------------------- the replica


def by_hand(commits: list[Commit]) -> Replica:
    """The oracle: the strategy alone is given what each commit says, one by one."""
    replica = replica_of(SPSA)
    lr_factor = replica.turn().lr_factor
    for r, commit in enumerate(commits, start=1):
        shares = [
            Share(round_seed(replica.run_id, r, PEERS[offer.peer]), 1, {CODES: (codes_in(inline(offer)),)})
            for offer in commit.body.offers
            if (r, offer.peer) != (BAD_ROUND, 0)
        ]
        replica.strategy.apply(shares, Turn(r, 0, 0, lr_factor), None)
        lr_factor = to_float32(1 / r)
    return replica


def codes_in(data: bytes) -> torch.Tensor:
    """The four codes stand before the checksum."""
    return torch.tensor(list(data[-12:-8]), dtype=torch.uint8)


@pytest.mark.parametrize("sizes", [[9], [1, 8], [3, 1, 5], [5, 4]])
def test_a_batch_is_its_commits_one_by_one(sizes: list[int], kernels: str) -> None:
    one_by_one, together = replica_of(SPSA), replica_of(SPSA)
    commits = spsa_ledger(9)
    offered = {2, BAD_ROUND}
    fates = [one_by_one.apply(c, inline, c.body.round in offered) for c in commits]
    assert fates == [None, "counted", None, "missed", *[None] * 5]
    assert one_by_one.bad == {"truncated": 1}
    at, found = 0, []
    for size in sizes:
        found += together.apply_batch(commits[at : at + size], inline, offered)
        at += size
    assert found == fates
    assert state_of(together) == state_of(one_by_one)
    assert together.fingerprint() == by_hand(commits).fingerprint()
    assert (together.round, together.digest) == (9, commits[8].digest)
    assert together.peers == dict(enumerate(PEERS))
    assert together.turn().lr_factor == to_float32(1 / 9)


def test_no_commits_change_nothing() -> None:
    replica = replica_of(SPSA)
    before = state_of(replica)
    assert replica.apply_batch([], inline) == []
    assert state_of(replica) == before


def refuses(replica: Replica, commits: list[Commit], payload_bytes: Callable[[OfferEntry], bytes]) -> None:
    before = state_of(replica)
    with pytest.raises((ReplicaDiverged, OSError)):
        replica.apply_batch(commits, payload_bytes)
    assert state_of(replica) == before


def test_what_cannot_be_read_leaves_the_replica_where_it_was() -> None:
    """A commit that is missing or of another chain, and a payload that cannot be had; the bad one before them
    counts once, when it is applied."""
    replica, commits = replica_of(SPSA), spsa_ledger(9)
    calls = 0

    def broken(offer: OfferEntry) -> bytes:
        nonlocal calls
        calls += 1
        if calls > 12:
            raise OSError("gone")
        return inline(offer)

    refuses(replica, [*commits[:6], commits[7]], inline)
    refuses(replica, [*commits[:6], commit_of(7, bytes(32), [b"x"])], inline)
    refuses(replica, commits, broken)
    replica.apply_batch(commits, inline)
    assert replica.bad == {"truncated": 1}


def test_a_replica_that_is_not_finite_names_tensor_and_rounds() -> None:
    commits = spsa_ledger(9)
    replica = replica_of(SPSA)
    replica.apply_batch(commits[:2], inline)
    with torch.no_grad():
        replica.tensors()["head.weight"][3, 3] = torch.inf
    with pytest.raises(ReplicaDiverged, match=r"one of the rounds 3 to 5 made head\.weight non-finite"):
        replica.apply_batch(commits[2:5], inline)
    assert replica.round == 2
    with pytest.raises(ReplicaDiverged, match=r"^round 3 made head\.weight non-finite"):
        replica.apply(commits[2], inline, offered=False)


def test_a_strategy_that_fails_names_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    replica = replica_of(SPSA)
    monkeypatch.delitem(replica.strategy.param_groups[0], "clip")
    with pytest.raises(ReplicaDiverged, match="one of the rounds 1 to 4 failed: KeyError: 'clip'"):
        replica.apply_batch(spsa_ledger(4), inline)


# ------------------------------------------------------------------------------------------- the cuts


def lengths(n_bytes: list[int], strategy: Mapping[str, Any], ends: set[int] | None = None) -> list[int]:
    """How many commits each batch has, when a commit's only payload is so long."""
    commits = [commit_of(r, bytes(32), [b""], n) for r, n in enumerate(n_bytes, 1)]
    found = list(batches(iter(commits), replica_of(strategy).strategy, ends or set()))
    assert [c for batch in found for c in batch] == commits
    return [len(batch) for batch in found]


def test_batches_end_where_they_must() -> None:
    assert lengths([], SPSA) == []
    assert lengths([50] * 5, SPSA) == [5]
    assert lengths([50] * (2 * MAX_ROUNDS + 3), SPSA) == [MAX_ROUNDS, MAX_ROUNDS, 3]
    assert lengths([50] * 7, SPSA, ends={1, 4, 9}) == [1, 3, 3]
    assert lengths([50, 50, 10**6, 10**6, 50], SPSA) == [3, 1, 1]


def test_strategies_without_a_fused_form_go_one_by_one() -> None:
    """Payloads may be long there: no more than one round's are in memory."""
    assert lengths([10**6] * 3, DECOUPLED) == [1, 1, 1]
