"""Replicas leave condemned peers out, however they come to a round: live, in batches, or from a snapshot."""

from __future__ import annotations

import json
from functools import cache

import msgpack
import numpy as np
import pytest
import torch

from tests.support.audited_ledger import KEYS, PEERS
from thinwire.compression.errors import ReplicaDiverged
from thinwire.coordinator.protocol.identity import peer_id_of
from thinwire.coordinator.protocol.messages import (
    Admission,
    AuditEntry,
    Commit,
    CommitBody,
    GenesisBody,
    OfferEntry,
    Verdict,
    digest_of,
    encode_record,
)
from thinwire.coordinator.protocol.schedule import float32_bits
from thinwire.coordinator.protocol.settings import parse_settings
from thinwire.coordinator.protocol.trust.audits import payload_digest, sign_audit, signed_bytes
from thinwire.coordinator.protocol.trust.standing import Standing
from thinwire.node.config import Audits, RunConfig, load_config, parse_config
from thinwire.node.genesis import initialise, make_genesis, public_config
from thinwire.node.history import History
from thinwire.node.ranks.leader import Follower, FollowerReplica, Leader, LeaderReplica
from thinwire.node.ranks.sharding import Sharding
from thinwire.node.replica import Replica, build_replica
from thinwire.node.snapshots.format import Manifest
from thinwire.node.tasks.registry import make_task
from thinwire.optim.parts.ranks import Alone
from thinwire.optim.spsa import CODES

N_PEERS, BAD, N_ROUNDS = 6, 3, 40
AUDITS = {"rate": 1.0, "failures": 1, "window_rounds": 8}
KEY = KEYS[-1]


def config_of(audits: dict[str, float] | None) -> RunConfig:
    flat = {
        **{"task.layers": 1, "task.width": 16, "task.heads": 2, "task.context": 16, "task.batch": 4},
        **{"task.held_out_bytes": 2048, "run.verify_every": 5, "run.snapshot_every": 5},
    }
    config = load_config(None, flat, environ={})
    strategy = {"name": "spsa", "lr": 1e-3, "probes": 4}
    rules = None if audits is None else Audits.model_validate(audits)
    return config.model_copy(update={"strategy": strategy, "audits": rules})


@cache
def record_0() -> GenesisBody:
    config = config_of(AUDITS)
    return make_genesis(config, make_task(config.task, None, None), peer_id_of(KEY.public_key()), 1).body


RUN = digest_of(b"stands for record 0")


def replica_of(peer: int = 0) -> Replica:
    body = record_0()
    config = parse_config(body.config)
    replica = build_replica(RUN, body, make_task(config.task, None, None), PEERS[peer])
    initialise(replica.model, body, config.run.seed, None)
    return replica


@cache
def ledger() -> tuple[Commit, ...]:
    """Everybody offers in every round, the bad peer too while it is condemned, which no coordinator lets in:
    the rule is the ledger's. All auditors find that its offers fail, and the others' pass."""
    writer, generator = replica_of(), np.random.default_rng(1)
    standing = Standing(RUN, parse_config(record_0().config).audits)
    parent, commits, audits = RUN, list[Commit](), list[AuditEntry]()
    for r in range(1, N_ROUNDS + 1):
        offers = []
        for peer in range(N_PEERS):
            codes = torch.from_numpy(generator.integers(40, 90, 4).astype(np.uint8))
            payload = writer.encode({CODES: (codes,)}, writer.turn())
            offers.append(
                OfferEntry(
                    peer=peer,
                    n_samples=1,
                    n_tokens=1,
                    loss=None,
                    n_bytes=len(payload),
                    payload=payload,
                    digest=None,
                )
            )
        body = CommitBody(
            round=r,
            parent=parent,
            offers=tuple(offers),
            admitted=tuple(Admission(index=i, peer_id=PEERS[i]) for i in range(N_PEERS) if r == 1),
            lr_factor_bits=float32_bits(1.0),
            reports=(),
            snapshots=(),
            evaluator=None,
            time_ms=r,
            audits=tuple(audits),
        )
        record = encode_record(body)
        commits.append(Commit(record=record, signature=KEY.sign(record)))
        standing.committed(body, commits[-1].digest)
        audits = [
            audit(r, draw.target, auditor, offers[draw.target])
            for draw in standing.drawn(r)
            for auditor in draw.auditors
        ]
        parent, writer.round = commits[-1].digest, r
    return tuple(commits)


def audit(round_: int, target: int, auditor: int, offer: OfferEntry) -> AuditEntry:
    verdict = Verdict.FAILED if target == BAD else Verdict.PASSED
    claim = signed_bytes(RUN, round_, PEERS[target], payload_digest(offer), verdict)
    signature = sign_audit(KEYS[auditor], claim)
    return AuditEntry(round=round_, target=target, auditor=auditor, verdict=verdict, signature=signature)


def terms() -> set[int]:
    """Rounds in which the bad peer is condemned."""
    standing, found = Standing(RUN, parse_config(record_0().config).audits), set()
    for commit in ledger():
        found |= {commit.body.round} if BAD in standing.condemned_in(commit.body.round) else set()
        standing.committed(commit.body, commit.digest)
    return found


def inline(offer: OfferEntry) -> bytes:
    assert offer.payload is not None
    return offer.payload


def without_the_bad_one() -> Replica:
    """The oracle: the shares by hand."""
    replica, out = replica_of(), terms()
    for commit in ledger():
        offers = [o for o in commit.body.offers if (o.peer, commit.body.round in out) != (BAD, True)]
        turn = replica.turn()
        replica.standing.committed(commit.body, commit.digest)
        replica.peers.update({a.index: a.peer_id for a in commit.body.admitted})
        ahead = type("Ahead", (), {"peers": replica.peers, "bad": replica.bad})()
        shares, _ = replica._shares(commit, tuple(offers), turn, inline, ahead)
        replica.strategy.apply(shares, turn, None)
        replica.round += 1
        replica._lr_factor = 1.0
    return replica


def test_condemned_peers_make_no_shares() -> None:
    out = terms()
    assert 5 < len(out) < N_ROUNDS - 2, "it is condemned, and comes back"
    one_by_one, together, own = replica_of(), replica_of(), replica_of(BAD)
    for commit in ledger():
        one_by_one.apply(commit, inline, offered=False)
    together.apply_batch(ledger(), inline)
    fates = own.apply_batch(ledger(), inline, offered=range(1, N_ROUNDS + 1))
    found = without_the_bad_one().fingerprint()
    assert one_by_one.fingerprint() == together.fingerprint() == own.fingerprint() == found
    assert one_by_one.bad == together.bad == {"condemned": len(out)}
    assert [r for r, fate in enumerate(fates, 1) if fate == "missed"] == sorted(out)
    everybody = replica_of()
    everybody.standing = Standing(RUN)
    everybody.apply_batch(ledger(), inline)
    assert everybody.fingerprint() != found


def test_payloads_of_condemned_peers_are_not_even_fetched() -> None:
    fetched = list[tuple[int, bytes]]()

    def payload(offer: OfferEntry) -> bytes:
        fetched.append((offer.peer, inline(offer)))
        return inline(offer)

    replica_of().apply_batch(ledger(), payload)
    assert len([peer for peer, _ in fetched if peer == BAD]) == N_ROUNDS - len(terms())


def test_healing_and_snapshots_say_the_same() -> None:
    replica = replica_of()
    replica.apply_batch(ledger(), inline)
    found = replica.fingerprint()
    # Back to an earlier round, as for a check, and the same again.
    saved, admitted = replica.saved(), dict(replica.peers)
    replica.begin(None)
    replica.peers = {}
    replica.apply_batch(ledger()[:20], inline)
    middle = replica.saved()
    replica.apply_batch(ledger()[20:], inline)
    assert replica.fingerprint() == found
    replica.peers.popitem()  # somebody was admitted since
    replica.restore(saved)
    assert replica.fingerprint() == found
    assert replica.peers == admitted
    # A joiner has read the ledger, and starts from a snapshot.
    replica.restore(middle)
    manifest = Manifest(
        version=2,
        run_id=RUN,
        round=20,
        commit=ledger()[19].digest,
        fingerprint=replica.fingerprint(),
        n_bytes=1,
        chunks=(digest_of(b""),),
    )
    joiner = replica_of()
    history = History.of(joiner, 5)
    assert history.standing is joiner.standing
    for commit in ledger():
        history.add(commit)
    joiner.adopt(manifest, middle.tensors, ledger()[19])
    joiner.peers = dict(history.peers)
    joiner.apply_batch(ledger()[20:], inline)
    assert joiner.fingerprint() == found


def test_a_replica_that_does_not_know_the_earlier_commits_applies_nothing() -> None:
    replica = replica_of()
    replica.round, replica.digest = 20, ledger()[19].digest
    replica.peers = dict(enumerate(PEERS))
    with pytest.raises(ReplicaDiverged, match="round 21 cannot be applied: commits are needed in order"):
        replica.apply(ledger()[20], inline, offered=False)


class Tape(Alone):
    """What rank 0 announces."""

    def __init__(self) -> None:
        self.said: list[bytes] = []

    def broadcast(self, data: bytes | None) -> bytes:
        assert data is not None
        self.said.append(data)
        return data


def test_other_ranks_are_told_who_is_condemned() -> None:
    """Rank 0 sends no payload of theirs, and the other ranks pair payloads and offers as it does."""
    body, tape, device = record_0(), Tape(), torch.device("cpu")
    sharding = Sharding(ranks=1, precision="auto", activation_checkpointing=False, cpu_offload=False)
    here, there = replica_of(), replica_of()
    channel = Leader(tape, device, sharding)
    leader = LeaderReplica(channel, RUN, body, here.model, here.strategy, PEERS[0])
    follower = Follower(tape, device, sharding, import_path=None, data=None)
    follower._replica = FollowerReplica(RUN, body, there.model, there.strategy, PEERS[0])
    for first in range(0, N_ROUNDS, 8):
        leader.apply_batch(ledger()[first : first + 8], inline)
        what, *values = msgpack.unpackb(tape.said.pop())
        assert what == "apply"
        follower._apply(*values)
    assert follower._replica.fingerprint() == leader.fingerprint() == without_the_bad_one().fingerprint()
    assert follower._replica.bad == {"condemned": len(terms())}


def test_who_is_new_weighs_less_where_others_are_known() -> None:
    """Until the last audit of its offers has passed, in runs whose record 0 says so."""
    standing, new = Standing(RUN, parse_config(record_0().config).audits), dict[int, list[bool]]()
    for commit in ledger():
        new[commit.body.round] = [standing.is_new_in(peer, commit.body.round) for peer in range(N_PEERS)]
        standing.committed(commit.body, commit.digest)
    assert not any(new[1]), "nobody is, before half are known"
    assert new[N_ROUNDS] == [peer == BAD for peer in range(N_PEERS)]
    assert any(0 < sum(of_round) <= N_PEERS / 2 for of_round in new.values())
    for round_, of_round in new.items():
        assert of_round == [standing.is_new_in(peer, round_) for peer in range(N_PEERS)], "later, too"
    as_others, found = replica_of(), replica_of()
    for group in as_others.strategy.param_groups:
        group["newcomers"] = 1.0
    for replica in (as_others, found):
        replica.apply_batch(ledger(), inline)
    assert found.fingerprint() != as_others.fingerprint()


def test_new_runs_have_audits_and_old_ones_stay_what_they_are() -> None:
    config = config_of(None)
    task = make_task(config.task, None, None)
    new = public_config(config, task)
    since = {
        "own_data_auditors": False,
        "newcomers_rate": 1.0,
        "newcomers_budget": 10.0,
        "flood_failures": 6,
    }
    assert new.audits == Audits.model_validate(since)
    before = {"rate": 0.01, "failures": 2, "window_rounds": 1000}
    assert json.loads(new.to_json())["audits"] == {**before, **since}
    with_all = new.model_copy(update={"audits": Audits()})  # of a run that is older than the option
    assert json.loads(with_all.to_json())["audits"] == before
    drawn = parse_settings(with_all.to_json()).audits
    assert drawn is not None
    assert (drawn.own_data_auditors, drawn.newcomers_rate, drawn.newcomers_budget) == (True, 0.0, 0.0)
    assert drawn.flood_failures == 0
    assert public_config(config, task, recorded=with_all) == with_all
    old = new.model_copy(update={"audits": None})
    assert "audits" not in json.loads(old.to_json())
    assert public_config(config, task, recorded=old).audits is None
    assert public_config(old, task, recorded=old) == old
    assert public_config(config, task, recorded=new) == new
    assert Standing(RUN, old.audits).condemned_in(10**6) == frozenset()


def test_in_a_new_run_that_anybody_may_join_other_data_is_a_quarter_of_a_round() -> None:
    config = config_of(None)
    task = make_task(config.task, None, None)

    def share(config: RunConfig, recorded: RunConfig | None = None) -> tuple[float, bool]:
        strategy = public_config(config, task, recorded).strategy
        return strategy["own_data_share"], strategy["own_data_alone"]

    invited = config.model_copy(update={"admission": config.admission.model_copy(update={"mode": "invited"})})
    said = config.model_copy(update={"strategy": {**config.strategy, "own_data_share": 0.5}})
    assert share(config) == (0.25, True)
    assert share(invited) == (0.0, True)
    assert share(said) == (0.5, True)
    made = public_config(invited, task)
    assert share(config, made) == (0.0, True), "the record stands, whoever may come in later"
    older = {k: v for k, v in made.strategy.items() if k != "own_data_alone"}
    assert share(config, made.model_copy(update={"strategy": older})) == (0.0, False)
