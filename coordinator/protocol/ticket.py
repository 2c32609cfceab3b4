"""The one line that lets a machine join: who the coordinator is, where it is, which run, the access token.

"tw1-" + base64url(msgpack [peer id, addresses, run id, token] + first 4 bytes of its BLAKE3); "tw2-" the same
with a fifth field, the other seats of a committee, which earlier versions do not know.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Final, Self, TypeVar

from pydantic import Field

from ...compression.errors import ConfigError
from .identity import public_key_of
from .messages import (
    MAX_SEATS,
    Address,
    BadMessage,
    Digest,
    PeerId,
    Record,
    SeatEntry,
    decode_record,
    digest_of,
    encode_record,
)

PREFIX: Final = "tw1-"
SEATS_PREFIX: Final = "tw2-"
MAX_CHARS: Final = 16_384
_CHECKSUM_BYTES: Final = 4

R = TypeVar("R", bound=Record)


class Ticket(Record):
    """`addresses`: multiaddrs without the peer id, the most likely to work first; `others`: seats of the
    committee beside this one."""

    n_younger = 1
    peer_id: PeerId
    addresses: Annotated[tuple[Address, ...], Field(min_length=1, max_length=32)]
    run_id: Digest
    token: Annotated[str, Field(max_length=200)]
    others: Annotated[tuple[SeatEntry, ...], Field(max_length=MAX_SEATS - 1)] = ()

    @property
    def seats(self) -> tuple[SeatEntry, ...]:
        """All that it names, the first one to be tried first."""
        return (SeatEntry(peer_id=self.peer_id, addresses=self.addresses[:8]), *self.others)

    def line(self) -> str:
        """The ticket as people pass it on."""
        return line_of(SEATS_PREFIX if self.others else PREFIX, self)

    @classmethod
    def parse(cls, line: str) -> Self:
        """Raises ConfigError that says what is wrong with `line`, which may have been wrapped on its way."""
        line = unwrapped(line)
        if not line:
            raise ConfigError("the ticket is empty: pass the line that `thinwire coordinator` printed")
        prefix = next((p for p in (PREFIX, SEATS_PREFIX) if line.startswith(p)), None)
        if prefix is None:
            start = f"a ticket starts with {PREFIX} or {SEATS_PREFIX}"
            raise ConfigError(f"this is no ticket of this version of thinwire: {start}")
        ticket = read_line(cls, line, prefix, "ticket", MAX_CHARS)
        for seat in ticket.seats:
            public_key_of(seat.peer_id)
        if bool(ticket.others) != (prefix == SEATS_PREFIX):
            raise ConfigError("the ticket is damaged: ask for a new one")
        return ticket


def line_of(prefix: str, ticket: Record) -> str:
    """What `read_line` reads."""
    packed = encode_record(ticket)
    data = packed + digest_of(packed)[:_CHECKSUM_BYTES]
    return prefix + base64.urlsafe_b64encode(data).decode().rstrip("=")


def unwrapped(line: str) -> str:
    """Without what it may have got on its way."""
    return "".join(line.split()).strip("\"'`<>")


def read_line(kind: type[R], line: str, prefix: str, what: str, max_chars: int) -> R:
    """What a ticket says, after its prefix. `what`: how people call it. Raises ConfigError."""
    if len(line) > max_chars:
        raise ConfigError(f"the {what} has {len(line)} characters, at most {max_chars} are possible")
    text = line.removeprefix(prefix)
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as e:
        raise ConfigError(f"the {what} is damaged or cut off: copy the whole line again") from e
    packed, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    if digest_of(packed)[:_CHECKSUM_BYTES] != checksum:
        raise ConfigError(
            f"the {what} is damaged or cut off (its checksum differs): copy the whole line again"
        )
    try:
        return decode_record(kind, packed)
    except BadMessage as e:
        raise ConfigError(
            f"the {what} is not understood ({e}): is this thinwire older than the swarm?"
        ) from e
