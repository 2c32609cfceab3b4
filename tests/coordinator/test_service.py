"""The coordinator's service: sessions and messages in, messages and commits out, on a clock of the test."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.support.service_world import MakeWorld, World, blob_offer, offer
from thinwire.compression.errors import ConfigError, Incompatible, LedgerCorrupt, SwarmUnreachable
from thinwire.coordinator import retention
from thinwire.coordinator.blobs import BlobStore
from thinwire.coordinator.ledger import Ledger
from thinwire.coordinator.peers import SCRAPED_S
from thinwire.coordinator.protocol.identity import peer_id_of
from thinwire.coordinator.protocol.messages import (
    INLINE_BYTES,
    BadMessage,
    BlobRef,
    Commit,
    EdgeEntry,
    Evaluation,
    Figure,
    Follow,
    GenesisBody,
    Gossiping,
    Heartbeat,
    Members,
    NodeState,
    NoiseEntry,
    Notice,
    Offer,
    Offered,
    Report,
    State,
    digest_of,
)
from thinwire.coordinator.protocol.schedule import lr_factor_bits
from thinwire.coordinator.protocol.settings import Keep
from thinwire.coordinator.service import Service

# ------------------------------------------------------------------------------------------------- opening


def test_a_banned_peer_is_not_let_in_again(make_world: MakeWorld) -> None:
    world = make_world()
    world.train("a", "b")
    world.restart(banned=frozenset(["b"]))
    world.open("a")
    with pytest.raises(ConfigError, match="this peer was banned from the run"):
        world.open("b")
    assert world.status()["rejected"] == {"banned": 1}
    assert not world.service.is_member("b")


def test_a_new_token_is_for_newcomers(make_world: MakeWorld) -> None:
    world = make_world()
    world.train("a", "b")
    world.restart(banned=frozenset(["b"]))
    world.open("a", token="an older one")
    assert world.service.is_member("a")
    for stranger, text in (("b", "was banned"), ("c", "token is wrong")):
        with pytest.raises(ConfigError, match=text):
            world.open(stranger, token="an older one")
    assert world.status()["rejected"] == {"banned": 1, "token": 1}


@pytest.mark.parametrize(
    ("changes", "error", "text", "reason"),
    [
        ({"token": "wrong"}, ConfigError, "token", "token"),
        ({"token": "sécret"}, ConfigError, "token", "token"),
        ({"version": 99}, Incompatible, "version 99 here, 4 at", "version"),
        ({"run_id": bytes(32)}, Incompatible, "is for run 0000000000000000", "run"),
        ({"head_round": 0, "head_digest": bytes(32)}, LedgerCorrupt, "not on", "head"),
        ({"head_round": 9, "head_digest": bytes(32)}, LedgerCorrupt, "older copy", "head"),
    ],
)
def test_who_does_not_fit_is_not_let_in(
    make_world: MakeWorld, changes: dict[str, Any], error: type[Exception], text: str, reason: str
) -> None:
    world = make_world()
    with pytest.raises(error, match=text):
        world.open("a", **changes)
    assert world.status()["rejected"] == {reason: 1}
    assert world.status()["peers"] == []
    assert not world.service.is_member("a")


def test_welcome_says_where_the_run_stands(make_world: MakeWorld) -> None:
    world = make_world(min_peers=1)
    world.train("a")
    world.say("a", offer(1))
    welcome = world.open("b", head_round=0, head_digest=world.ledger.run_id)
    assert (welcome.head_round, welcome.head_digest) == (1, world.ledger.head_digest)
    assert (welcome.peer_index, welcome.heartbeat_s) == (1, 1.0)
    assert digest_of(welcome.genesis) == world.ledger.run_id


def test_a_full_swarm_lets_in_whoever_it_knows(make_world: MakeWorld) -> None:
    world = make_world(max_peers=2)
    world.train("a", "b")
    with pytest.raises(Incompatible, match="full: 2 of 2"):
        world.open("c")
    world.open("a")
    world.service.closed("b", 1, world.now_s)
    world.wait(2.5, "a")
    assert world.open("c").peer_index == 2


def test_another_key_is_not_this_run_s(make_world: MakeWorld) -> None:
    world = make_world()
    world.key = Ed25519PrivateKey.generate()
    with pytest.raises(ConfigError, match="key"):
        world.start()


def test_frames_of_a_replaced_session_are_dropped_and_counted(make_world: MakeWorld) -> None:
    world = make_world()
    world.train("a", "b")
    world.open("a")
    world.service.receive("a", 1, offer(1, b"old"), world.now_s)
    world.service.closed("a", 1, world.now_s)
    assert world.status()["rejected"] == {"old_session": 1}
    assert world.service.is_member("a")
    world.say("a", offer(1, b"new"))
    world.say("b", offer(1))
    assert world.service.commits(0, 1)[0].body.offers[0].payload == b"new"
    with pytest.raises(BadMessage, match="replaced"):
        world.service.open("a", 1, world.hello(), world.now_s)


def test_nobody_speaks_without_a_session(make_world: MakeWorld) -> None:
    world = make_world()
    with pytest.raises(BadMessage, match="no session"):
        world.service.receive(
            "x", 1, Heartbeat(round=0, sent_bytes=0, received_bytes=0, payload_bytes=0), 0.0
        )
    with pytest.raises(BadMessage, match="only members"):
        world.service.may_store("x", 1)
    world.open("a")
    with pytest.raises(BadMessage, match="Follow is not for the coordinator"):
        world.say("a", Follow(after=0))
    assert world.status()["rejected"] == {"not_admitted": 2, "wrong_message": 1}


def test_members_are_told_to_all_when_they_change(make_world: MakeWorld) -> None:
    world = make_world()
    world.open("a", "b")
    world.service.tick(world.now_s)
    for name in ("a", "b"):
        assert [[m.peer_id for m in told.members] for told in world.messages(Members, name)] == [["a", "b"]]
    world.sent.clear()
    world.wait(1.0, "a", "b")
    assert world.messages(Members) == []
    world.service.closed("b", 1, world.now_s)
    world.service.tick(world.now_s)
    assert [[m.peer_id for m in told.members] for told in world.messages(Members, "a")] == [["a"]]
    world.sent.clear()
    world.open("a")
    world.service.tick(world.now_s)
    assert len(world.messages(Members, "a")) == 1, "a new session is told even when nothing has changed"


# -------------------------------------------------------------------------------------------------- rounds


def test_a_round_becomes_a_commit(make_world: MakeWorld, make_genesis: Callable[..., GenesisBody]) -> None:
    world = make_world(rounds=5)
    world.train("a", "b")
    assert world.status()["state"] == "training"
    world.wait(1.0)
    world.say("b", offer(1, b"from b", loss=float("nan")))
    assert world.committed == []
    world.say("a", offer(1, b"from a", loss=2.0))
    assert world.committed == [1]
    commit = world.service.commits(0, 10)[0]
    world.key.public_key().verify(commit.signature, commit.record)
    body = commit.body
    assert [(o.peer, o.payload, o.loss) for o in body.offers] == [(0, b"from a", 2.0), (1, b"from b", None)]
    assert [(a.index, a.peer_id) for a in body.admitted] == [(0, "a"), (1, "b")]
    assert (body.parent, body.time_ms, body.evaluator) == (world.ledger.run_id, 123, None)
    assert body.lr_factor_bits == lr_factor_bits(world.service.course, 2)
    status = world.status()
    assert (status["round"], status["loss"], status["round_s"]) == (1, 2.0, 1.0)
    assert status["payload_bytes_per_peer_round"] == 6
    assert status["ddp_bytes_per_peer_round"] == 2 * (2 - 1) / 2 * 4 * 20
    assert world.peer("a")["offers_counted"] == 1


def test_blobs_make_an_offer_eligible(make_world: MakeWorld) -> None:
    world = make_world()
    world.train("a", "b")
    data = bytes(5000)
    world.say("b", blob_offer(1, data))
    world.say("a", offer(1))
    assert world.committed == []
    world.upload("b", data)
    assert world.committed == [1]
    world.upload("a", bytes(6000))
    world.say("a", blob_offer(2, bytes(6000)))
    world.say("b", offer(2))
    assert world.committed == [1, 2]
    assert world.service.commits(1, 1)[0].body.offers[0].n_bytes == 6000


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (offer(1, n_bytes=4), "size"),
        (offer(1, bytes(INLINE_BYTES + 1)), "size"),
        (offer(1, digest=bytes(32)), "offer"),
        (offer(1, payload=None), "offer"),
        (offer(1, n_samples=1001), "samples"),
        (offer(1, payload=None, digest=bytes(32), n_bytes=2**20 + 1), "oversized"),
    ],
)
def test_wrong_offers_are_bad_messages(make_world: MakeWorld, wrong: Offer, reason: str) -> None:
    world = make_world()
    world.train("a", "b")
    with pytest.raises(BadMessage):
        world.say("a", wrong)
    assert world.status()["rejected"] == {reason: 1}


def test_a_lie_about_a_blob_s_size_harms_only_the_liar(make_world: MakeWorld) -> None:
    world = make_world()
    world.train("a", "b", "liar")
    data = bytes(5000)
    world.say("liar", blob_offer(1, data).model_copy(update={"n_bytes": 4999}))
    world.say("b", blob_offer(1, data))
    world.say("a", offer(1))
    world.upload("b", data)
    assert world.committed == [1]
    assert [o.peer for o in world.service.commits(0, 1)[0].body.offers] == [0, 1]
    with pytest.raises(BadMessage, match="a blob of 5000 bytes offered as 4999"):
        world.say("liar", blob_offer(2, data).model_copy(update={"n_bytes": 4999}))
    assert world.status()["rejected"] == {"size": 2}


def test_uploads_are_bounded(make_world: MakeWorld) -> None:
    world = make_world(max_payload_bytes=10_000, min_peers=1)
    world.train("a")
    with pytest.raises(BadMessage, match="the run allows 10000"):
        world.service.may_store("a", 10_001)
    for _ in range(4):
        world.service.may_store("a", 10_000)
    with pytest.raises(BadMessage, match="uploaded since the last commit"):
        world.service.may_store("a", 1)
    assert world.status()["rejected"] == {"oversized": 1, "quota": 1}
    world.say("a", offer(1))
    world.service.may_store("a", 10_000)


def test_a_changed_offer_is_refused_and_its_owner_told(make_world: MakeWorld) -> None:
    world = make_world()
    world.train("a", "b")
    world.say("a", offer(1, b"one"))
    world.say("a", offer(1, b"two"))
    assert world.status()["rejected"] == {"changed_offer": 1}
    assert [m.warning for m in world.messages(Notice, "a")] == [True]
    assert world.messages(Notice, "b") == []


def test_a_peer_whose_connection_broke_is_awaited_for_two_seconds(make_world: MakeWorld) -> None:
    world = make_world()
    world.train("a", "b")
    world.say("a", offer(1))
    world.service.closed("b", 1, world.now_s)
    world.wait(1.5, "a")
    assert world.committed == []
    world.wait(0.5, "a")
    assert world.committed == [1]
    assert world.peer("b")["state"] == "gone"
    assert world.status()["since_start"]["left"] == {"connection_lost": 1}


def test_a_silent_peer_is_awaited_for_ten_seconds(make_world: MakeWorld) -> None:
    world = make_world()
    world.train("a", "b")
    world.say("a", offer(1))
    world.wait(9.5, "a")
    assert world.committed == []
    world.wait(0.5, "a")
    assert world.committed == [1]
    assert world.peer("b")["offers_missed"] == 0, "it was gone, not slow"
    assert world.status()["since_start"]["left"] == {"silent": 1}


def test_who_is_to_be_scraped_and_what_is_counted_since_the_start(make_world: MakeWorld) -> None:
    """Who leaves is not missed, who goes without a word is, for an hour; also over a restart."""
    world = make_world()
    assert world.service.scraped(world.now_s) == []
    assert world.status()["last_commit_ms"] is None
    world.train("a", "b", "c")
    world.round(1, "a", "b")
    world.say("b", State(state=NodeState.LEAVING))
    world.service.closed("b", 1, world.now_s)
    world.service.closed("c", 1, world.now_s)
    world.wait(20, "a")
    assert world.service.scraped(world.now_s) == ["a", "c"]
    assert world.service.scraped(world.now_s + SCRAPED_S) == ["a"]
    assert world.service.is_admitted("b")
    assert not world.service.is_admitted("x")
    world.open("c")
    since_start = world.status()["since_start"]
    assert since_start["joined"] == {"new": 3, "returned": 1}
    assert since_start["left"] == {"said_so": 1, "connection_lost": 1}
    assert since_start["closed"] == {"complete": 1}
    assert sum(since_start["durations"]) == 1
    assert world.status()["last_commit_ms"] == 123
    assert world.status()["payload_bytes"] == len(b"abc" + b"abcb")
    assert world.status()["ledger_bytes"] > 4096
    world.restart()
    assert world.service.scraped(world.now_s) == ["a", "b"], "they were in the last commits"
    assert world.status()["since_start"]["closed"] == {}
    assert world.status()["last_commit_ms"] == 123


def test_the_adaptive_deadline_leaves_the_slow_one_out(make_world: MakeWorld) -> None:
    world = make_world(policy="deadline")
    world.train("a", "b")
    for round_ in (1, 2, 3):
        world.now_s += 1.0
        world.say("a", offer(round_))
        world.say("b", offer(round_))
    world.now_s += 1.0
    world.say("a", offer(4))
    assert world.service.tick(world.now_s) == world.now_s + 0.5
    world.wait(0.5, "a", "b")
    assert world.committed == [1, 2, 3, 4]
    world.say("b", offer(4))
    assert world.status()["rejected"] == {"late_offer": 1}
    assert (world.peer("b")["offers_counted"], world.peer("b")["offers_missed"]) == (3, 1)


def test_a_peer_that_is_always_too_slow_is_told(make_world: MakeWorld) -> None:
    world = make_world(policy="fastest", rounds=100, min_peers=3)
    world.train("a", "b", "c")
    for round_ in range(1, 21):
        world.now_s += 1.0
        world.round(round_, "a", "b")
        if round_ <= 3:
            world.now_s += 9.0
            world.say("c", offer(round_))
        world.say("c", Heartbeat(round=0, sent_bytes=10, received_bytes=20, payload_bytes=5))
    assert world.committed == list(range(1, 21))
    assert world.peer("c")["missed_in_a_row"] == 17
    assert [m.text for m in world.messages(Notice, "c") if "16 rounds closed" in m.text]
    assert not [m.text for m in world.messages(Notice, "a") if "16 rounds closed" in m.text]
    world.say("c", offer(20))
    assert world.status()["rejected"] == {"late_offer": 1}
    world.say("c", offer(21))
    world.round(21, "a", "b")
    assert world.peer("c")["missed_in_a_row"] == 0


def test_an_excused_peer_is_not_awaited(make_world: MakeWorld) -> None:
    world = make_world()
    world.train("a", "b")
    world.say("a", offer(1))
    world.service.excuse("b", 1, world.now_s)
    world.service.excuse("unknown", 1, world.now_s)
    assert world.committed == [1]


# ------------------------------------------------------------------------------------------------- restart


def test_a_restart_goes_on_where_it_was(make_world: MakeWorld) -> None:
    world = make_world(eval_every=2)
    world.train("a", "b")
    for round_ in (1, 2):
        world.say("a", offer(round_))
        world.say("b", offer(round_))
    world.say("a", Report(round=2, fingerprint=b"12345678", held_out=3.5))
    world.open("c")
    before = world.service.commits(0, 10)
    head = world.ledger.head_digest
    world.restart()
    assert world.service.commits(0, 10) == before
    assert world.status()["held_out"] == [[2, 3.5]]
    assert [p["state"] for p in world.status()["peers"]] == ["training", "training"], "c has never trained"
    world.train("a", "b")
    assert world.open("c", head_round=2, head_digest=head).peer_index == 2
    assert world.open("d").peer_index == 3
    world.say("b", offer(3))
    assert world.committed[-1] == 2, "peer 0, who evaluates round 2, offers before it does"
    world.say("a", offer(3))
    assert world.committed[-1] == 3
    assert [a.peer_id for a in world.service.commits(2, 1)[0].body.admitted] == ["c", "d"]


def test_peers_of_the_last_commits_stay_expected_after_a_restart(make_world: MakeWorld) -> None:
    world = make_world()
    world.train("a", "b")
    world.say("a", offer(1))
    world.say("b", offer(1))
    world.restart()
    world.train("b")
    world.say("b", offer(2))
    world.wait(9.5, "b")
    assert world.committed[-1] == 1
    world.wait(0.5, "b")
    assert world.committed[-1] == 2


def test_blobs_of_the_run_must_be_there(
    tmp_path: Path, make_genesis: Callable[..., GenesisBody], key: Ed25519PrivateKey
) -> None:
    text = b"held-out text"
    genesis = make_genesis().model_copy(update={"held_out": BlobRef(digest=digest_of(text), n_bytes=13)})
    ledger = Ledger.create(tmp_path / "ledger.db", genesis, key)
    blobs = BlobStore(tmp_path / "blobs")

    def start() -> Service:
        return Service(
            ledger=ledger,
            blobs=blobs,
            key=key,
            token="secret",
            send=lambda _peer, _message: None,
            on_commit=lambda _round: None,
            now_s=0.0,
            wall_ms=lambda: 0,
        )

    with pytest.raises(ConfigError, match="missing"):
        start()
    blobs.put(digest_of(text), text)
    start()
    blobs.release(counted_to=99, offered_to=99)
    assert digest_of(text) in blobs
    ledger.close()


# ----------------------------------------------------------------------------------- reports and snapshots


def test_fingerprints_that_disagree_are_counted_and_told(make_world: MakeWorld) -> None:
    world = make_world()
    world.train("a", "b", "c")
    for round_ in (1, 2):
        for peer in "abc":
            world.say(peer, offer(round_))
    world.say("a", Report(round=2, fingerprint=b"AAAAAAAA"))
    world.say("b", Report(round=2, fingerprint=b"AAAAAAAA"))
    assert world.status()["mismatches"] == 0
    world.say("c", Report(round=2, fingerprint=b"CCCCCCCC"))
    world.say("c", Report(round=2, fingerprint=b"CCCCCCCC"))
    assert world.status()["mismatches"] == 1
    (notice,) = world.messages(Notice, "a")
    assert notice.warning
    assert notice.text == "round 2: the replica of c differs from that of a, b"
    for peer in "abc":
        world.say(peer, offer(3))
    reports = world.service.commits(2, 1)[0].body.reports
    assert [(e.peer, e.fingerprint[:1]) for e in reports] == [(0, b"A"), (1, b"A"), (2, b"C")]
    world.restart()
    assert world.status()["mismatches"] == 1
    assert world.peer("c")["fingerprint"] == b"CCCCCCCC".hex()


def test_who_has_not_worked_reports_nothing(make_world: MakeWorld, caplog: pytest.LogCaptureFixture) -> None:
    world = make_world(snapshot_every=1)
    world.train("a", "b")
    world.round(1, "a", "b")
    for idle in "cde":
        world.open(idle)
    with caplog.at_level("INFO"):
        caplog.clear()
        for idle in "cde":
            world.say(idle, Report(round=1, fingerprint=b"CCCCCCCC", checked=True))
            world.snapshot(1, idle, manifest=b"x" * 32)
    assert [record.getMessage() for record in caplog.records] == []
    world.say("a", Report(round=1, fingerprint=b"AAAAAAAA"))
    world.round(2, "a", "b")
    body = commits(world)[-1].body
    assert [(e.peer, e.fingerprint[:1]) for e in body.reports] == [(0, b"A")]
    assert body.snapshots == ()
    assert world.status()["mismatches"] == 0
    assert world.status()["rejected"] == {"no_work": 6}


def test_a_flood_of_reports_does_not_enter_the_ledger(make_world: MakeWorld) -> None:
    world = make_world(min_peers=1, rounds=50)
    world.train("a")
    for round_ in range(1, 11):
        world.say("a", offer(round_))
    for round_ in range(1, 11):
        world.say("a", Report(round=round_, fingerprint=round_.to_bytes(8, "big")))
    world.say("a", offer(11))
    assert len(world.service.commits(10, 1)[0].body.reports) == 4
    assert world.status()["rejected"] == {"too_many_reports": 6}


def test_only_the_evaluator_reports_a_held_out_loss(make_world: MakeWorld) -> None:
    world = make_world(eval_every=1)
    world.train("a", "b")
    world.say("b", Report(round=0, held_out=9.0))
    world.say("a", Report(round=0, held_out=5.5))
    world.say("b", offer(1))
    world.say("a", offer(1))
    world.say("a", Report(round=1, held_out=float("inf")))
    assert world.status()["held_out"] == [[0, 5.5]]
    world.say("a", Report(round=1, held_out=4.5))
    assert world.status()["held_out"] == [[0, 5.5], [1, 4.5]]
    assert world.status()["rejected"] == {"held_out": 2}
    with pytest.raises(BadMessage, match="to come"):
        world.say("a", Report(round=2, held_out=1.0))


def test_evaluations_are_kept_where_the_run_asks_for_them(make_world: MakeWorld) -> None:
    def said(round_: int, value: float, failed: str | None = None) -> Evaluation:
        return Evaluation(round=round_, figures=(Figure(name="accuracy", value=value),), failed=failed)

    world = make_world(rounds=5, evaluation={"every": 2})
    world.train("a", "b")
    for round_ in (1, 2, 3, 4, 5):
        world.round(round_, "a", "b")
        if round_ == 3:
            with pytest.raises(BadMessage, match="to come"):
                world.say("a", said(4, 0.5))
    for evaluation in (said(2, 0.25), said(2, 0.75), said(5, 0.5), said(3, 0.5), said(4, float("nan"))):
        world.say("a", evaluation)
    world.say("a", Evaluation(round=4, figures=()))
    world.say("b", said(4, 0.0, "no \x1b[31mroom"))
    assert world.status()["evaluations"] == [[2, {"accuracy": 0.25}], [5, {"accuracy": 0.5}]]
    assert world.status()["rejected"] == {"evaluation": 3, "report_round": 1}
    assert world.status()["failed_evaluations"] == 1
    assert world.status()["last_failed_evaluation"] == (4, "no [31mroom")
    world.restart()
    assert world.status()["evaluations"] == [[2, {"accuracy": 0.25}], [5, {"accuracy": 0.5}]]


def test_a_run_that_asks_for_no_evaluation_keeps_none(make_world: MakeWorld) -> None:
    world = make_world()
    world.train("a", "b")
    world.round(1, "a", "b")
    world.say("a", Evaluation(round=1, figures=(Figure(name="accuracy", value=0.5),)))
    assert (world.status()["evaluations"], world.status()["rejected"]) == ([], {"evaluation": 1})


def test_a_later_fingerprint_replaces_the_earlier_one(make_world: MakeWorld) -> None:
    world = make_world()
    world.train("a", "b")
    world.round(1, "a", "b")
    for said in (b"WWWWWWWW", False), (b"RRRRRRRR", True), (b"RRRRRRRR", True):
        world.say("b", Report(round=1, fingerprint=said[0], checked=said[1]))
    world.say("a", Report(round=1, fingerprint=b"RRRRRRRR"))
    assert world.status()["mismatches"] == 0, "it had healed before anybody could differ"
    world.round(2, "a", "b")
    world.say("a", Report(round=1, fingerprint=b"RRRRRRRR", checked=True))
    for said in (b"WWWWWWWW", False), (b"RRRRRRRR", True):  # sent again after a reconnect
        world.say("b", Report(round=1, fingerprint=said[0], checked=said[1]))
    world.round(3, "a", "b")
    reports = [[(e.peer, e.fingerprint[:1], e.checked) for e in c.body.reports] for c in commits(world)]
    assert reports == [[], [(1, b"R", True), (0, b"R", False)], [(0, b"R", True)]]
    assert world.status()["mismatches"] == 0
    assert world.peer("b")["fingerprint"] == b"RRRRRRRR".hex()


def test_reports_are_not_entered_twice_not_even_after_a_restart(make_world: MakeWorld) -> None:
    world = make_world(snapshot_every=1)
    world.train("a", "b")
    world.round(1, "a", "b")
    said = Report(round=1, fingerprint=b"12345678", snapshot=b"m" * 32, snapshot_bytes=7)
    world.say("a", said)
    world.round(2, "a", "b")
    world.say("a", said)
    world.restart()
    world.train("a", "b")
    world.say("a", said)
    world.round(3, "a", "b")
    assert [len(c.body.reports) for c in commits(world)] == [0, 1, 0]
    assert [len(c.body.snapshots) for c in commits(world)] == [0, 1, 0]
    assert world.status()["rejected"] == {}


def test_fingerprints_and_snapshots_have_their_rounds(make_world: MakeWorld) -> None:
    world = make_world(min_peers=1, rounds=7, verify_every=2, snapshot_every=4)
    world.train("a")
    for round_ in range(1, 6):
        world.round(round_, "a")
    for round_ in range(6):
        world.say("a", Report(round=round_, fingerprint=round_.to_bytes(8, "big")))
        world.snapshot(round_, "a")
    world.say("a", Report(round=4, snapshot=bytes(32)))  # without its size
    world.round(6, "a")
    body = commits(world)[-1].body
    assert [e.round for e in body.reports] == [0, 2, 4]
    assert [(e.round, e.n_bytes) for e in body.snapshots] == [(4, 1004)]
    assert world.status()["rejected"] == {"fingerprint": 3, "snapshot": 6}
    world.round(7, "a")
    world.say("a", Report(round=7, fingerprint=b"the last"))
    assert world.status()["rejected"] == {"fingerprint": 3, "snapshot": 6}
    assert world.peer("a")["fingerprint_round"] == 7


def test_two_reports_attest_a_snapshot(make_world: MakeWorld) -> None:
    world = make_world(snapshot_every=2)
    world.train("a", "b", "c")
    for round_ in (1, 2):
        world.round(round_, "a", "b", "c")
    world.snapshot(2, "a", manifest=b"x" * 32)
    world.snapshot(2, "a", "b")
    world.round(3, "a", "b", "c")
    entries = commits(world)[-1].body.snapshots
    assert [(e.peer, e.round, e.manifest, e.n_bytes) for e in entries] == [
        (0, 2, b"m" * 32, 1002),
        (1, 2, b"m" * 32, 1002),
    ]
    assert world.status()["snapshot"] == {"round": 2, "bytes": 1002, "holders": 2}
    world.service.closed("a", 1, world.now_s)
    assert world.status()["snapshot"] == {"round": 2, "bytes": 1002, "holders": 1}
    world.restart()
    assert world.status()["snapshot"] == {"round": 2, "bytes": 1002, "holders": 0}


# ------------------------------------------------------------------------------------------------ payloads


def commits(world: World) -> list[Commit]:
    return world.service.commits(0, 1000)


def test_who_has_which_payload_is_told_to_the_others(make_world: MakeWorld) -> None:
    world = make_world(min_peers=3)
    world.train("a", "b", "c")
    data = bytes(5000)
    world.say("a", blob_offer(1, data))
    assert world.messages(Offered) == [], "the upload comes first"
    world.upload("a", data)
    world.say("a", blob_offer(1, data))
    world.say("b", offer(1))
    told = Offered(
        round=1,
        holder=peer_id_of(world.key.public_key()),
        digest=digest_of(data),
        n_bytes=5000,
    )
    for name, expected in (("a", []), ("b", [told]), ("c", [told])):
        assert world.messages(Offered, name) == expected
    world.sent.clear()
    world.open("d")
    assert world.messages(Offered) == []
    world.service.tick(world.now_s)
    assert [m for m in world.sent if isinstance(m[1], Offered)] == [("d", told)]
    members, offered = (m for peer, m in world.sent if peer == "d")
    assert isinstance(members, Members), "the holder's addresses come first"
    assert offered == told
    world.sent.clear()
    world.say("d", State(state=NodeState.TRAINING))
    world.say("a", State(state=NodeState.TRAINING))
    world.say("c", offer(1))
    assert world.committed == [1]
    world.open("e")
    world.service.tick(world.now_s)
    assert world.messages(Offered) == [], "its round is over"


def test_a_newcomer_hears_only_of_payloads_that_are_here(make_world: MakeWorld) -> None:
    world = make_world(min_peers=2)
    world.train("a", "b")
    data = bytes(5000)
    world.say("a", blob_offer(1, data))
    world.open("c")
    world.service.tick(world.now_s)
    assert world.messages(Offered) == [], "the upload comes first"
    world.upload("a", data)
    told = Offered(
        round=1,
        holder=peer_id_of(world.key.public_key()),
        digest=digest_of(data),
        n_bytes=5000,
    )
    assert world.messages(Offered, "c") == [told]


def test_nobody_is_told_of_a_payload_with_a_wrong_size(make_world: MakeWorld) -> None:
    world = make_world(min_peers=2)
    world.train("a", "liar")
    data = bytes(5000)
    world.say("liar", blob_offer(1, data).model_copy(update={"n_bytes": 4999}))
    world.upload("liar", data)
    world.open("c")
    world.service.tick(world.now_s)
    assert world.messages(Offered) == []


def payload(round_: int) -> bytes:
    return round_.to_bytes(2, "big") * 3000


def kept(world: World, *rounds: int) -> list[int]:
    return [r for r in rounds if digest_of(payload(r)) in world.blobs]


def trained(world: World, rounds: range, *attested: int, peers: str = "ab") -> None:
    """Rounds in which the first peer's payloads are blobs, and all report the snapshots of some."""
    for round_ in rounds:
        world.round(round_, *peers, payload=payload(round_))
        if round_ in attested:
            world.snapshot(round_, *peers)


def test_payloads_are_kept_back_to_the_second_newest_attested_snapshot(make_world: MakeWorld) -> None:
    world = make_world(rounds=100, snapshot_every=10)
    world.train("a", "b")
    trained(world, range(1, 21), 10, 20)
    assert kept(world, *range(1, 21)) == list(range(1, 21)), "the second one is in no commit yet"
    assert world.open("c").kept_from == 1
    world.service.closed("c", 1, world.now_s)
    world.wait(3.0, "a", "b")
    trained(world, range(21, 30))
    assert kept(world, *range(1, 30)) == list(range(11, 30))
    assert world.open("c").kept_from == 11
    world.say("c", State(state=NodeState.LEAVING))
    trained(world, range(30, 50), 30)  # the one of round 40 is not attested
    assert kept(world, *range(1, 50)) == list(range(21, 50))
    assert len(list(world.blobs._path.iterdir())) == 2 * 29
    status = world.status()["payloads"]
    assert status == {"kept_from": 21, "bytes": 29 * 12001, "quota_bytes": None}
    world.restart()
    assert world.status()["payloads"] == status
    world.train("a", "b")
    trained(world, range(50, 62), 50, 60)
    assert kept(world, *range(1, 62)) == list(range(51, 62))


def test_a_joining_peer_keeps_what_it_needs(make_world: MakeWorld) -> None:
    world = make_world(rounds=100, snapshot_every=10)
    world.train("a", "b")
    trained(world, range(1, 12), 10)
    world.open("j", "k")  # k has not said yet what it needs: what it was told stays true
    world.say("j", State(state=NodeState.JOINING, needs_after=5))
    trained(world, range(12, 22), 20)
    assert kept(world, *range(1, 22)) == list(range(1, 22))
    world.say("k", State(state=NodeState.TRAINING))
    world.say("k", State(state=NodeState.LEAVING))
    trained(world, range(22, 32), 30)
    assert kept(world, *range(1, 32)) == list(range(6, 32))
    world.say("j", State(state=NodeState.JOINING, needs_after=12))
    trained(world, range(32, 42), 40)
    assert kept(world, *range(1, 42)) == list(range(13, 42))
    world.service.closed("j", 1, world.now_s)
    trained(world, range(42, 43))
    assert kept(world, *range(1, 43)) == list(range(13, 43)), "it may be back in a moment"
    world.wait(3.0, "a", "b")
    trained(world, range(43, 44))
    assert kept(world, *range(1, 44)) == list(range(31, 44))


def test_what_no_commit_counted_is_deleted_a_few_rounds_later(make_world: MakeWorld) -> None:
    world = make_world(min_peers=1, rounds=100)
    world.train("a")
    stray, again = world.upload("a", bytes(7000)), world.upload("a", bytes(8000))
    for round_ in range(1, 5):
        world.round(round_, "a")
        assert stray in world.blobs, "its offer may still be sent again"
    world.upload("a", bytes(8000))
    world.round(5, "a")
    assert stray not in world.blobs
    assert again in world.blobs
    before_crash = world.upload("a", bytes(9000))
    world.restart()
    world.train("a")
    world.round(6, "a")
    assert before_crash in world.blobs
    for round_ in range(7, 11):
        world.round(round_, "a")
    assert world.blobs.n_bytes == 0


def test_a_run_that_keeps_all_can_be_replayed_from_round_0(make_world: MakeWorld) -> None:
    world = make_world(rounds=100, snapshot_every=10)
    world.restart(keep=Keep.parse("all"))
    world.train("a", "b")
    trained(world, range(1, 32), 10, 20, 30)
    assert kept(world, *range(1, 32)) == list(range(1, 32))
    assert world.open("c").kept_from == 1


def test_a_quota_keeps_as_much_as_fits_and_is_never_exceeded(make_world: MakeWorld) -> None:
    """12,001 bytes a round: 8 rounds fit. Snapshots allow that much long before."""
    world = make_world(rounds=100, snapshot_every=2)
    world.restart(keep=Keep.parse("100kB"))
    world.train("a", "b")
    for round_ in range(1, 30):
        trained(world, range(round_, round_ + 1), *([round_] if round_ % 2 == 0 else []))
        assert world.blobs.n_bytes <= 100_000
        assert kept(world, *range(1, round_ + 1)) == list(range(max(1, round_ - 7), round_ + 1))
    assert world.open("c").kept_from == 22
    assert world.status()["payloads"]["quota_bytes"] == 100_000


def test_at_the_quota_a_joining_peer_loses_what_it_was_promised_before_a_payload_is_refused(
    make_world: MakeWorld, caplog: pytest.LogCaptureFixture
) -> None:
    world = make_world(rounds=100, snapshot_every=2)
    world.restart(keep=Keep.parse("100kB"))
    world.train("a", "b")
    trained(world, range(1, 7), 2, 4, 6)
    world.open("j")
    world.say("j", State(state=NodeState.JOINING, needs_after=1))
    trained(world, range(7, 9), 8)
    assert kept(world, *range(1, 9)) == list(range(1, 9))
    trained(world, range(9, 13), 10, 12)
    assert kept(world, *range(1, 13)) == list(range(5, 13))
    (first, *_) = (r.getMessage() for r in caplog.records if "promised" in r.getMessage())
    assert first.startswith("j joins and was promised the payloads after round 1; for want of room")


def test_a_payload_that_does_not_fit_is_refused_and_may_be_sent_again(
    make_world: MakeWorld, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a snapshot nothing may go."""
    world = make_world(rounds=100, snapshot_every=50)
    world.restart(keep=Keep.parse("50kB"))
    world.train("a", "b")
    trained(world, range(1, 5))
    for _ in range(20):
        with pytest.raises(BadMessage, match="quota is full: keep = 50,000 bytes, 48,004 are taken"):
            world.service.may_store("a", 6000)
    assert world.status()["rejected"] == {"quota": 20}
    (text,) = (r.getMessage() for r in caplog.records if "a payload is refused" in r.getMessage())
    assert "all payloads are kept until there are two attested snapshots" in text
    assert "a larger [run] keep" in text
    assert kept(world, *range(1, 5)) == [1, 2, 3, 4]
    world.round(5, "a", "b", payload=b"small ones go into the ledger")
    assert world.committed[-1] == 5
    world.restart(keep=Keep.parse("1MB"))
    world.train("a", "b")
    trained(world, range(6, 7))
    assert world.committed[-1] == 6


def test_without_attested_snapshots_a_quota_holds_what_nodes_need_for_their_own(
    make_world: MakeWorld, caplog: pytest.LogCaptureFixture
) -> None:
    """12,001 bytes a round: 9 rounds fit, nodes need 8 for snapshots of their own; 60 rounds are trained."""
    world = make_world(rounds=100, snapshot_every=2)
    world.restart(keep=Keep.parse("109kB"))
    world.train("a", "b")
    for round_ in range(1, 61):
        trained(world, range(round_, round_ + 1))
        assert world.blobs.n_bytes <= 109_000
        assert kept(world, *range(1, round_ + 1)) == list(range(max(1, round_ - 8), round_ + 1))
    assert world.open("c").kept_from == 52
    told = [r.getMessage() for r in caplog.records if "no snapshot of that round or later" in r.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("the quota is full: payloads up to round 1 are gone")
    trained(world, range(61, 63), 62)
    world.restart(keep=Keep.parse("90kB"))
    assert world.open("d").kept_from > 52
    with pytest.raises(BadMessage, match="quota is full"):
        world.service.may_store("d", 60_000)


def test_a_disk_that_is_nearly_full_keeps_what_nodes_need_for_their_own(
    make_world: MakeWorld, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a quota and without attested snapshots, as long as the disk has room everything is kept."""
    world = make_world(rounds=100, snapshot_every=2)
    world.train("a", "b")
    trained(world, range(1, 21))
    assert kept(world, *range(1, 21)) == list(range(1, 21))
    monkeypatch.setattr(retention, "LEAST_FREE_BYTES", 10**18)
    trained(world, range(21, 31))
    assert kept(world, *range(1, 31)) == list(range(23, 31)), "and nothing is refused"
    told = [r.getMessage() for r in caplog.records if "no snapshot of that round or later" in r.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("the disk is nearly full: payloads up to round 1 are gone")
    world.restart(keep=Keep.parse("all"))
    world.train("a", "b")
    trained(world, range(31, 41))
    assert kept(world, *range(23, 41)) == list(range(23, 41))


@pytest.mark.parametrize("keep", ["snapshots", "all", "1MB"])
def test_payloads_do_not_take_what_the_ledger_needs(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch, keep: str
) -> None:
    world = make_world(rounds=100)
    world.restart(keep=Keep.parse(keep))
    world.train("a", "b")
    with monkeypatch.context() as full:
        full.setattr(retention, "LEDGER_BYTES", 10**18)
        with pytest.raises(BadMessage, match="disk is full, but for what its ledger needs"):
            world.service.may_store("a", 6000)
    world.service.may_store("a", 6000)


def test_uploads_that_no_commit_counts_go_before_what_the_run_needs(make_world: MakeWorld) -> None:
    """A member uploads all it may, and offers nothing of it: joiners lose nothing, nobody is refused."""
    world = make_world(rounds=100, snapshot_every=10, max_payload_bytes=25_000)
    world.restart(keep=Keep.parse("400kB"))  # 33 rounds
    world.train("a", "b")
    world.open("c")
    junk = 0
    for round_ in range(1, 41):
        for n in range(4):
            with contextlib.suppress(BadMessage):
                world.upload("c", bytes([round_, n]) * 12_500)
                junk += 1
        assert world.blobs.n_bytes <= 400_000
        trained(world, range(round_, round_ + 1), *([round_] if round_ % 10 == 0 else []))
    assert junk > 120
    assert kept(world, *range(21, 41)) == list(range(21, 41)), "all since the second newest snapshot"
    assert world.status()["rejected"].get("quota", 0) == 160 - junk


def test_room_is_reserved_for_uploads_that_are_under_way(make_world: MakeWorld) -> None:
    world = make_world(rounds=100)
    world.restart(keep=Keep.parse("10kB"))
    world.train("a", "b")
    world.service.may_store("a", 6000)
    writer = world.blobs.writer(digest_of(bytes(6000)), 6000)
    with pytest.raises(BadMessage, match="0 are taken and 6,000 on their way"):
        world.service.may_store("b", 6000)
    writer.abort()
    world.service.may_store("b", 6000)


def test_who_reserves_much_and_sends_little_gives_way(make_world: MakeWorld) -> None:
    world = make_world(rounds=100)
    world.restart(keep=Keep.parse("10kB"))
    world.train("a", "b", "c")
    reserved = []
    for n_bytes in (3000, 3000, 4000):
        world.service.may_store("a", n_bytes)
        reserved.append(world.blobs.writer(digest_of(bytes(n_bytes)), n_bytes, "a"))
        reserved[-1].write(b"1")
    world.service.may_store("b", 4000)
    honest = world.blobs.writer(digest_of(bytes(2)), 4000, "b")
    assert [writer.is_over for writer in reserved] == [False, False, True]
    with pytest.raises(BadMessage, match="needed for others"):
        reserved[-1].write(b"1")
    with pytest.raises(BadMessage, match="are taken and 10,000 on their way"):
        world.service.may_store("c", 6000)  # as much as the other one has
    world.service.may_store("c", 3000)
    assert [writer.is_over for writer in (honest, *reserved[:2])].count(True) == 1
    for writer in (honest, *reserved):
        writer.abort()
    assert world.blobs.reserved_bytes == 0


@pytest.mark.parametrize(
    ("text", "n_bytes"), [("20GB", 20 * 10**9), ("1.5 MB", 1_500_000), ("4KiB", 4096), ("7", 7)]
)
def test_keep_takes_sizes(text: str, n_bytes: int) -> None:
    assert Keep.parse(text) == Keep(is_lazy=True, quota_bytes=n_bytes)


@pytest.mark.parametrize("text", ["", "some", "20 XB", "-1", "0GB", "kB", "1e9", "9" * 40])
def test_what_keep_does_not_take_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match='write "all", "snapshots" or a size'):
        Keep.parse(text)


def test_small_payloads_stay_in_the_ledger_for_ever(make_world: MakeWorld) -> None:
    world = make_world(rounds=100, snapshot_every=1)
    world.train("a", "b")
    for round_ in range(1, 20):
        world.round(round_, "a", "b")
        world.snapshot(round_, "a", "b")
    assert world.status()["snapshot"]["round"] == 18
    assert world.open("c").kept_from == 1


# -------------------------------------------------------------------------------------------- lost commits


class Restored:
    """A world whose ledger is that of three rounds ago, and what it has lost."""

    def __init__(self, world: World) -> None:
        world.train("a", "b")
        for round_ in (1, 2):
            world.round(round_, "a", "b")
        world.restart()
        path = world.path / "ledger.db"
        copy = path.read_bytes()
        world.train("a", "b")
        world.open("c")
        world.say("c", State(state=NodeState.TRAINING))
        world.round(3, "a", "b", "c", payload=payload(3))
        world.say("b", Report(round=3, fingerprint=b"12345678"))
        for round_ in (4, 5):
            world.round(round_, "a", "b", "c", payload=payload(round_))
        self.lost = world.service.commits(2, 10)
        assert len(self.lost) == 3
        self.status = world.status()
        world.ledger.close()
        path.write_bytes(copy)
        (digest_file(world, 4)).unlink()
        world.sent.clear()
        world.committed.clear()
        world.ledger = Ledger.open(path, world.key.public_key())
        world.start()
        self.world = world
        self.hello = world.hello(head_round=5, head_digest=self.lost[-1].digest)


def digest_file(world: World, round_: int) -> Path:
    return world.path / "blobs" / digest_of(payload(round_)).hex()


def test_a_restored_coordinator_takes_its_commits_back(make_world: MakeWorld) -> None:
    restored = Restored(make_world(rounds=100))
    world, service = restored.world, restored.world.service
    world.open("x")  # its index is the one that the lost commits gave to c
    assert world.peer("x")["index"] == 2
    assert restored.hello.is_ahead_of(service.head)
    service.hold()
    service.adopt(restored.lost[:2])
    world.say("x", State(state=NodeState.TRAINING))  # the session is over
    assert restored.hello.is_ahead_of(service.head)
    service.adopt(restored.lost[2:])
    service.go_on(world.now_s)
    assert not restored.hello.is_ahead_of(service.head)
    status = world.status()
    for figure in ("round", "mismatches", "loss", "snapshot", "held_out"):
        assert status[figure] == restored.status[figure]
    assert [p["peer_id"] for p in status["peers"]] == ["a", "b", "c"]
    assert [p["offers_counted"] for p in status["peers"]] == [5, 5, 2]
    assert world.peer("b")["fingerprint"] == b"12345678".hex()
    assert status["payloads"]["kept_from"] == 5, "the payload of round 4 was lost with the newer disk"
    assert not service.is_member("x")
    world.train("a", "b", "c")
    assert world.open("x").peer_index == 3
    world.round(6, "a", "b")
    assert world.committed == []
    world.say("c", offer(6))
    assert world.committed == [6]
    assert [a.peer_id for a in service.commits(5, 1)[0].body.admitted] == ["x"]


def test_peers_of_adopted_commits_are_expected(make_world: MakeWorld) -> None:
    restored = Restored(make_world(rounds=100))
    world, service = restored.world, restored.world.service
    service.hold()
    service.adopt(restored.lost)
    service.go_on(world.now_s)
    world.train("a", "b")
    world.round(6, "a", "b")
    world.wait(9.5, "a", "b")
    assert world.committed == []
    world.wait(0.5, "a", "b")
    assert world.committed == [6]


def test_no_round_closes_while_commits_are_given_back(make_world: MakeWorld) -> None:
    world = make_world(policy="deadline", rounds=100)
    world.train("a", "b")
    for round_ in (1, 2, 3):
        world.round(round_, "a", "b")
    world.service.hold()
    world.say("a", offer(4))
    world.wait(60.0, "a", "b")
    world.say("b", offer(4))
    assert world.committed == [1, 2, 3]
    world.service.go_on(world.now_s)
    world.service.tick(world.now_s)
    assert world.committed == [1, 2, 3, 4]
    world.round(5, "a", "b")
    assert world.committed[-1] == 5, "nothing was adopted: all is as it was"


def test_a_forged_commit_is_a_bad_message(make_world: MakeWorld) -> None:
    restored = Restored(make_world(rounds=100))
    world = restored.world
    forger = Ed25519PrivateKey.generate()
    forged = [c.model_copy(update={"signature": forger.sign(c.record)}) for c in restored.lost]
    world.service.hold()
    with pytest.raises(BadMessage, match="record 3: its signature is not the coordinator's"):
        world.service.adopt(forged)
    world.service.go_on(world.now_s)
    assert world.service.head == 2
    assert world.status()["rejected"] == {"adopt": 1}


def test_a_fork_is_refused(make_world: MakeWorld) -> None:
    restored = Restored(make_world(rounds=100))
    world, service = restored.world, restored.world.service
    world.train("a", "b")
    world.round(3, "a", "b", payload=b"not what it was")
    assert service.head == 3
    service.hold()
    with pytest.raises(LedgerCorrupt, match="round 4 of the node follows another round 3") as caught:
        service.adopt(restored.lost[1:])
    assert "restore a copy from before" in str(caught.value)
    service.go_on(world.now_s)
    with pytest.raises(LedgerCorrupt, match=r"round 3 is not on .* another record has its place.*restore"):
        world.open("c", head_round=3, head_digest=restored.lost[0].digest)
    assert world.status()["rejected"] == {"fork": 1, "head": 1}
    world.round(4, "a", "b")
    assert service.head == 4


# ------------------------------------------------------------------------------------- people and the end


def test_what_is_waited_for_is_told(make_world: MakeWorld) -> None:
    world = make_world(min_peers=3)
    world.train("a")
    world.wait(1.0, "a")
    assert [m.text for m in world.messages(Notice, "a")] == ["waiting for 2 more peers: 1 of 3 are training"]
    assert world.status()["state"] == "waiting"
    world.train("b", "c")
    world.say("a", offer(1))
    world.sent.clear()
    world.wait(5.0, "a", "b", "c")
    texts = [m.text for m in world.messages(Notice, "a")]
    assert texts == ["round 1: waiting for 2 of 3 peers (b, c) for 5.0 s"]


def test_what_lasts_is_told_more_and_more_seldom(make_world: MakeWorld) -> None:
    world = make_world(min_peers=2)
    world.train("a")
    for _ in range(40):
        world.wait(1.0, "a")
    lasting = [m.text for m in world.messages(Notice, "a")]
    assert lasting == [
        "waiting for 1 more peer: 1 of 2 are training",
        "waiting for 1 more peer for 5.0 s: 1 of 2 are training",
        "waiting for 1 more peer for 15 s: 1 of 2 are training",
        "waiting for 1 more peer for 35 s: 1 of 2 are training",
    ]


def test_heartbeats_are_shown(make_world: MakeWorld) -> None:
    world = make_world()
    world.train("a")
    world.wait(1.0, "a")
    peer = world.peer("a")
    assert (peer["sent_bytes"], peer["received_bytes"], peer["payload_bytes"]) == (10, 20, 5)
    world.now_s += 3
    assert world.peer("a")["last_seen_s"] == 3


def test_who_mixes_with_whom_is_shown(make_world: MakeWorld) -> None:
    """What the end that knows of more says of an edge; the last round merges, whoever has told it yet."""
    world = make_world(rounds=2, min_peers=3)
    world.train("a", "b", "c")
    world.round(1, "a", "b", "c")
    assert world.status()["gossip"] is None
    plain = {"round": 1, "merged": 0, "distance": None, "own_held_out": None, "edges": ()}
    told = {
        "a": {"distance": 1.0, "edges": edges((1, 10, 20, 0), (2, 5, 0, 5))},
        "b": {"distance": 3.0, "edges": edges((0, 20, 12, 0)), "own_held_out": 2.5},
        "c": {"carried": 7},
    }
    for name, said in told.items():
        gossip = Gossiping.model_validate({**plain, **said})
        world.say(name, Heartbeat(round=1, sent_bytes=1, received_bytes=1, payload_bytes=1, gossip=gossip))
    expected = {"merged": 0, "distance": 2.0, "own_held_out": [2.5], "edges": [[0, 1, 32, 0], [0, 2, 5, 5]]}
    assert world.status()["gossip"] == expected
    assert world.service.overview(world.now_s)["gossip"] == expected
    assert world.peer("c")["gossip"]["carried"] == 7
    world.round(2, "a", "b", "c")
    assert world.status()["gossip"] == {**expected, "merged": 2}


def edges(*told: tuple[int, int, int, int]) -> tuple[EdgeEntry, ...]:
    return tuple(EdgeEntry(peer=p, sent=s, received=r, relayed=by) for p, s, r, by in told)


def test_a_restarted_peer_goes_on_counting(make_world: MakeWorld) -> None:
    world = make_world()
    world.train("a")
    for sent in (10, 100, 30, 50):  # the third one comes from a new process
        world.say("a", Heartbeat(round=0, sent_bytes=sent, received_bytes=2 * sent, payload_bytes=sent // 10))
    peer = world.peer("a")
    assert (peer["sent_bytes"], peer["received_bytes"], peer["payload_bytes"]) == (150, 300, 15)


def test_sent_and_counted_go_on_together_after_a_restart(make_world: MakeWorld) -> None:
    """With what the coordinator has kept, whoever else was restarted meanwhile."""
    world = make_world(min_peers=2, rounds=10)
    world.train("a", "b")

    def beat(name: str, sent: int) -> None:
        world.say(
            name, Heartbeat(round=0, sent_bytes=sent, received_bytes=2 * sent, payload_bytes=sent // 10)
        )

    for name in "ab":
        world.say(name, offer(1))
        beat(name, 100)
    before = {name: world.peer(name) for name in "ab"}
    assert world.status()["sent_bytes_per_peer_round"] == 100
    world.restart(history=world.service.history())
    assert world.status()["sent_bytes_per_peer_round"] == 100
    for name in "ab":
        for figure in ("sent_bytes", "received_bytes", "payload_bytes", "offers_counted", "offers_missed"):
            assert world.peer(name)[figure] == before[name][figure], figure
    world.train("a", "b")
    beat("a", 150)  # the same process
    beat("b", 30)  # a new one
    assert [world.peer(name)["sent_bytes"] for name in "ab"] == [150, 130]
    for name in "ab":
        world.say(name, offer(2))
    assert world.status()["sent_bytes_per_peer_round"] == 280 / 4


def test_kept_traffic_that_is_no_traffic_costs_its_figures_only(
    make_world: MakeWorld, caplog: pytest.LogCaptureFixture
) -> None:
    world = make_world()
    world.train("a", "b")
    for peer in "ab":
        world.say(peer, offer(1))
    world.wait(1.0, "a")
    history = json.loads(world.service.history())
    (good,) = history["traffic"]
    for bad in ([], ["x"], [1] * 20, [-1] * 9, [2**70] * 9, "text", 7, None):
        caplog.clear()
        world.restart(history=json.dumps({**history, "traffic": [bad, good]}).encode())
        assert world.peer("a")["sent_bytes"] == 10, bad
        assert "a peer's traffic before the restart cannot be read" in caplog.text
    del history["traffic"]  # written by an older coordinator
    world.restart(history=json.dumps(history).encode())
    assert world.peer("a")["sent_bytes"] == 0


def test_the_end_waits_for_acknowledgements(make_world: MakeWorld) -> None:
    world = make_world(rounds=1)
    world.train("a", "b", "c")
    for peer in "abc":
        world.say(peer, offer(1))
    evaluator = world.service.commits(0, 1)[0].body.evaluator
    assert evaluator == 0
    assert world.status()["state"] == "finished"
    world.say("b", Report(round=1, fingerprint=b"12345678"))
    world.say("c", State(state=NodeState.LEAVING))
    world.say("a", Report(round=1, fingerprint=b"12345678"))
    assert not world.service.finished, "its evaluator still measures"
    world.say("a", Report(round=1, held_out=2.0))
    assert world.service.finished
    assert world.status()["held_out"] == [[1, 2.0]]


def test_a_run_that_evaluates_nothing_names_no_evaluator(make_world: MakeWorld) -> None:
    """A task may hold nothing out: then nobody is asked for a loss, nor waited for in the end."""
    world = make_world(rounds=1, min_peers=1, eval_every=0)
    world.train("a")
    world.say("a", offer(1))
    assert world.service.commits(0, 1)[0].body.evaluator is None
    world.say("a", Report(round=1, fingerprint=b"12345678"))
    assert world.service.finished


def test_the_end_does_not_wait_for_ever(make_world: MakeWorld) -> None:
    world = make_world(rounds=1, min_peers=1)
    world.train("a")
    world.say("a", offer(1))
    world.wait(59.5, "a")
    assert not world.service.finished
    world.wait(0.5, "a")
    assert world.service.finished


def test_a_finished_run_ends_at_once_when_its_peers_do_not_come_back(make_world: MakeWorld) -> None:
    world = make_world(rounds=1, min_peers=1)
    world.train("a")
    world.say("a", offer(1))
    world.restart()
    world.service.tick(world.now_s)
    assert not world.service.finished
    world.wait(10.0)
    assert world.service.finished


def test_a_service_whose_reign_is_over_hears_nothing_and_writes_nothing(make_world: MakeWorld) -> None:
    world = make_world()
    world.train("a", "b")
    world.say("a", offer(1))
    head, said = world.ledger.head_round, len(world.sent)
    world.service.drop()
    world.say("b", offer(1, b"of b"))
    world.say("b", State(state=NodeState.LEAVING))
    world.service.closed("a", world.sessions["a"], world.now_s)
    world.service.excuse("b", 1, world.now_s)
    world.service.go_on(world.now_s)
    world.wait(1000)
    assert (world.ledger.head_round, len(world.sent)) == (head, said)
    assert not world.service.is_member("a")
    with pytest.raises(SwarmUnreachable, match="does not lead any more"):
        world.open("c")
    with pytest.raises(SwarmUnreachable, match="does not lead any more"):
        world.service.blob_arrived("a", digest_of(b"late"), world.now_s)
    with pytest.raises(SwarmUnreachable, match="does not lead any more"):
        world.service.adopt([])


def test_the_critical_batch_is_what_evaluators_find_in_payloads(make_world: MakeWorld) -> None:
    """4 samples in each of two offers."""
    world = make_world(eval_every=1, rounds=40)
    world.train("a", "b")
    told = []
    for round_ in range(1, 8):
        world.round(round_, "a", "b")
        evaluator = world.service.commits(round_ - 1, 1)[0].body.evaluator
        for index, peer in enumerate("ab"):
            found = NoiseEntry(
                signal=0.25 if index == evaluator else 1.0, noise=3.0, n_samples=4.0, of="momentum"
            )
            world.say(peer, Report(round=round_, held_out=2.0 if index == evaluator else None, noise=found))
        told.append(
            (world.status()["noise_scale"]["samples"], world.service.overview(world.now_s)["critical_batch"])
        )
    assert told[0] == (None, "critical batch: not known, after 1 look at what payloads share")
    assert [samples for samples, _ in told] == [None, None, *[12.0] * 5]
    text = "critical batch: beyond about 12 samples a round (3 peers) more peers help little; a round has 8"
    assert told[-1][1] == f"{text} (by the noise of momentum)"
    world.round(8, "a", "b")
    evaluator = world.service.commits(7, 1)[0].body.evaluator
    assert evaluator is not None
    hidden = NoiseEntry(signal=-1.0, noise=8.0, n_samples=4.0, of="momentum")
    for _ in range(2):
        world.say("ab"[evaluator], Report(round=8, noise=hidden))
    scale = world.status()["noise_scale"]
    assert (scale["rounds"], scale["samples"]) == (8, pytest.approx((7 * 3 + 8) / (7 * 0.25 - 1)))
