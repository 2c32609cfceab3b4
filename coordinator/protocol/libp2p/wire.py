"""What is said to libp2p's daemon, byte by byte: protobuf messages, and multiaddrs in them.

Every message has its length before it, as a varint. hivemind's own client says the same, but loads torch and
half of hivemind for it: 250 MB of memory, of which nothing is needed here.
Sources: p2pd.proto of hivemind 1.1.12; https://github.com/multiformats/multiaddr/blob/master/protocols.csv
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from ..identity import peer_id_bytes, peer_id_text

MAX_ANSWER_BYTES: Final = 2**20


class BadWords(ValueError):
    """Bytes that the daemon never sends, or an address that is none."""


class Kind(IntEnum):
    """Of a request."""

    IDENTIFY = 0
    CONNECT = 1
    STREAM_OPEN = 2
    STREAM_HANDLER = 3
    DISCONNECT = 7
    STAY = 9  # the daemon lives as long as a connection that has said this


@dataclass(frozen=True, slots=True)
class Answer:
    """`error`: why not, None: it was done. `addresses`: to IDENTIFY, where the daemon listens: binary."""

    error: str | None = None
    addresses: tuple[bytes, ...] = ()

    @classmethod
    def parse(cls, data: bytes) -> Answer:
        """Raises BadWords."""
        kind, error = 0, ""
        addresses: tuple[bytes, ...] = ()
        for field, value in _fields(data):
            match field, value:
                case 1, int():
                    kind = value
                case 2, bytes():
                    error = _text_in(value, 1)
                case 4, bytes():
                    addresses = tuple(v for f, v in _fields(value) if f == 2 and isinstance(v, bytes))
        return cls(error if kind else None, addresses)


@dataclass(frozen=True, slots=True)
class Incoming:
    """What a stream that another peer has opened begins with. The daemon has proved `peer_id`."""

    peer_id: str
    protocol: str

    @classmethod
    def parse(cls, data: bytes) -> Incoming:
        """Raises BadWords."""
        peer = next((v for f, v in _fields(data) if f == 1 and isinstance(v, bytes)), b"")
        return cls(peer_id_text(peer), _text_in(data, 3))


# ---------------------------------------------------------------------------------------------- requests


def identify() -> bytes:
    return _request(Kind.IDENTIFY)


def stay() -> bytes:
    return _request(Kind.STAY)


def connect(peer_id: str, addresses: Sequence[str]) -> bytes:
    """Raises BadWords for an address that cannot be written."""
    fields = b"".join(_bytes(2, packed(address)) for address in addresses)
    return _request(Kind.CONNECT, 2, _bytes(1, peer_id_bytes(peer_id)) + fields)


def stream_open(peer_id: str, protocol: str) -> bytes:
    return _request(Kind.STREAM_OPEN, 3, _bytes(1, peer_id_bytes(peer_id)) + _bytes(2, protocol.encode()))


def stream_handler(socket: str, protocol: str) -> bytes:
    """Streams of this protocol come to the Unix socket."""
    fields = _bytes(1, packed(f"/unix{socket}")) + _bytes(2, protocol.encode()) + _number(3, 0)
    return _request(Kind.STREAM_HANDLER, 4, fields)


def disconnect(peer_id: str) -> bytes:
    return _request(Kind.DISCONNECT, 7, _bytes(1, peer_id_bytes(peer_id)))


# ------------------------------------------------------------------------------------------------ frames


def framed(message: bytes) -> bytes:
    """With its length before it."""
    return _varint(len(message)) + message


async def read_framed(reader: asyncio.StreamReader) -> bytes:
    """The next message. Raises EOFError, OSError or BadWords."""
    n_bytes = shift = 0
    while True:
        (byte,) = await reader.readexactly(1)
        n_bytes |= (byte & 0x7F) << shift
        shift += 7
        if n_bytes > MAX_ANSWER_BYTES or shift > 28:
            raise BadWords("a message that is too long")
        if byte < 0x80:
            return await reader.readexactly(n_bytes)


# --------------------------------------------------------------------------------------------- multiaddrs

_IP4, _IP6, _TCP = 4, 41, 6
_CODES: Final = {
    "ip4": _IP4,
    "ip6": _IP6,
    "tcp": _TCP,
    "udp": 273,
    "unix": 400,
    "p2p": 421,
    "dns": 53,
    "dns4": 54,
    "dns6": 55,
    "dnsaddr": 56,
    "ip6zone": 42,
    "sni": 449,
}
"""Of those with a value."""

_BARE: Final = {
    "p2p-circuit": 290,
    "tls": 448,
    "noise": 454,
    "quic": 460,
    "quic-v1": 461,
    "ws": 477,
    "wss": 478,
}


def packed(address: str) -> bytes:
    """A multiaddr in its binary form. Raises BadWords."""
    first, *rest = address.split("/")
    if first or not rest:
        raise BadWords(f"{address!r} is no address")
    words = iter(rest)
    try:
        return b"".join(_packed_part(word, words) for word in words)
    except (ValueError, OverflowError) as e:
        raise BadWords(f"{address} is no address") from e


def _packed_part(name: str, words: Iterator[str]) -> bytes:
    if name in _BARE:
        return _varint(_BARE[name])
    if name == "unix":
        return _varint(_CODES[name]) + framed(os.fsencode("/" + "/".join(words)))
    if (code := _CODES.get(name)) is None:
        raise ValueError(f"{name} is not known")
    return _varint(code) + _packed_value(name, next(words, ""))


def _packed_value(name: str, text: str) -> bytes:
    match name:
        case "ip4":
            return ipaddress.IPv4Address(text).packed
        case "ip6":
            return ipaddress.IPv6Address(text).packed
        case "tcp" | "udp":
            return int(text).to_bytes(2, "big")
        case "p2p":
            return framed(peer_id_bytes(text))
    return framed(text.encode())


def tcp_port(address: bytes) -> int | None:
    """Of a binary multiaddr that begins with an IP address; None: it has none."""
    for head, n_bytes in ((_IP4, 4), (_IP6, 16)):
        start = 1 + n_bytes
        if address[:1] == bytes([head]) and address[start : start + 1] == bytes([_TCP]):
            return int.from_bytes(address[start + 1 : start + 3], "big")
    return None


# ----------------------------------------------------------------------------------------------- protobuf


def _request(kind: Kind, field: int = 0, body: bytes | None = None) -> bytes:
    return _number(1, kind) + (b"" if body is None else _bytes(field, body))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + framed(value)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Numbers and strings of bytes, by the field's number. Raises BadWords."""
    at = 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        value, at = _read_varint(data, at)
        match tag & 7:
            case 0:
                yield tag >> 3, value
            case 2:
                if at + value > len(data):
                    raise BadWords("a field that is cut off")
                yield tag >> 3, data[at : at + value]
                at += value
            case _:
                raise BadWords(f"a field of type {tag & 7}")


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
        if byte < 0x80:
            return value, at
    raise BadWords("a number that is cut off")


def _text_in(data: bytes, field: int) -> str:
    """Of the message `data`; "": it has none."""
    found = next((v for f, v in _fields(data) if f == field and isinstance(v, bytes)), b"")
    return found.decode(errors="replace")
