"""What a seat knows of the ledger while another one leads is what reading the ledger gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.support.service_world import MakeWorld, World, blob_offer
from thinwire.compression.errors import ConfigError
from thinwire.coordinator.blobs import BlobStore
from thinwire.coordinator.control.orders import Order
from thinwire.coordinator.ledger import Ledger
from thinwire.coordinator.protocol.messages import BlobRef, Change, GenesisBody, Report, digest_of
from thinwire.coordinator.protocol.settings import Keep
from thinwire.coordinator.quorum.recollection import Recollection

BLOB = bytes(5000)


def followed(world: World, blobs: BlobStore, **options: Any) -> Recollection:
    """Fed with what the world commits from now on."""
    recollection = Recollection(world.ledger, blobs, **options)
    commit = world.service._on_commit

    def told(round_: int) -> None:
        commit(round_)
        recollection.feed(world.ledger.commits(round_ - 1, 1)[0])

    world.service._on_commit = told
    return recollection


def taken(world: World, recollection: Recollection) -> dict[str, Any]:
    """The status of a service that begins with it."""
    world.start(recollection=recollection)
    return world.status()


def test_it_is_what_reading_the_ledger_gives(make_world: MakeWorld, tmp_path: Path) -> None:
    world = make_world(verify_every=1, snapshot_every=2, eval_every=2)
    recollection = followed(world, BlobStore(tmp_path / "follower"))
    world.train("a", "b")
    for round_ in range(1, 9):
        world.round(round_, "a", "b")
        for peer in "ab":
            world.say(peer, Report(round=round_, fingerprint=bytes([round_]) * 8))
        world.snapshot(round_, "a", "b")
        if round_ == 4:
            change = Change(key="schedule.warmup_rounds", value=3)
            world.service.order(Order(what="set", changes=(change,)), world.now_s)
    world.say("a", Report(round=2, held_out=0.5))
    assert recollection.head == 8
    again = Recollection(world.ledger, BlobStore(tmp_path / "reader"))
    assert taken(world, recollection) == taken(world, again)
    assert world.service.course.settings.schedule.warmup_rounds == 3
    assert world.service.is_member("a") is False


def test_payloads_of_followers_are_kept_and_let_go_as_the_leader_s(
    make_world: MakeWorld, tmp_path: Path
) -> None:
    world = make_world(snapshot_every=2, rounds=100)
    blobs = BlobStore(tmp_path / "follower")
    recollection = followed(world, blobs)
    world.train("a", "b")
    for round_ in range(1, 13):
        payloads = [bytes([round_]) + BLOB, bytes([round_]) + BLOB + b"b"]
        if round_ != 9:  # it comes too late for the vote of another seat
            for payload in payloads:
                blobs.put(digest_of(payload), payload)
                recollection.payload_arrived(digest_of(payload))
        world.round(round_, "a", "b", payload=payloads[0])
        world.snapshot(round_, "a", "b")
    late = bytes([9]) + BLOB
    assert list(recollection.missing_payloads().values()) == [9, 9]
    assert recollection.derived.retention.kept_from == 10
    for payload in (late, late + b"b"):
        assert digest_of(payload) in recollection.missing_payloads()
        blobs.put(digest_of(payload), payload)
        recollection.payload_arrived(digest_of(payload))
    assert recollection.missing_payloads() == {}
    assert recollection.derived.retention.kept_from == world.service._parts.derived.retention.kept_from == 9
    assert blobs.n_bytes == world.blobs.n_bytes
    world.round(13, "a", "b")
    world.snapshot(12, "a", "b", manifest=b"n" * 32)
    world.round(14, "a", "b")
    assert blobs.n_bytes == world.blobs.n_bytes > 0
    assert blobs.oldest_counted() == world.blobs.oldest_counted()


def test_a_follower_keeps_to_its_quota(make_world: MakeWorld, tmp_path: Path) -> None:
    recollection = followed(make_world(), BlobStore(tmp_path / "follower"), keep=Keep.parse("8kB"))
    assert recollection.has_room(8000)
    assert not recollection.has_room(8001)


def test_what_no_record_has_is_forgotten_with_the_reign(make_world: MakeWorld) -> None:
    """A report that the lost record took with it is heard again."""
    world = make_world(verify_every=1)
    recollection = Recollection(world.ledger, world.blobs)
    world.start(recollection=recollection)
    world.train("a", "b")
    world.round(1, "a", "b")
    report = Report(round=1, fingerprint=b"f" * 8)
    world.say("a", report)
    recollection.derived.reports.take()  # into a record that nobody has sealed
    recollection.reign_ended(world.service.memory())
    world.start(recollection=recollection)
    world.open("a", "b")
    world.train("a", "b")
    world.say("a", report)
    world.round(2, "a", "b")
    assert [r.fingerprint for r in world.ledger.commits(1, 1)[0].body.reports] == [b"f" * 8]
    world.say("a", report)
    world.round(3, "a", "b")
    assert world.ledger.commits(2, 1)[0].body.reports == ()


def test_a_seat_without_the_run_s_blobs_follows_and_cannot_lead(
    tmp_path: Path, make_genesis: Callable[..., GenesisBody], key: Ed25519PrivateKey
) -> None:
    base = BlobRef(digest=digest_of(b"weights"), n_bytes=7)
    genesis = make_genesis().model_copy(update={"base": base})
    ledger, blobs = Ledger.create(tmp_path / "ledger.db", genesis, key), BlobStore(tmp_path / "blobs")
    recollection = Recollection(ledger, blobs)
    with pytest.raises(ConfigError, match="is missing"):
        recollection.derived.open_round()
    blobs.put(base.digest, b"weights")
    recollection.derived.open_round()
    assert blobs.pinned_bytes == 7
    ledger.close()


def test_offers_count_once_enough_seats_hold_them(make_world: MakeWorld) -> None:
    held: set[bytes] = set()
    world = make_world()
    world.start(held=held.__contains__)
    world.train("a", "b")
    world.round(1, "a", "b")  # inside of the record: whoever votes has them
    assert world.service.head == 1
    world.round(2, "a", "b", payload=BLOB)
    assert world.service.head == 1
    for digest in (digest_of(BLOB), digest_of(BLOB + b"b")):
        assert world.service.head == 1
        held.add(digest)
        world.service.held_arrived(digest, world.now_s)
    assert world.service.head == 2
    world.say("a", blob_offer(3, BLOB))
    world.service.held_arrived(digest_of(b"unknown"), world.now_s)
    world.say("b", blob_offer(3, BLOB + b"b"))
    assert world.service.head == 3
