"""Who may come into a run: `[admission]` of the run file, an operator's choice for the next start.

It stands in the state folder and not in the ledger, so a restart with another run file changes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal, Self, get_args

from ...compression.errors import ConfigError
from ..protocol.identity import public_key_of

Mode = Literal["open", "invited", "listed"]
MAX_BYTES: Final = 2**20


@dataclass(frozen=True, slots=True)
class EntryRules:
    """`open`: whoever shows the token of the run's tickets, or an invitation; `invited`: an invitation;
    `listed`: the identities `peers`, which need to show nothing, and nobody else."""

    mode: Mode = "open"
    peers: frozenset[str] = frozenset()

    @classmethod
    def of(cls, mode: str, peers: Iterable[str]) -> Self:
        """Raises ConfigError."""
        found = next((known for known in get_args(Mode) if known == mode), None)
        if found is None:
            raise ConfigError(f"admission.mode: {mode!r} is none of {', '.join(get_args(Mode))}")
        listed = frozenset(peers)
        for peer_id in listed:
            public_key_of(peer_id)
        return cls(found, listed)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """What `to_bytes` gave. Raises ConfigError."""
        try:
            found: Any = json.loads(data)
            mode, peers = found["mode"], found["peers"]
            if isinstance(mode, str) and isinstance(peers, list) and all(isinstance(p, str) for p in peers):
                return cls.of(mode, peers)
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        raise ConfigError("the rules of admission cannot be read")

    def to_bytes(self) -> bytes:
        """As the state folder keeps them."""
        return json.dumps({"mode": self.mode, "peers": sorted(self.peers)}).encode()


OPEN: Final = EntryRules()
