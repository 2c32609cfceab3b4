"""Signatures of offers are checked off the event loop, those that have come meanwhile together: a thousand
take a tenth of a second, and a call of a thread for each would take as long again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from ..protocol.messages import Offer

_Check = tuple[str, Offer, asyncio.Future[bool]]


class SignatureChecks:
    """`check`: of a peer's offer, called in a thread. One event loop."""

    def __init__(self, check: Callable[[str, Offer], bool]) -> None:
        self._check = check
        self._waiting: list[_Check] = []
        self._work: asyncio.Task[None] | None = None

    async def is_signed(self, peer_id: str, offer: Offer) -> bool:
        """Whether the peer has signed it."""
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append((peer_id, offer, done))
        if self._work is None:
            self._work = asyncio.create_task(self._check_all())
        return await done

    async def _check_all(self) -> None:
        batch: list[_Check] = []
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                found = await asyncio.to_thread(self._checked, batch)
                for (_, _, done), is_signed in zip(batch, found, strict=True):
                    if not done.done():
                        done.set_result(is_signed)
        finally:
            self._work = None
            for _, _, done in batch:
                done.cancel()  # unless it is done

    def _checked(self, batch: Sequence[_Check]) -> list[bool]:
        return [self._check(peer_id, offer) for peer_id, offer, _ in batch]
