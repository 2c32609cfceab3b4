"""The local door of a coordinator: a Unix socket in its state folder, for whoever may read the key there too.

frame    u32 length (little-endian) | msgpack record
owner -> coordinator    Order, one of a connection
coordinator -> owner    Answer: refused; or planned, and done once the record is on the disk; or told, and a
                        frame of JSON: the status
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field

from ..protocol.messages import MAX_CHANGES, MAX_ROUND, MAX_TEXT, BadMessage, Record, Text, encode_record

SOCKET_NAME: Final = "control.sock"
HEAD: Final = struct.Struct("<I")
MAX_FRAME: Final = 2**16
MAX_STATUS: Final = 16 * 2**20
"""Bytes of the frame that says how things are."""

_LONGEST_PATH: Final = 107
"""Bytes of a Unix socket's path."""


class Answer(Record):
    """`text`: why it is refused; `round`, `told`: see `Ordered`; round 0: no record has it."""

    what: Literal["refused", "planned", "done", "told"]
    text: Text = ""
    round: Annotated[int, Field(ge=0, le=MAX_ROUND)] = 0
    told: Annotated[tuple[Text, ...], Field(max_length=MAX_CHANGES)] = ()


def refused(text: str) -> Answer:
    return Answer(what="refused", text=text[:MAX_TEXT])


def frame(record: Record) -> bytes:
    """The bytes of a record on the socket."""
    return framed(encode_record(record))


def framed(body: bytes) -> bytes:
    """The bytes of a frame on the socket."""
    return HEAD.pack(len(body)) + body


def length(head: bytes, most: int = MAX_FRAME) -> int:
    """Of the body that follows. Raises BadMessage for one that is too long."""
    (n_bytes,) = HEAD.unpack(head)
    if n_bytes > most:
        raise BadMessage(f"a frame of {n_bytes} bytes, at most {most}")
    return int(n_bytes)


@contextmanager
def socket_path(folder: Path) -> Iterator[str]:
    """The socket's path, to bind or connect to: by way of the open folder where its own is too long."""
    path = folder.absolute() / SOCKET_NAME
    if len(os.fsencode(path)) <= _LONGEST_PATH:
        yield str(path)
        return
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{SOCKET_NAME}"
    finally:
        os.close(fd)
