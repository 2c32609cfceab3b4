"""What a coordinator keeps on disk beside the ledger: what the page shows of the past, and checkpoints."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ..ledger import Ledger
from ..state import StateDir

log = logging.getLogger("thinwire.coordinator")

EVERY_S: Final = 10.0
CHECKPOINT_ROUNDS: Final = 5000
LAST_CHECKPOINT_ROUNDS: Final = 500
"""Rounds until the next checkpoint of the ledger, while the coordinator runs and when it stops: a start reads
that many in a second, and a tenth."""


class Past(Protocol):
    """Who orders the run: the service."""

    def history(self) -> bytes: ...

    def derived(self) -> bytes | None: ...


class KeptHistory:
    """Of one run, in its state folder. `reign`: None, another seat leads, and there is nothing to keep."""

    def __init__(
        self, state: StateDir, ledger: Ledger, key: Ed25519PrivateKey, reign: Callable[[], Past | None]
    ) -> None:
        self._state, self._ledger, self._key, self._reign = state, ledger, key, reign
        self._checkpointed = 0 if ledger.checkpoint is None else ledger.checkpoint.round
        self._saving, self._kept, self._fails = threading.Lock(), b"", False

    async def keep(self) -> None:
        """Again and again: all outlives this process, but for the last seconds before a crash."""
        while True:
            await asyncio.sleep(EVERY_S)
            if (reign := self._reign()) is not None:
                await asyncio.to_thread(self._save, reign.history())
            await asyncio.to_thread(self._checkpoint(CHECKPOINT_ROUNDS))

    def end(self) -> None:
        """The coordinator stops."""
        self.save()
        self._checkpoint(LAST_CHECKPOINT_ROUNDS)()

    def save(self) -> None:
        """What the page shows, as it is now."""
        if (reign := self._reign()) is not None:
            self._save(reign.history())

    def _save(self, data: bytes) -> None:
        """Unless it is there already; in any thread."""
        with self._saving:
            if data == self._kept:
                return
            try:
                self._state.save_history(data)
            except OSError as e:
                if not self._fails:
                    log.warning("what the page shows of the past cannot be kept: %s", e)
                self._fails = True
            else:
                self._kept, self._fails = data, False

    def _checkpoint(self, after: int) -> Callable[[], None]:
        """What writes a checkpoint, in any thread; nothing before so many rounds since the last one."""
        head, reign = self._ledger.head_round, self._reign()
        if reign is None or head < self._checkpointed + after or (derived := reign.derived()) is None:
            return lambda: None
        self._checkpointed = head
        return partial(_write_checkpoint, self._ledger.save_checkpoint(derived, self._key))


def _write_checkpoint(write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as e:
        log.warning("no checkpoint of the ledger can be written (%s): the next start reads all of it", e)
