"""Handlers of streams that answer for what a peer does wrong, and let nobody else notice."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Awaitable, Callable
from typing import Protocol

from ...compression.errors import SwarmUnreachable
from ..observe.quiet_log import QuietLog
from ..protocol.messages import BadMessage, Rejected
from ..protocol.streams import BadFrame, Meter, Stream
from ..protocol.transport import StreamHandler

_log = logging.getLogger("thinwire.coordinator")


class Count(Protocol):
    """Counts what was not let in, by its reason; of a peer, where it is known whose it was."""

    def __call__(self, reason: Rejected, peer_id: str | None = None) -> object: ...


def guarded(
    serve: Callable[[str, Stream], Awaitable[None]],
    meter: Meter,
    count: Count,
    lines: QuietLog,
    failed: Callable[[sqlite3.Error], object],
) -> StreamHandler:
    """`serve` for every stream; what one raises is counted and told in a line, and ends that stream alone.
    `failed`: hears of a ledger that cannot be written."""

    async def handler(peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = Stream(reader, writer, meter)
        try:
            await serve(peer_id, stream)
        except BadMessage as e:
            if isinstance(e, BadFrame):  # what a service refuses it counts itself
                count(e.reason, peer_id)
            lines.say(logging.INFO, peer_id, "stream", "closed a stream of %s: %s", peer_id, e)
        except (OSError, EOFError, TimeoutError, SwarmUnreachable) as e:
            _log.debug("a stream of %s ended: %s", peer_id, e)
        except sqlite3.Error as e:
            failed(e)
        except Exception:  # noqa: BLE001 - the edge: a fault met in serving one peer must not end the run
            _log.exception("a stream of %s met a fault of ours", peer_id)
            count("internal")

    return handler
