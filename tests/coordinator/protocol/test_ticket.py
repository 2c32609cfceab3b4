"""Tickets: there and back, and a clear word about every damaged one."""

from __future__ import annotations

import base64
import contextlib

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.compression.errors import ConfigError
from thinwire.coordinator.protocol.identity import new_key, peer_id_of, public_key_of
from thinwire.coordinator.protocol.messages import MAX_SEATS, SeatEntry, digest_of
from thinwire.coordinator.protocol.ticket import Ticket

CHARS = st.sampled_from("abcXYZ019-_ ?\x00é")
_TICKET = Ticket(
    peer_id=peer_id_of(new_key().public_key()),
    addresses=("/ip4/192.0.2.7/tcp/9000", "/ip4/127.0.0.1/tcp/9000"),
    run_id=digest_of(b"a run"),
    token="s3cret",
)


def test_a_ticket_comes_back_from_its_line() -> None:
    line = _TICKET.line()
    assert line.startswith("tw1-")
    assert not set(line) & set(" \n+/=")
    assert Ticket.parse(f"  {line}\n") == _TICKET


def test_every_shorter_line_is_refused() -> None:
    line = _TICKET.line()
    for n in range(len(line)):
        with pytest.raises(ConfigError):
            Ticket.parse(line[:n])


@given(at=st.integers(4, len(_TICKET.line()) - 2), char=CHARS)
def test_a_changed_character_is_noticed(at: int, char: str) -> None:
    line = _TICKET.line()
    damaged = line[:at] + char + line[at + 1 :]
    if damaged != line:
        with pytest.raises(ConfigError, match="damaged"):
            Ticket.parse(damaged)


@given(st.text(max_size=200))
def test_other_text_is_refused(text: str) -> None:
    for line in (text, "tw1-" + text):
        with pytest.raises(ConfigError):
            Ticket.parse(line)


def test_a_ticket_of_another_version_says_so() -> None:
    with pytest.raises(ConfigError, match="starts with tw1-"):
        Ticket.parse("tw9-" + _TICKET.line()[4:])


# ------------------------------------------------------------------------------ of a committee: tw2-

OTHERS = tuple(
    SeatEntry(peer_id=peer_id_of(new_key().public_key()), addresses=(f"/ip4/192.0.2.{n}/tcp/9000",))
    for n in range(MAX_SEATS - 1)
)
OF_SEATS = _TICKET.model_copy(update={"others": OTHERS[:2]})


def test_a_ticket_of_several_seats_comes_back_and_names_them_in_order() -> None:
    for n in range(1, MAX_SEATS):
        ticket = _TICKET.model_copy(update={"others": OTHERS[:n]})
        line = ticket.line()
        assert line.startswith("tw2-")
        assert Ticket.parse(line) == ticket
        assert [seat.peer_id for seat in ticket.seats] == [_TICKET.peer_id, *(o.peer_id for o in OTHERS[:n])]
    eight = _TICKET.model_copy(update={"others": (*OTHERS, OTHERS[0])})
    with pytest.raises(ConfigError, match="not understood"):
        Ticket.parse(eight.line())


@given(
    at=st.integers(0, len(OF_SEATS.line()) - 1), how=st.sampled_from(["change", "cut", "insert"]), char=CHARS
)
def test_a_damaged_ticket_of_several_seats_is_refused(at: int, how: str, char: str) -> None:
    line = OF_SEATS.line()
    rest = {"change": line[at + 1 :], "cut": "", "insert": line[at:]}[how]
    damaged = line[:at] + ("" if how == "cut" else char) + rest
    try:
        assert Ticket.parse(damaged) == OF_SEATS
    except ConfigError:
        return
    # What wraps a line is no damage, and of the last character some bits are not used.
    assert "".join(damaged.split()).strip("\"'`<>")[:-1] == line[:-1]


VALUES = st.recursive(
    st.none() | st.integers(0, 2**32) | st.binary(max_size=40) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=9,
)


@given(prefix=st.sampled_from(["tw1-", "tw2-"]), others=VALUES, fields=st.lists(VALUES, max_size=5))
@settings(max_examples=300)
def test_any_values_in_a_whole_ticket_are_read_or_refused(
    prefix: str, others: object, fields: list[object]
) -> None:
    good = [_TICKET.peer_id, list(_TICKET.addresses), _TICKET.run_id, _TICKET.token]
    for values in ([*good, others], fields):
        packed = msgpack.packb(values)
        data = packed + digest_of(packed)[:4]
        with contextlib.suppress(ConfigError):
            ticket = Ticket.parse(prefix + base64.urlsafe_b64encode(data).decode().rstrip("="))
            assert bool(ticket.others) == (prefix == "tw2-")
            assert all(public_key_of(seat.peer_id) for seat in ticket.seats)


def test_a_prefix_says_whether_there_are_several_seats() -> None:
    for ticket, prefix in ((_TICKET, "tw2-"), (OF_SEATS, "tw1-")):
        with pytest.raises(ConfigError, match="damaged: ask for a new one"):
            Ticket.parse(prefix + ticket.line()[4:])
    nobody = SeatEntry(peer_id="nobody", addresses=())
    with pytest.raises(ConfigError, match="'nobody' is not the peer id"):
        Ticket.parse(OF_SEATS.model_copy(update={"others": (OTHERS[0], nobody)}).line())


def test_a_ticket_that_is_too_long() -> None:
    with pytest.raises(ConfigError, match="characters"):
        Ticket.parse("tw1-" + "A" * 20_000)


def test_a_ticket_without_a_public_key_in_its_peer_id() -> None:
    foreign = _TICKET.model_copy(update={"peer_id": "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"})
    with pytest.raises(ConfigError, match="peer id"):
        Ticket.parse(foreign.line())
