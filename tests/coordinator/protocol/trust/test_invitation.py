"""Invitations: there and back in the place of a token, and a clear word about everything that is none."""

from __future__ import annotations

import base64
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.compression.errors import ConfigError
from thinwire.coordinator.protocol.identity import new_key, peer_id_of
from thinwire.coordinator.protocol.messages import Hello, digest_of
from thinwire.coordinator.protocol.ticket import Ticket
from thinwire.coordinator.protocol.trust.invitation import MAX_CHARS, MAX_USES, PREFIX, Invitation

KEY = new_key()
OWNER = peer_id_of(KEY.public_key())
RUN = digest_of(b"a run")


def made(**changes: Any) -> Invitation:
    plain: dict[str, Any] = {"name": "lab-7", "uses": 1, "expires_s": 0, "nonce": b"12345678"}
    return Invitation.make(KEY, RUN, **{**plain, **changes})


def test_the_longest_one_fits_into_a_ticket_and_a_hello() -> None:
    longest = made(name="x" * 40, uses=MAX_USES, expires_s=2**40 - 1, nonce=b"\xff" * 8)
    ticket = Ticket(peer_id=OWNER, addresses=("/ip4/127.0.0.1/tcp/1",), run_id=RUN, token=longest.text())
    token = Ticket.parse(ticket.line()).token
    assert Invitation.parse(token) == longest
    assert len(token) <= MAX_CHARS
    assert {m.max_length for m in Hello.model_fields["token"].metadata} == {MAX_CHARS}


def test_it_is_of_one_run_and_one_coordinator() -> None:
    invitation = made()
    assert invitation.is_of(RUN, OWNER)
    assert not invitation.is_of(digest_of(b"another run"), OWNER)
    assert not invitation.is_of(RUN, peer_id_of(new_key().public_key()))


@pytest.mark.parametrize(
    "changes",
    [{"name": "lab-8"}, {"uses": 2}, {"expires_s": 1}, {"nonce": b"87654321"}],
    ids=lambda c: str(*c),
)
def test_nothing_in_it_can_be_changed(changes: dict[str, Any]) -> None:
    invitation = made()
    assert not invitation.model_copy(update=changes).is_of(RUN, OWNER)


def test_two_of_one_name_differ_in_the_ledger() -> None:
    names = {made(nonce=bytes([n]) * 8).in_ledger(RUN) for n in range(8)}
    assert len(names) == 8
    assert all(name.startswith("lab-7#") and len(name) == 18 for name in names)


def test_it_ends_when_it_says() -> None:
    assert not made().is_over(1e12)
    assert [made(expires_s=100).is_over(s) for s in (99.9, 100.0)] == [False, True]


@pytest.mark.parametrize("name", ["", " ", "-x", "a b", "ä", "x" * 41, "a\n", "a#1"])
def test_a_name_that_it_cannot_have(name: str) -> None:
    with pytest.raises(ConfigError, match="no name for an invitation"):
        made(name=name)


@pytest.mark.parametrize("uses", [0, -1, MAX_USES + 1])
def test_so_many_uses_it_cannot_have(uses: int) -> None:
    with pytest.raises(ConfigError, match="lets in 1 to"):
        made(uses=uses)


@given(st.one_of(st.text(max_size=300), st.text(max_size=200).map(lambda text: PREFIX + text)))
def test_any_text_is_read_or_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        Invitation.parse(text)


PLAIN = st.one_of(st.none(), st.integers(-(2**63), 2**64 - 1), st.text(max_size=50), st.binary(max_size=80))


@given(st.one_of(st.binary(max_size=140), st.lists(PLAIN, max_size=6).map(msgpack.packb)))
def test_any_bytes_are_read_or_refused_and_are_never_the_coordinators(data: bytes) -> None:
    text = PREFIX + base64.urlsafe_b64encode(data).decode().rstrip("=")
    try:
        found = Invitation.parse(text)
    except ConfigError:
        return
    assert not found.is_of(RUN, OWNER)


@given(at=st.integers(0, len(made().text()) - 1), char=st.sampled_from("abcXYZ019-_= é\x00"))
def test_a_changed_character_makes_it_worthless(at: int, char: str) -> None:
    invitation = made()
    text = invitation.text()
    damaged = text[:at] + char + text[at + 1 :]
    try:
        found = Invitation.parse(damaged)
    except ConfigError:
        return
    assert found == invitation or not found.is_of(RUN, OWNER)
