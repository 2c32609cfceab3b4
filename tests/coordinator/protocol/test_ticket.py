"""Tickets: there and back, and a clear word about every damaged one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.compression.errors import ConfigError
from thinwire.coordinator.protocol.identity import new_key, peer_id_of
from thinwire.coordinator.protocol.messages import digest_of
from thinwire.coordinator.protocol.ticket import Ticket

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


@given(at=st.integers(4, len(_TICKET.line()) - 2), char=st.sampled_from("abcXYZ019-_ ?\x00é"))
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


def test_a_ticket_that_is_too_long() -> None:
    with pytest.raises(ConfigError, match="characters"):
        Ticket.parse("tw1-" + "A" * 20_000)


def test_a_ticket_without_a_public_key_in_its_peer_id() -> None:
    foreign = _TICKET.model_copy(update={"peer_id": "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"})
    with pytest.raises(ConfigError, match="peer id"):
        Ticket.parse(foreign.line())
