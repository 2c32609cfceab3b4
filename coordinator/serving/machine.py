"""What a coordinator's process says of itself, beside what it says of its run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..protocol.addresses import HttpAddress
from ..protocol.figures import wall_ms
from ..protocol.messages import PROTOCOL_VERSION
from ..protocol.streams import Meter


def machine(meter: Meter, folder: Path, http: HttpAddress | None) -> dict[str, Any]:
    """JSON-able: bytes that it has sent and received, and what another machine compares before it joins.
    `http`: where it serves HTTP; told without its token."""
    return {
        "protocol": PROTOCOL_VERSION,
        "time_ms": wall_ms(),
        "coordinator": {"sent_bytes": dict(meter.sent), "received_bytes": dict(meter.received)},
        "disk_free_bytes": free_bytes(folder),
        "http": None if http is None else _told(http),
    }


def free_bytes(folder: Path) -> int | None:
    """Of its disk; None: it cannot be asked."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _told(http: HttpAddress) -> dict[str, Any]:
    """Whether it needs a token, and never the token itself."""
    return {"host": http.host, "port": http.port, "needs_token": http.token is not None}
