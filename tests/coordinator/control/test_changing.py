"""A run is changed while it trains, pauses, or is over: on a clock of the test, without a socket."""

from __future__ import annotations

import pytest

from tests.support.records import commit_body
from tests.support.service_world import MakeWorld, World, blob_offer
from thinwire.compression.errors import ConfigError
from thinwire.coordinator.control.orders import Order, Ordered
from thinwire.coordinator.protocol.figures import short
from thinwire.coordinator.protocol.identity import peer_id_of
from thinwire.coordinator.protocol.messages import (
    AccessEntry,
    Change,
    CommitBody,
    CommitteeEntry,
    Notice,
    Report,
    SeatEntry,
)
from thinwire.coordinator.protocol.schedule import float32_of_bits, lr_factor_bits
from thinwire.coordinator.serving.offerless import Last, offerless


def ordered(world: World, what: str, rounds: int = 0, **settings: object) -> Ordered:
    changes = tuple(Change(key=key.replace("__", "."), value=value) for key, value in settings.items())  # type: ignore[arg-type]
    found = world.service.order(
        Order.model_validate({"what": what, "rounds": rounds, "changes": changes}), world.now_s
    )
    world.service.tick(world.now_s)
    return found


def body(world: World, round_: int) -> CommitBody:
    return world.service.commits(round_ - 1, 1)[0].body


def test_a_change_comes_with_the_record_that_closes_the_open_round(make_world: MakeWorld) -> None:
    world = make_world()
    world.train("a", "b")
    world.round(1, "a", "b")
    found = ordered(world, "set", schedule__name="constant", schedule__warmup_rounds=0)
    assert (found.round, world.service.head) == (2, 1)
    world.round(2, "a", "b")
    changed = body(world, 2)
    assert len(changed.offers) == 2
    assert [c.key for c in changed.changes] == ["schedule.name", "schedule.warmup_rounds"]
    settings = world.service.course.settings
    assert settings.schedule.name == "constant"
    assert changed.lr_factor_bits == lr_factor_bits(world.service.course, 3)
    world.round(3, "a", "b")
    assert body(world, 3).changes == ()
    world.restart()
    assert world.service.course.settings == settings


def test_the_learning_rate_follows_the_samples_of_peers_that_come_and_go(make_world: MakeWorld) -> None:
    world = make_world(rounds=40)
    world.train("a", "b")
    world.round(1, "a", "b")
    ordered(world, "set", schedule__name="batch", schedule__batch_samples=16, schedule__warmup_rounds=0)

    def factors(*rounds: int) -> list[float]:
        """Of the round after each."""
        return [float32_of_bits(body(world, r).lr_factor_bits) ** 2 for r in rounds]

    for round_ in range(2, 10):
        world.round(round_, "a", "b")  # 4 samples each
    assert factors(2, 9) == pytest.approx([0.5, 0.5])
    world.train("c", "d")
    world.round(10, "a", "b")  # which is open already
    for round_ in range(11, 14):
        world.round(round_, "a", "b", "c", "d")
    assert factors(11, 12, 13) == pytest.approx([9 / 16, 10 / 16, 11 / 16]), "a mean of eight rounds"
    after_restart = factors(13)
    world.restart()
    said = (Change(key="schedule.batch_samples", value=16),)
    alone = offerless(world.ledger, Last.of(world.ledger), changes=said)
    assert [float32_of_bits(alone.lr_factor_bits) ** 2] == after_restart
    world.sessions.clear()
    world.train("a", "b", "c", "d")
    for round_ in range(14, 22):
        world.round(round_, "a", "b", "c", "d")
    assert factors(14, 18, 21) == pytest.approx([12 / 16, 1, 1])


def test_records_of_committees_and_entry_are_told_and_train_nothing(make_world: MakeWorld) -> None:
    world = make_world(rounds=4)
    world.train("a", "b")
    world.round(1, "a", "b")
    seat = SeatEntry(peer_id=peer_id_of(world.key.public_key()), addresses=())
    access = AccessEntry(token=bytes(32), mode="listed", banned=(), listed=("a", "b"))
    says = {"committee": CommitteeEntry(seats=(seat,), need=1), "access": access}
    world.ledger.append(commit_body(2, parent=world.ledger.head_digest, offers=(), **says), world.key)
    before = world.status()
    world.restart()
    name = short(seat.peer_id)
    assert world.status()["changes"] == [
        f"round 2: the committee is now {name} (signed by {name})",
        f"round 2: entry is listed (2 peers) (signed by {name})",
    ]
    happenings = world.service.overview(world.now_s)["happenings"]
    assert [h["text"] for h in happenings if h["kind"] == "changed"] == world.status()["changes"][::-1]
    same = ("loss", "payload_bytes", "payload_bytes_per_peer_round")
    assert [world.status()[key] for key in same] == [before[key] for key in same]
    assert (world.status()["round"], world.service.course.n_rounds) == (2, 4), "a round, as changes are"
    world.sessions.clear()
    world.train("a", "b")
    world.round(3, "a", "b")
    world.round(4, "a", "b")
    assert world.status()["state"] == "finished"


def test_a_paused_run_opens_no_round_until_it_is_resumed(make_world: MakeWorld) -> None:
    world = make_world()
    world.train("a", "b")
    world.round(1, "a", "b")
    ordered(world, "pause")
    world.round(2, "a", "b")
    assert (world.status()["state"], world.service.head) == ("paused", 2)
    world.round(3, "a", "b")
    world.wait(30, "a", "b")
    assert world.service.head == 2
    assert any("the run is paused after round 2" in notice.text for notice in world.messages(Notice, "a"))
    with pytest.raises(ConfigError, match="paused already"):
        ordered(world, "pause")
    world.restart()
    assert world.status()["state"] == "paused"
    world.train("a", "b")
    found = ordered(world, "resume")
    assert (found.round, body(world, 3).offers, world.status()["state"]) == (3, (), "training")
    world.round(4, "a", "b")
    assert world.service.head == 4
    with pytest.raises(ConfigError, match="not paused"):
        ordered(world, "resume")


@pytest.mark.parametrize("offers", [False, True])
def test_a_change_does_not_wait_for_nodes_that_are_gone(make_world: MakeWorld, offers: bool) -> None:
    """Not even where one has offered a payload whose bytes never came."""
    world = make_world()
    world.train("a", "b")
    world.round(1, "a", "b")
    if offers:
        world.say("a", blob_offer(2, bytes(5000)))
    found = ordered(world, "pause")
    assert (found.round, world.service.head) == (2, 1)
    for peer in ("a", "b"):
        world.service.closed(peer, world.sessions[peer], world.now_s)
    world.wait(1)
    assert world.service.head == 1, "they may come back"
    world.wait(60)
    assert world.service.head == 2
    assert (body(world, 2).offers, body(world, 2).changes) == ((), found.changes)
    assert world.status()["state"] == "paused"
    world.wait(60)
    assert world.service.head == 2


def test_stop_ends_the_run_with_the_open_round(make_world: MakeWorld) -> None:
    world = make_world()
    world.train("a", "b")
    world.round(1, "a", "b")
    ordered(world, "stop")
    world.round(2, "a", "b")
    status = world.status()
    assert (status["state"], status["rounds"], status["round"]) == ("finished", 2, 2)
    assert body(world, 2).evaluator is not None
    for peer in ("a", "b"):
        world.say(peer, Report(round=2, fingerprint=b"f" * 8, held_out=1.0))
    assert world.service.finished
    assert "fingerprint" not in status["rejected"]
    for what in ("stop", "pause", "resume"):
        with pytest.raises(ConfigError, match="over after round 2"):
            ordered(world, what)


def test_a_finished_run_is_extended_and_goes_on(make_world: MakeWorld) -> None:
    world = make_world(rounds=2)
    world.train("a", "b")
    world.round(1, "a", "b")
    world.round(2, "a", "b")
    for peer in ("a", "b"):
        world.say(peer, Report(round=2, fingerprint=b"f" * 8, held_out=1.0))
    assert world.service.finished
    with pytest.raises(ConfigError, match="extend --rounds N --set"):
        ordered(world, "set", schedule__final_factor=0.5)
    found = ordered(world, "extend", 3, schedule__final_factor=0.5)
    assert found.told == ("run.rounds 2 -> 6", "schedule.final_factor 0.1 -> 0.5")
    assert not world.service.finished
    assert world.status()["state"] == "training"
    for round_ in (4, 5, 6):
        world.round(round_, "a", "b")
    assert world.status()["state"] == "finished"
    assert not world.service.finished
    assert world.status()["changes"] == [f"round 3: {text}" for text in found.told]
    happenings = world.service.overview(world.now_s)["happenings"]
    assert [h["text"] for h in happenings if h["kind"] == "changed"] == world.status()["changes"][::-1]
    history = world.service.history()
    world.restart(history=history)
    assert len(world.status()["changes"]) == 2


def test_before_the_first_round_the_run_still_waits_for_its_peers(make_world: MakeWorld) -> None:
    world = make_world()
    ordered(world, "set", schedule__name="constant")
    assert (world.service.head, world.status()["state"]) == (1, "waiting")
    world.train("a")
    world.round(2, "a")
    assert world.service.head == 1
    world.restart()
    world.train("a", "b")
    world.round(2, "a", "b")
    assert world.service.head == 2


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "nothing to set"),
        ({"run__seed": 2}, "run.seed stands in record 0.*run.rounds, schedule.batch_samples"),
        ({"strategy__lr": 1.0}, "does not know the options of strategies"),
        ({"run__rounds": 1}, "the run is at round 2 already"),
        ({"schedule__final_factor": -1}, "schedule.final_factor"),
    ],
)
def test_what_cannot_change_is_refused_and_changes_nothing(
    make_world: MakeWorld, settings: dict[str, object], text: str
) -> None:
    world = make_world()
    world.train("a", "b")
    world.round(1, "a", "b")
    with pytest.raises(ConfigError, match=text):
        ordered(world, "set", **settings)
    world.round(2, "a", "b")
    assert body(world, 2).changes == ()


def test_lost_rounds_come_back_before_a_run_is_changed(make_world: MakeWorld) -> None:
    world = make_world()
    world.train("a", "b")
    world.service.hold()
    with pytest.raises(ConfigError, match="lost rounds"):
        ordered(world, "pause")
