"""What a coordinator has derived from its ledger, as bytes in its own signed checkpoint.

It is a pickle: of this node's own state, behind this node's own signature, of no other classes than the
coordinator's own and a few containers, and of this very code: with any other source it is not looked at. What
the process has from elsewhere (ledger, blobs, counters) is named in it, not contained.
"""

from __future__ import annotations

import io
import logging
import pickle
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping
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

log = logging.getLogger("thinwire.coordinator")

_CONTAINERS: Final = {
    ("collections", "Counter"),
    ("collections", "deque"),
    ("collections", "defaultdict"),
    ("builtins", "frozenset"),
    ("builtins", "getattr"),
    ("builtins", "set"),
}
_PACKAGE: Final = __name__.rpartition(".checkpoints")[0]
_Outside = Mapping[str, Any]
"""What belongs to the process, by name."""


def outside(
    ledger: Ledger, blobs: BlobStore, names: PeerNames, rejected: Counter[Rejected], keep: Keep
) -> _Outside:
    """For `saved` and `restored`."""
    return {"ledger": ledger, "blobs": blobs, "names": names, "rejected": rejected, "keep": keep}


def saved(derived: DerivedState, blobs: BlobStore, around: _Outside) -> bytes:
    """As it is after the newest commit."""
    out = io.BytesIO()
    _Pickler(out, around).dump((derived, blobs.counted()))
    return _format() + out.getvalue()


def restored(data: bytes, around: _Outside) -> DerivedState | None:
    """None: it is of another version of this code."""
    known = _format()
    if not data.startswith(known):
        return None
    try:
        derived, counted = _Unpickler(io.BytesIO(data[len(known) :]), around).load()
    except Exception as e:  # noqa: BLE001 - the ledger says it all once more
        log.warning("what was derived from the ledger cannot be read (%s): the ledger is read again", e)
        return None
    assert isinstance(derived, DerivedState)
    derived.page_history.forget_rejected(around["rejected"])
    derived.forget_sessions()
    derived.retention.recall_marks(counted)
    return derived


@cache
def _format() -> bytes:
    """Of the coordinator's source, and of what unpickles it."""
    said = blake3(f"{platform.python_version()} {pydantic.VERSION}\n".encode())
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        said.update(path.read_bytes())
    return said.digest()


class _Pickler(pickle.Pickler):
    def __init__(self, out: io.BytesIO, around: _Outside) -> None:
        super().__init__(out, protocol=5)
        self._names = {id(thing): name for name, thing in around.items()}

    def persistent_id(self, thing: Any) -> str | None:
        if isinstance(thing, QuietLog):
            return "quiet log"
        return self._names.get(id(thing))


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: io.BytesIO, around: _Outside) -> None:
        super().__init__(data)
        self._around = around

    def persistent_load(self, name: Any) -> Any:
        return QuietLog(log, time.monotonic) if name == "quiet log" else self._around[name]

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        ours = module.startswith(f"{_PACKAGE}.") and "." not in name
        if not ours and (module, name) not in _CONTAINERS:
            raise pickle.UnpicklingError(f"{module}.{name} is nothing that is kept")
        found: Callable[..., Any] = super().find_class(module, name)
        return found
