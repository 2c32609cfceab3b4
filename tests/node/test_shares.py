"""What a replica makes of a commit's offers: samples, copies, one's own data, and what people may read."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.node.test_batches import DECOUPLED, KEY, PEERS, SPSA, commit_of, inline, replica_of
from thinwire.compression.base import Payload
from thinwire.compression.codecs.dense import Dense
from thinwire.coordinator.protocol.messages import Admission, Commit, OfferEntry, encode_record
from thinwire.node.replica import Replica
from thinwire.optim.gossip.strategy import DISTANCE
from thinwire.optim.spsa import CODES

SHARED = {**SPSA, "shared_noise": True}


def with_offers(replica: Replica, entries: list[dict[str, Any]]) -> Commit:
    """Round 1; entries: peer, codes or payload, and what else is not as usual."""
    body = commit_of(1, replica.run_id, [b"x"]).body
    usual = {"n_samples": 1, "n_tokens": 1, "loss": None, "digest": None}
    offers = []
    for entry in entries:
        found = {**usual, **entry}
        if (codes := found.pop("codes", None)) is not None:
            row = torch.from_numpy(np.array(codes, dtype=np.uint8))
            found["payload"] = replica.encode({CODES: (row,)}, replica.turn())
        offers.append(OfferEntry(n_bytes=len(found["payload"]), **found))
    admitted = tuple(Admission(index=i, peer_id=peer) for i, peer in enumerate(PEERS))
    record = encode_record(body.model_copy(update={"offers": tuple(offers), "admitted": admitted}))
    return Commit(record=record, signature=KEY.sign(record))


def applied(entries: list[dict[str, Any]], strategy: dict[str, Any] = SHARED) -> Replica:
    replica = replica_of(strategy)
    replica.apply(with_offers(replica, entries), inline, offered=False)
    return replica


A, B = [70, 71, 72, 73], [60, 200, 62, 63]
TWO: list[dict[str, Any]] = [{"peer": 0, "codes": A}, {"peer": 1, "codes": B}]


def test_an_offer_of_no_samples_changes_nothing() -> None:
    """It dilutes nothing, it is no bad payload, and what its peer packed missed the round."""
    empty = {"peer": 2, "payload": b"", "n_samples": 0}
    for strategy in (SPSA, {**SPSA, "bound": 0.0}):
        without, found = applied(TWO, strategy), applied([*TWO, empty], strategy)
        assert found.fingerprint() == without.fingerprint()
        assert found.bad == {}
    replica = replica_of(SPSA)
    before = replica.fingerprint()
    own = {"peer": 0, "payload": b"", "n_samples": 0}
    assert replica.apply(with_offers(replica, [own]), inline, offered=True) == "missed"
    assert replica.fingerprint() == before
    assert replica.round == 1


def test_a_payload_that_several_peers_send_counts_once() -> None:
    copied = [*TWO, {"peer": 2, "codes": B}]
    assert applied(copied).fingerprint() == applied(TWO).fingerprint()
    older = {**SHARED, "bound": 0.0}
    assert applied(copied, older).fingerprint() != applied(TWO, older).fingerprint()


def test_data_of_ones_own_is_what_the_offer_says() -> None:
    as_others = {**SPSA, "own_data_share": 0.0}
    told = [TWO[0], {**TWO[1], "own_data": True}]
    assert applied(told).fingerprint() != applied(TWO).fingerprint()
    assert applied(told, as_others).fingerprint() == applied(TWO, as_others).fingerprint()
    everybody = [{**offer, "own_data": True} for offer in TWO]
    assert applied(everybody).fingerprint() == applied(TWO).fingerprint()


def test_new_runs_are_bounded() -> None:
    for strategy in (SPSA, DECOUPLED):
        assert replica_of(strategy).strategy.option("bound") == 2.0
    spsa = replica_of(SPSA).strategy
    assert (spsa.option("clip"), spsa.option("max_probes")) == (4.0, 4)


def test_what_became_of_every_peer_can_be_read() -> None:
    enormous, unreadable = {"peer": 0, "codes": [127, 127, 127, 255]}, {"peer": 2, "payload": b"x"}
    replica = applied([{"peer": 1, "codes": A}, enormous, unreadable])
    assert list(replica.weighed) == [PEERS[1], PEERS[0]]  # in the ledger's order; one was left out
    honest, other = replica.weighed.values()
    assert (honest.size, honest.kept) == (1.0, 1.0)
    assert other.size > 1e3
    assert other.kept < 1e-2
    assert applied([{"peer": 0, "codes": A}], {**SPSA, "bound": 0.0}).weighed == {}


def test_in_a_merge_of_gossip_peers_count_by_all_that_they_have_done_since_the_last_one() -> None:
    """Peer 0 has offered in three rounds, peer 1 in the last one: its weight is twice the other's, as more is
    not. In the merge after that both have done as much."""
    for weights, expected in (("work", -1 / 3), ("samples", 0.0)):
        replica = replica_of({"name": "gossip", "merge_every": 3, "weights": weights})
        before = {name: t.clone() for name, t in replica.tensors().items()}
        for round_ in range(1, 7):
            said = gossip_payloads(replica, 1 if round_ < 3 else 2)
            commit = commit_of(round_, replica.digest, [b"0", b"1"][: len(said)])
            replica.apply(commit, lambda offer: said[offer.peer], offered=False)  # noqa: B023 - called here
            for name, t in replica.tensors().items() if round_ >= 3 else ():
                torch.testing.assert_close(t, before[name] + expected, atol=1e-3, rtol=0)


def gossip_payloads(replica: Replica, n: int) -> list[bytes]:
    """Of the next round: in a merge peer 0 has moved by -1 everywhere, and peer 1 by 1."""
    turn, strategy = replica.turn(), replica.strategy
    payloads: list[Payload] = [{DISTANCE: (torch.zeros(1),)}] * 2
    if turn.round % 3 == 0:
        parameters, merging = strategy.parameters_in_order(), Dense(bits=8)
        payloads = [
            {p.name: merging.pack(torch.full((p.part.n_local,), x), p.part, turn) for p in parameters}
            for x in (1.0, -1.0)
        ]
    return [replica.encode(payload, turn) for payload in payloads[:n]]
