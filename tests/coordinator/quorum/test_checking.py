"""What a seat votes for: the records that a service proposes, and nothing that breaks a rule of the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.support.committee import SEATS, entry
from tests.support.service_world import MakeWorld, World, blob_offer, offer
from tests.support.slow_log import SlowLog
from thinwire.coordinator.blobs import BlobStore
from thinwire.coordinator.protocol.identity import peer_id_of
from thinwire.coordinator.protocol.messages import (
    AccessEntry,
    Admission,
    AuditEntry,
    BadMessage,
    Change,
    CommitBody,
    CommitteeEntry,
    Offer,
    OfferEntry,
    Report,
    ReportEntry,
    Reseated,
    SeatEntry,
    SnapshotEntry,
    Verdict,
    digest_of,
    encode_record,
)
from thinwire.coordinator.protocol.schedule import float32_bits
from thinwire.coordinator.protocol.trust.signed_offers import signed
from thinwire.coordinator.quorum.checking import MAX_AHEAD_MS, Reason, RecordChecks
from thinwire.coordinator.quorum.recollection import Recollection

BLOB = bytes(5000)
KEYS = {
    peer_id_of(key.public_key()): key
    for key in (Ed25519PrivateKey.from_private_bytes(bytes([50 + i] * 32)) for i in range(3))
}
ANN, BOB, CYD = KEYS


class Voting:
    """A leader's service after two rounds, whose third record waits, and another seat that is asked for its
    vote."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.log = world, SlowLog(world)
        world.start(log=self.log)
        self.blobs = BlobStore(folder / "follower")
        recollection = Recollection(world.ledger, self.blobs)
        self.wall_ms = 0
        """Of the seat that votes: its clock is behind the leader's."""
        self.checks = RecordChecks(world.ledger, self.blobs, recollection, lambda: self.wall_ms)
        world.train(ANN, BOB)
        for round_ in (1, 2):
            self.offer(round_)
            assert self.asked() is True
            self.log.seal(world.now_s)
            recollection.catch_up()
        for peer in (ANN, BOB):
            world.say(peer, Report(round=2, fingerprint=b"f" * 8, snapshot=bytes(32), snapshot_bytes=9))
        world.train(CYD)
        self.offer(3)

    def offer(self, round_: int) -> None:
        for peer in (ANN, BOB):
            self._say(peer, offer(round_, peer.encode()) if peer == ANN else blob_offer(round_, BLOB))
        self.world.upload(BOB, BLOB)
        if digest_of(BLOB) not in self.blobs:
            self.blobs.put(digest_of(BLOB), BLOB)

    def _say(self, peer: str, said: Offer) -> None:
        self.world.say(peer, signed(said, self.world.ledger.run_id, KEYS[peer]))

    @property
    def body(self) -> CommitBody:
        return self.log.proposed[0][0]

    def asked(self, work: bytes | None = None, **changes: Any) -> bool | Reason:
        """For a vote for the open record with these changes: the vote, or why there is none."""
        self.checks._told.clear()
        before = self.checks.refused.copy()
        record = encode_record(self.body.model_copy(update=changes))
        if self.checks.may_vote(record, self.log.proposed[0][1] if work is None else work):
            return True
        (reason,) = self.checks.refused - before
        return reason

    def offers(self, **changes: Any) -> tuple[OfferEntry, ...]:
        """The first one changed."""
        first, *others = self.body.offers
        return (first.model_copy(update=changes), *others)


@pytest.fixture
def voting(make_world: MakeWorld, tmp_path: Path) -> Voting:
    return Voting(make_world(snapshot_every=2, verify_every=1, eval_every=3), tmp_path)


def test_what_a_service_proposes_gets_the_vote(voting: Voting) -> None:
    body = voting.body
    assert voting.asked() is True
    assert (len(body.offers), len(body.reports), len(body.snapshots)) == (2, 2, 2)
    assert [a.peer_id for a in body.admitted] == [CYD]
    assert body.evaluator is not None
    assert voting.asked(evaluator=None) is True, "who evaluates is not known here"
    assert voting.asked(access=access(banned=(CYD,))) is True
    assert voting.asked(committee=named(voting, 1, 2)) is True
    assert voting.asked(time_ms=MAX_AHEAD_MS) is True
    assert not voting.checks.refused


def test_a_factor_goes_by_the_samples_that_are_counted(voting: Voting) -> None:
    """Of this record, too: 8 in each of three rounds."""
    change = Change(key="schedule.batch_samples", value=32)
    warm_up = Change(key="schedule.warmup_rounds", value=0)
    constant = Change(key="schedule.name", value="constant")
    says = {"changes": (change, constant, warm_up)}
    assert voting.asked(lr_factor_bits=float32_bits(0.5), **says) is True
    assert voting.asked(lr_factor_bits=float32_bits(1.0), **says) == "lr_factor"


def named(voting: Voting, *places: int) -> CommitteeEntry:
    """The founder, and these."""
    founder = SeatEntry(peer_id=voting.world.ledger.genesis.coordinator, addresses=())
    seats = (founder, *entry(places).seats)
    return CommitteeEntry(seats=seats, need=len(seats) // 2 + 1)


def access(**fields: Any) -> AccessEntry:
    return AccessEntry(**{"token": bytes(32), "mode": "open", "banned": (), "listed": (), **fields})


def audit(_: Voting) -> dict[str, Any]:
    found = AuditEntry(round=2, target=0, auditor=1, verdict=Verdict.FAILED, signature=bytes(64))
    return {"audits": (found,)}


def other_size(v: Voting) -> dict[str, Any]:
    return {"offers": (v.body.offers[0], v.body.offers[1].model_copy(update={"n_bytes": 5001}))}


CASES: dict[str, tuple[Reason, Callable[[Voting], dict[str, Any]]]] = {
    "of another round": ("parent", lambda v: {"round": 4}),
    "of another chain": ("parent", lambda v: {"parent": bytes(32)}),
    "a factor that the schedule does not give": ("lr_factor", lambda v: {"lr_factor_bits": 1}),
    "before the last one": ("time", lambda v: {"time_ms": 122}),
    "a time to come": ("clock", lambda v: {"time_ms": v.wall_ms + MAX_AHEAD_MS + 1}),
    "a change of what cannot change": (
        "changes",
        lambda v: {"changes": (Change(key="run.name", value="x"),)},
    ),
    "an end before now": ("changes", lambda v: {"changes": (Change(key="run.rounds", value=2),)}),
    "a gap among admissions": ("admissions", lambda v: {"admitted": (Admission(index=3, peer_id="x"),)}),
    "an old peer admitted": ("admissions", lambda v: {"admitted": (Admission(index=2, peer_id=BOB),)}),
    "an offer twice": ("offers", lambda v: {"offers": v.body.offers[:1] * 2}),
    "offers out of order": ("offers", lambda v: {"offers": v.body.offers[::-1]}),
    "an offer of nobody": (
        "offers",
        lambda v: {"offers": (v.body.offers[1].model_copy(update={"peer": 9}),)},
    ),
    "too many samples": ("limits", lambda v: {"offers": v.offers(n_samples=2**20)}),
    "another inline size": ("limits", lambda v: {"offers": v.offers(n_bytes=3)}),
    "samples that are not signed": ("work", lambda v: {"offers": v.offers(n_samples=5)}),
    "no samples, and a loss": ("limits", lambda v: {"offers": v.offers(n_samples=0)}),
    "an evaluator that nobody is": ("evaluator", lambda v: {"evaluator": 7}),
    "a report on what is to come": (
        "reports",
        lambda v: {"reports": (ReportEntry(peer=0, round=3, fingerprint=bytes(8), checked=False),)},
    ),
    "a snapshot between": (
        "reports",
        lambda v: {"snapshots": (SnapshotEntry(peer=0, round=1, manifest=bytes(32), n_bytes=1),)},
    ),
    "an audit that nobody has drawn": ("audits", audit),
    "another blob of signatures": ("work", lambda v: {"work": bytes(32)}),
    "a payload of another size": ("work", other_size),
    "a wholly new committee": ("committee", lambda v: {"committee": entry([1, 2, 3])}),
    "a committee by the recovery key": (
        "committee",
        lambda v: {"committee": entry([1], recovered_with=b"r" * 32)},
    ),
    "a seat without a key": (
        "committee",
        lambda v: {"committee": CommitteeEntry(seats=(SeatEntry(peer_id="x", addresses=()),), need=1)},
    ),
    "a seat that need not rest in the same epoch": (
        "reseat",
        lambda v: {"reseat": (Reseated(seat=v.world.ledger.genesis.coordinator, nonce=bytes(16)),)},
    ),
    "a stranger that need not rest": (
        "reseat",
        lambda v: {"reseat": (Reseated(seat=SEATS[5], nonce=bytes(16)),), "committee": named(v, 1, 2)},
    ),
    "bans out of order": ("access", lambda v: {"access": access(banned=(max(ANN, BOB), min(ANN, BOB)))}),
    "a ban of nobody": ("access", lambda v: {"access": access(banned=("nobody",))}),
}


def test_what_breaks_a_rule_gets_no_vote(voting: Voting) -> None:
    found = {case: voting.asked(**changes(voting)) for case, (_, changes) in CASES.items()}
    assert found == {case: reason for case, (reason, _) in CASES.items()}
    assert voting.asked() is True, "bad records do not spoil the next"


def test_time_may_stand_still_where_the_last_record_was_ahead(voting: Voting) -> None:
    voting.wall_ms = -2 * MAX_AHEAD_MS
    assert voting.asked() is True, "the run's clock is ahead of this one, and does not run back"
    assert voting.asked(time_ms=124) == "clock"


def test_a_vote_waits_for_the_payloads(voting: Voting, caplog: pytest.LogCaptureFixture) -> None:
    voting.blobs.release(counted_to=0, offered_to=0)
    empty = BlobStore(voting.world.path / "empty")
    voting.checks._blobs = empty
    with caplog.at_level("INFO", logger="thinwire.coordinator"):
        assert voting.asked() == "payload"
        record = encode_record(voting.body)
        assert caplog.text == "", "it is on its way"
        for _ in range(3):  # its leader asks again, a second and more later
            assert not voting.checks.may_vote(record, voting.log.proposed[0][1])
    assert caplog.text.count("no vote for a record of round 3 (payload)") == 1
    assert voting.checks.refused == {"payload": 1}
    empty.put(digest_of(BLOB), BLOB)
    assert voting.asked() is True


def test_the_leader_alone_may_keep_the_payloads(voting: Voting) -> None:
    world = voting.world
    empty = BlobStore(world.path / "empty")
    recollection = Recollection(world.ledger, empty)
    checks = RecordChecks(world.ledger, empty, recollection, lambda: 123, needs_payloads=False)
    assert checks.may_vote(encode_record(voting.body), voting.log.proposed[0][1])


def test_signatures_are_checked_beforehand_or_at_the_vote(voting: Voting) -> None:
    body, work = voting.log.proposed[0]
    record = encode_record(body)
    forged = work[:64] + bytes([work[64] ^ 1]) + work[65:]
    named = body.model_copy(update={"work": digest_of(forged)})
    assert voting.asked(work=forged) == "work"
    assert voting.asked(work=b"") == "work"
    assert not voting.checks.may_vote(encode_record(named), forged)
    voting.checks.verify(record, work)
    voting.checks.verify(b"no record", work)
    assert voting.asked() is True
    assert not voting.checks.is_slow(work)
    assert voting.checks.is_slow(work * 16)


def test_nobody_votes_for_what_is_no_record(voting: Voting) -> None:
    assert not voting.checks.may_vote(b"nothing", b"")
    with pytest.raises(BadMessage):
        voting.checks.place(b"nothing")
    assert voting.checks.place(encode_record(voting.body)) == (3, voting.body.parent, False)


def test_a_seat_that_has_not_looked_at_the_head_does_not_vote(voting: Voting) -> None:
    record, work = encode_record(voting.body), voting.log.proposed[0][1]
    voting.log.seal(voting.world.now_s)
    assert not voting.checks.may_vote(record, work)
    voting.checks._recollection.catch_up()
    assert not voting.checks.may_vote(record, work)
    assert voting.checks.refused == {"behind": 1, "parent": 1}


def test_condemned_peers_and_paused_runs_have_no_offers(voting: Voting) -> None:
    derived = voting.checks._recollection.derived
    derived.standing._terms[0] = 9
    assert voting.asked() == "condemned"
    assert voting.asked(offers=voting.body.offers[1:], evaluator=0) == "evaluator"
    derived.standing._terms.clear()
    assert voting.asked() is True
    derived.course = derived.course.after((Change(key="run.paused", value=True),))
    assert voting.asked() == "offers"
