"""Who may come into a run: tokens, invitations, lists and bans; what the ledger says of it, and what is
counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.records import commit_body
from tests.support.service_world import MakeWorld, World, offer
from thinwire.compression.errors import ConfigError
from thinwire.coordinator.entry.rules import OPEN, EntryRules
from thinwire.coordinator.entry.tickets import invite
from thinwire.coordinator.ledger import Ledger
from thinwire.coordinator.protocol.identity import new_key, peer_id_of, save
from thinwire.coordinator.protocol.messages import CommitteeEntry, SeatEntry
from thinwire.coordinator.protocol.ticket import Ticket
from thinwire.coordinator.protocol.trust.invitation import PREFIX, Invitation
from thinwire.coordinator.state import StateDir

INVITED = EntryRules.of("invited", ())


def ticket_of(world: World, name: str = "lab-7", uses: int = 1, expires_s: int = 0, n: int = 0) -> str:
    """The text that stands in the place of a token."""
    nonce = n.to_bytes(8, "big")
    return Invitation.make(world.key, world.ledger.run_id, name, uses, expires_s, nonce).text()


def refused(world: World, peer: str, token: str) -> str:
    with pytest.raises(ConfigError) as e:
        world.open(peer, token=token)
    return str(e.value)


def rejected(world: World) -> dict[str, int]:
    return dict(world.status()["rejected"])


def test_of_a_hundred_identities_with_one_invitation_one_comes_in(make_world: MakeWorld) -> None:
    world = make_world(max_peers=200)
    token = ticket_of(world)
    world.open("peer 0", token=token)
    for n in range(1, 100):
        text = refused(world, f"peer {n}", token)
    assert "lab-7 lets in 1 identity, which has come with it" in text
    assert "thinwire invite STATE" in text
    assert rejected(world) == {"uninvited": 99}
    assert world.ledger.peers() == {0: "peer 0"}


def test_the_ledger_names_it_and_counts_it_over_a_restart(make_world: MakeWorld) -> None:
    world = make_world(min_peers=1)
    token = ticket_of(world, uses=2)
    world.open("first", token=token)
    world.restart(rules=INVITED)
    world.sessions.clear()
    world.train("first")  # without a word of the invitation, and without using it again
    world.say("first", offer(1))
    world.open("second", token=token)
    assert "2 identities, which have come" in refused(world, "third", token)
    named = Invitation.parse(token).in_ledger(world.ledger.run_id)
    assert world.status()["admission"] == {"mode": "invited", "banned": []}
    assert [peer["invitation"] for peer in world.status()["peers"]] == [named, named]
    (admitted,) = world.ledger.commits(0, 1)[0].body.admitted
    assert (admitted.peer_id, admitted.invitation) == ("first", named)
    world.restart(rules=INVITED)
    assert world.ledger.invited.all() == {named: 2}, "one of a record, one that waits for the next"
    assert "2 identities" in refused(world, "third", token)
    world.open("third", token=ticket_of(world, n=1))  # another one of the same name


def test_uses_come_back_with_the_commits_of_a_lost_copy(make_world: MakeWorld, tmp_path: Path) -> None:
    """A coordinator that was restored from an older copy has let somebody else in meanwhile."""
    world = make_world(min_peers=1)
    token = ticket_of(world)
    world.open("first", token=token)
    world.train("first")
    world.say("first", offer(1))
    older = Ledger.create(tmp_path / "older.db", world.ledger.genesis, world.key)
    named = Invitation.parse(token).in_ledger(older.run_id)
    assert older.run_id == world.ledger.run_id
    older.admit("thief", named)
    older.adopt(world.ledger.commits(0, 9))
    assert (older.peers(), older.invited.all()) == ({0: "first"}, {named: 1})
    older.close()
    again = Ledger.open(tmp_path / "older.db", world.key.public_key())
    assert again.invited.all() == {named: 1}
    again.close()


def test_one_that_has_expired_lets_nobody_in_and_who_is_in_stays(make_world: MakeWorld) -> None:
    world = make_world()
    token = ticket_of(world, uses=9, expires_s=1000)
    world.wall_ms = 999_999
    world.open("early", token=token)
    world.wall_ms = 1_000_000
    assert "the invitation lab-7 has expired" in refused(world, "late", token)
    world.open("early", token=token)
    assert rejected(world) == {"uninvited": 1}


def test_an_invitation_of_another_run_or_coordinator(make_world: MakeWorld) -> None:
    world = make_world()
    theirs = Invitation.make(new_key(), world.ledger.run_id, "lab-7", 1, 0, bytes(8)).text()
    other_run = Invitation.make(world.key, b"x" * 32, "lab-7", 1, 0, bytes(8)).text()
    for token in (theirs, other_run):
        assert "not signed by this run's coordinator" in refused(world, "x", token)
    assert "damaged" in refused(world, "x", PREFIX + "AAAA")
    assert rejected(world) == {"uninvited": 3}


def test_every_seat_of_the_present_committee_invites(make_world: MakeWorld) -> None:
    world = make_world(max_peers=200)
    keys = [new_key() for _ in range(3)]
    seats = [SeatEntry(peer_id=peer_id_of(key.public_key()), addresses=()) for key in keys]

    def name(*places: int) -> None:
        committee = CommitteeEntry(seats=tuple(seats[i] for i in places), need=len(places) // 2 + 1)
        head = world.ledger.head_round
        body = commit_body(head + 1, parent=world.ledger.head_digest, offers=(), committee=committee)
        world.ledger.append(body, keys[0] if head else world.key)
        world.restart(rules=INVITED)

    tokens = [
        Invitation.make(key, world.ledger.run_id, "lab", 9, 0, bytes(8)).text() for key in (world.key, *keys)
    ]
    assert "not signed by this run's coordinator" in refused(world, "x", tokens[1])
    name(0)
    for peer, token in (("a", tokens[0]), ("b", tokens[1])):
        world.open(peer, token=token)
    assert "not signed by this run's coordinator" in refused(world, "x", tokens[2])
    name(1, 2)
    for peer, token in (("c", tokens[2]), ("d", tokens[3])):
        world.open(peer, token=token)
    assert "not signed" in refused(world, "x", tokens[1]), "it has no seat any more"
    world.open("e", token=tokens[0])


def test_an_open_run_takes_tokens_and_an_invited_one_does_not(make_world: MakeWorld) -> None:
    world = make_world()
    world.open("old")
    world.restart(rules=INVITED)
    assert "the ticket holds no invitation" in refused(world, "new", "secret")
    assert "the ticket holds no invitation" in refused(world, "new", "a wrong token")
    world.sessions.clear()
    world.open("old", token="")
    world.open("new", token=ticket_of(world))
    assert rejected(world) == {"uninvited": 2}


def test_a_listed_run_takes_who_is_listed_whatever_the_ticket_says(make_world: MakeWorld) -> None:
    world = make_world()
    ours, known, theirs = (peer_id_of(new_key().public_key()) for _ in range(3))
    world.open(known)
    world.restart(rules=EntryRules.of("listed", [ours]))
    world.sessions.clear()
    world.open(ours, token="a token of before")
    for peer in (known, theirs):
        assert f"{peer} is not among them" in refused(world, peer, ticket_of(world))
    assert rejected(world) == {"uninvited": 2}


def test_who_may_see_how_the_run_is(make_world: MakeWorld) -> None:
    world = make_world()
    token = ticket_of(world, expires_s=1000)
    world.open("x", token=token)
    for shown in ("secret", token):  # used up, too
        world.service.check_looker(shown)
    world.wall_ms = 10**6
    for shown, text in (("wrong", "token is wrong"), (token[:-3], "damaged"), (token, "has expired")):
        with pytest.raises(ConfigError, match=text):
            world.service.check_looker(shown)
    assert rejected(world) == {"token": 1, "uninvited": 2}


@pytest.mark.parametrize("mode", ["open", "invited", "listed"])
def test_no_text_but_the_right_one_admits(make_world: MakeWorld, mode: str) -> None:
    world = make_world()
    rules = EntryRules.of(mode, [peer_id_of(world.key.public_key())] if mode == "listed" else [])
    world.restart(rules=rules)

    @given(st.one_of(st.text(max_size=200), st.text(max_size=190).map(lambda text: PREFIX + text)))
    @settings(max_examples=200)
    def fuzzed(token: str) -> None:
        if token != "secret":
            assert refused(world, "stranger", token)

    fuzzed()
    assert world.ledger.peers() == {}


# ------------------------------------------------------------------------------------------ the folder


def test_rules_survive_in_the_state_folder(tmp_path: Path) -> None:
    rules = EntryRules.of("listed", [peer_id_of(new_key().public_key()) for _ in range(3)])
    with StateDir(tmp_path) as state:
        assert state.rules() == OPEN
        state.save_rules(rules)
        assert state.rules() == rules


@given(st.one_of(st.binary(max_size=60), st.sampled_from([b"{}", b'{"mode": "open", "peers": [1]}', b"[]"])))
def test_rules_that_cannot_be_read_are_refused(data: bytes) -> None:
    with pytest.raises(ConfigError):
        EntryRules.parse(data)


def folder_of(tmp_path: Path, world: World, **changes: Any) -> Path:
    folder = tmp_path / "state"
    with StateDir(folder) as state:
        save(world.key, state.key_path)
        state.ledger_path.touch()
        place = Ticket(
            peer_id=peer_id_of(world.key.public_key()),
            addresses=("/ip4/127.0.0.1/tcp/1",),
            run_id=world.ledger.run_id,
            token="",
        ).model_copy(update=changes)
        state.save_address(place.line())
    return folder


def test_an_invitation_is_made_from_the_folder_alone(make_world: MakeWorld, tmp_path: Path) -> None:
    world = make_world()
    ticket = Ticket.parse(invite(folder_of(tmp_path, world), "lab-7", 1, 0).line())
    assert (ticket.run_id, ticket.addresses) == (world.ledger.run_id, ("/ip4/127.0.0.1/tcp/1",))
    world.restart(rules=INVITED)
    world.open("x", token=ticket.token)


def test_what_is_missing_for_an_invitation_is_said(make_world: MakeWorld, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not the state folder of a coordinator"):
        invite(tmp_path, "lab-7", 1, 0)
    folder = folder_of(tmp_path, make_world())
    (folder / "address").unlink()
    with pytest.raises(ConfigError, match="start it once"):
        invite(folder, "lab-7", 1, 0)
    (folder / "address").write_bytes(b"\xff" * 40_000)
    with pytest.raises(ConfigError, match="ticket"):
        invite(folder, "lab-7", 1, 0)


def test_the_address_of_another_coordinator_is_not_taken(make_world: MakeWorld, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, make_world(), peer_id=peer_id_of(new_key().public_key()))
    with pytest.raises(ConfigError, match="another coordinator's"):
        invite(folder, "lab-7", 1, 0)
