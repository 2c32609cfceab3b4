"""The secret line that lets a machine become a seat: where the seats of a run are, and what they ask for.

"tws-" + base64url(msgpack [run id, secret, token, seats] + first 4 bytes of its BLAKE3). Whoever has it reads
the run's ledger and payloads and may be named a seat: a ticket to join does not suffice for that.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated, Final, Self

from pydantic import Field

from ...compression.errors import ConfigError
from ..protocol.files import write_aside
from ..protocol.identity import public_key_of
from ..protocol.messages import MAX_SEATS, Digest, Record, SeatEntry
from ..protocol.ticket import line_of, read_line, unwrapped

PREFIX: Final = "tws-"
FILE_NAME: Final = "seat-ticket"
MAX_CHARS: Final = 32_768


class SeatTicket(Record):
    """`token`: of the run's tickets, which nodes show to every seat; `seats`: where to ask, at least one."""

    run_id: Digest
    secret: Annotated[bytes, Field(min_length=32, max_length=32)]
    token: Annotated[str, Field(max_length=200)]
    seats: Annotated[tuple[SeatEntry, ...], Field(min_length=1, max_length=MAX_SEATS)]

    def line(self) -> str:
        """As people carry it to another machine."""
        return line_of(PREFIX, self)

    @classmethod
    def parse(cls, line: str) -> Self:
        """Raises ConfigError that says what is wrong with `line`, which may have been wrapped on its way."""
        line = unwrapped(line)
        if not line.startswith(PREFIX):
            raise ConfigError(
                f"this is no seat ticket: one starts with {PREFIX}, and stands in the file {FILE_NAME} of a "
                f"coordinator's state folder. (A ticket that lets nodes join is another one.)"
            )
        ticket = read_line(cls, line, PREFIX, "seat ticket", MAX_CHARS)
        for seat in ticket.seats:
            public_key_of(seat.peer_id)
        return ticket

    @classmethod
    def read(cls, file_or_line: str) -> Self:
        """From a file, or the line itself. Raises ConfigError."""
        if file_or_line.strip().startswith(PREFIX):
            return cls.parse(file_or_line)
        try:
            with Path(file_or_line).open("rb") as file:
                data = file.read(MAX_CHARS + 1)
        except OSError as e:
            raise ConfigError(f"the seat ticket {file_or_line} cannot be read: {e.strerror}") from e
        return cls.parse(data.decode("ascii", "replace"))


def new_secret() -> bytes:
    return secrets.token_bytes(32)


def kept_ticket(folder: Path) -> SeatTicket | None:
    """That a state folder has; None: it has none. Raises ConfigError."""
    path = folder / FILE_NAME
    return SeatTicket.read(str(path)) if path.exists() else None


def keep_ticket(folder: Path, ticket: SeatTicket) -> Path:
    """Readable by this user alone. Raises ConfigError."""
    path = folder / FILE_NAME
    try:
        write_aside(path, f"{ticket.line()}\n".encode(), 0o600)
    except OSError as e:
        raise ConfigError(f"{path} cannot be written: {e.strerror}") from e
    return path
