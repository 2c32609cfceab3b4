"""`thinwire invite` and `thinwire identity`: tickets for some, and who this machine is to a run."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path

from ...compression.errors import ConfigError
from ...coordinator.entry.tickets import invite
from ...coordinator.protocol.identity import load_or_create, peer_id_of
from ..system.folder import IDENTITY_NAME, NodeFolder
from .arguments import seconds_of

log = logging.getLogger("thinwire.cli")

LONGEST_S = 10 * 365 * 86400.0


def invitation(state: Path, name: str, uses: int, expires: str) -> str:
    """The line of a ticket that lets in so many identities. `expires`: as "7d", or "forever". Raises
    ConfigError."""
    within_s = seconds_of(expires, "--expires")
    if not within_s or (within_s > LONGEST_S and not math.isinf(within_s)):
        raise ConfigError(f"--expires {expires}: write it as 12h, 7d (10 years at most) or forever")
    until_s = 0 if math.isinf(within_s) else math.ceil(time.time() + within_s)
    line = invite(state, name, uses, until_s).line()
    who = "one identity" if uses == 1 else f"{uses} identities"
    how_long = "for ever" if until_s == 0 else f"for {expires}"
    log.info("the line is a ticket that lets in %s, %s. On that machine: thinwire join TICKET", who, how_long)
    return line


def identity(state: Path | None) -> str:
    """The peer id of the node that keeps its state there, or that `thinwire join` would start; its key is
    made if it has none. Raises ConfigError."""
    if state is not None and (state / IDENTITY_NAME).is_file():
        return _peer_id(state)  # its node may run
    if state is not None and (state / "ledger.db").is_file():
        raise ConfigError(f"{state} is a coordinator's state folder: name a node's, or none")
    folder = NodeFolder(state)
    try:
        log.info("the identity of a node with its state in %s", folder.path)
        return _peer_id(folder.path)
    finally:
        folder.close()


def _peer_id(folder: Path) -> str:
    return peer_id_of(load_or_create(folder / IDENTITY_NAME).public_key())
