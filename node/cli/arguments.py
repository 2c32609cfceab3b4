"""What several commands read from their arguments: tickets, addresses, options of a run file."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...compression.errors import ConfigError

if TYPE_CHECKING:
    from ...coordinator.protocol.addresses import HttpAddress


def read_ticket(text: str) -> str:
    if text == "-":
        return sys.stdin.readline().strip()
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "not text"
        raise ConfigError(
            f"the ticket in {text[1:]}: {why}; thinwire coordinator --ticket-file writes one"
        ) from e


def http_address(text: str | None, token: str | None) -> HttpAddress | None:
    from ...coordinator.protocol.addresses import HttpAddress

    if text is None:
        if token is not None:
            raise ConfigError("--http-token protects what --http HOST:PORT serves: say that, too")
        return None
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"--http {text}: write it as HOST:PORT, for example 127.0.0.1:9100")
    return HttpAddress(host.strip("[]"), int(port), token or os.environ.get("THINWIRE_HTTP_TOKEN") or None)


def overrides_of(pairs: Sequence[str]) -> dict[str, Any]:
    from ..config import literal

    overrides = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or "." not in key:
            raise ConfigError(f"--set {pair}: write it as section.key=value, for example run.rounds=500")
        overrides[key] = literal(value)
    return overrides
