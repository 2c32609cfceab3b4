"""How a seat begins that has nothing but a seat ticket: record 0 comes from another one, the rest later."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ...compression.errors import ConfigError, Incompatible, SwarmUnreachable
from ..ledger import Ledger
from ..protocol.figures import one_line, short
from ..protocol.messages import BadMessage, SeatEntry, digest_of, is_readable
from ..protocol.streams import SEAT, Meter, Stream
from ..protocol.transport import Transport
from ..quorum.words import Denied, Enter, Founding
from .link import read_word
from .ticket import SeatTicket

log = logging.getLogger("thinwire.coordinator")

DIAL_S: Final = 5.0
ANSWER_S: Final = 60.0
"""A run of a large model has a record 0 of megabytes."""

FIRST_RETRY_S: Final = 0.5
LAST_RETRY_S: Final = 8.0

_DENIED: Final = "is not let in"


async def begin(
    path: Path,
    ticket: SeatTicket,
    key: Ed25519PrivateKey,
    start_transport: Callable[..., Awaitable[Transport]],
    *,
    host: str,
    port: int,
    announce: Sequence[str],
) -> int:
    """Writes a ledger with record 0 at `path`; tries until a seat of the ticket answers. Returns the port
    that was listened on. Raises ConfigError (a taken port, a ticket that is refused) or Incompatible."""
    transport = await start_transport(key, host=host, port=port, announce=announce)
    rng, retry_s = random.Random(), FIRST_RETRY_S
    try:
        while True:
            for seat in ticket.seats:
                if (founding := await _ask(transport, ticket, seat)) is not None:
                    _write(path, ticket, founding)
                    return transport.port
            log.warning("no coordinator of the seat ticket answers: trying again in %.0f s", retry_s)
            await asyncio.sleep(retry_s * rng.uniform(0.7, 1.3))
            retry_s = min(2 * retry_s, LAST_RETRY_S)
    finally:
        await transport.close()


def _write(path: Path, ticket: SeatTicket, founding: Founding) -> None:
    if digest_of(founding.record) != ticket.run_id:
        raise ConfigError("the coordinator that the seat ticket names serves another run")
    ledger = Ledger.begin(path, founding.record, founding.signature)
    protocol = ledger.genesis.protocol
    ledger.close()
    if not is_readable(protocol):
        path.unlink()
        raise Incompatible(
            f"the run has protocol version {protocol}: install the thinwire of its coordinator"
        )


async def _ask(transport: Transport, ticket: SeatTicket, seat: SeatEntry) -> Founding | None:
    """None: it does not answer, which was told."""
    try:
        await transport.dial(seat.peer_id, seat.addresses, DIAL_S)
        stream = Stream(*await transport.open_stream(seat.peer_id, SEAT, DIAL_S), Meter())
        try:
            async with asyncio.timeout(ANSWER_S):
                await stream.send_message(_enter(ticket, transport))
                while True:
                    word, _ = await read_word(stream)
                    if isinstance(word, Denied):
                        raise ConfigError(f"this coordinator {_DENIED}: {word.why}")
                    if isinstance(word, Founding):
                        return word
        finally:
            stream.abort()
            with contextlib.suppress(SwarmUnreachable):
                await transport.disconnect(seat.peer_id)
    except (SwarmUnreachable, BadMessage, OSError, EOFError, TimeoutError) as e:
        why = one_line(str(e), heading=False) or type(e).__name__
        log.warning("coordinator %s: %s", short(seat.peer_id), why)
        return None


def _enter(ticket: SeatTicket, transport: Transport) -> Enter:
    return Enter(
        run_id=ticket.run_id,
        secret=ticket.secret,
        addresses=tuple(transport.addresses[:8]),
        wants_seat=False,
        lacks="record 0",
        begins=True,
    )
