"""A transport that is begun before it is asked for: libp2p's daemon takes a tenth of a second to start."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from ....compression.errors import ThinwireError
from ....coordinator.protocol.transport import Transport


class Begun:
    """`open_`, called at once; whoever calls this first gets what comes of it, later calls are `open_`'s. One
    event loop."""

    def __init__(self, open_: Callable[..., Awaitable[Transport]], *args: Any, **kwargs: Any) -> None:
        self._open = open_
        self._first: asyncio.Future[Transport] | None = asyncio.ensure_future(open_(*args, **kwargs))

    async def __call__(self, *args: Any, **kwargs: Any) -> Transport:
        """With the arguments of `__init__`, the first time. Raises what `open_` raises."""
        first, self._first = self._first, None
        return await (self._open(*args, **kwargs) if first is None else first)

    async def close(self) -> None:
        """Ends what nobody has asked for. May be called twice."""
        first, self._first = self._first, None
        if first is not None:
            first.cancel()
            with suppress(ThinwireError, asyncio.CancelledError):
                await (await first).close()
