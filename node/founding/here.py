"""Founds a run in this process. Loads torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...coordinator.blobs import BlobStore
from ...coordinator.protocol.figures import wall_ms
from ...coordinator.protocol.messages import digest_of
from ...optim.registry import check_changes
from ...optim.rules import warning_of
from ..config import RunConfig, parse_config
from ..genesis import make_genesis, public_config
from ..tasks.base import Task, loss_unit_of
from .founder import Compared, Founded

log = logging.getLogger("thinwire.coordinator")


class Here:
    """See `Founder`."""

    name = None

    def __init__(self, task: Task) -> None:
        self._task = task

    def found(self, config: RunConfig, coordinator: str, recovery: bytes, blobs: Path) -> Founded:
        genesis = make_genesis(config, self._task, coordinator, wall_ms(), recovery)
        options = parse_config(genesis.body.config).strategy
        if (warning := warning_of(options, config.run.rounds)) is not None:
            log.warning("%s", warning)
        store = BlobStore(blobs)
        for blob in genesis.blobs:
            store.put(digest_of(blob), blob)
        return Founded(genesis.body, loss_unit_of(self._task))

    def compare(self, config: RunConfig, recorded: str) -> Compared:
        """As of today: options that the run's thinwire did not have yet are what they are by default."""
        before = parse_config(recorded)
        there, here = (public_config(c, self._task, before).model_dump() for c in (before, config))
        return Compared(tuple(differences(there, here)), loss_unit_of(self._task))

    def check(self, table: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        check_changes(table, options)


def differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Between two configurations, in words."""
    found = []
    for key in sorted(there.keys() | here.keys()):
        old, new = there.get(key), here.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} is {old!r} there, {new!r} here")
    return found
