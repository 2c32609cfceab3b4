"""What a coordinator has derived from its ledger, as bytes in its own signed checkpoint.

Plain data (`objects`), of this very code: with any other source it is not looked at. What the process has
from elsewhere (ledger, blobs, counters) is named in it, not contained.
"""

from __future__ import annotations

import logging
import platform
import time
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import pydantic
from blake3 import blake3

from ..blobs import BlobStore
from ..derived_state import DerivedState
from ..ledger import Ledger
from ..observe.peer_names import PeerNames
from ..observe.quiet_log import QuietLog
from ..protocol.messages import Rejected
from ..protocol.settings import Keep
from .objects import Unkept, decode, encode

log = logging.getLogger("thinwire.coordinator")

_QUIET_LOG: Final = "quiet log"
_Outside = Mapping[str, Any]
"""What belongs to the process, by name."""


def outside(
    ledger: Ledger, blobs: BlobStore, names: PeerNames, rejected: Counter[Rejected], keep: Keep
) -> _Outside:
    """For `saved` and `restored`."""
    return {"ledger": ledger, "blobs": blobs, "names": names, "rejected": rejected, "keep": keep}


def saved(derived: DerivedState, blobs: BlobStore, around: _Outside) -> bytes | None:
    """As it is after the newest commit; None: it has what cannot be kept, which is a fault of this code."""
    names = {id(thing): name for name, thing in around.items()}

    def name_of(thing: object) -> str | None:
        return _QUIET_LOG if isinstance(thing, QuietLog) else names.get(id(thing))

    try:
        return _format() + encode([derived, blobs.counted()], name_of)
    except Unkept as e:
        log.warning("no checkpoint of the ledger can be made (%s): the next start reads all of it", e)
        return None


def restored(data: bytes, around: _Outside) -> DerivedState | None:
    """None: it is of another version of this code."""
    known = _format()
    if not data.startswith(known):
        return None

    def named(name: str) -> Any:
        return QuietLog(log, time.monotonic) if name == _QUIET_LOG else around[name]

    try:
        derived, counted = decode(data[len(known) :], named)
    except Unkept as e:
        log.warning("what was derived from the ledger cannot be read (%s): the ledger is read again", e)
        return None
    assert isinstance(derived, DerivedState)
    derived.page_history.forget_rejected(around["rejected"])
    derived.forget_sessions()
    derived.retention.recall_marks(counted)
    return derived


@cache
def _format() -> bytes:
    """Of the coordinator's source, and of what its classes are made with."""
    said = blake3(f"{platform.python_version()} {pydantic.VERSION}\n".encode())
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        said.update(path.read_bytes())
    return said.digest()
