"""`NeighbourLink` of a link whose session lives in an event loop."""

from __future__ import annotations

from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ...compression.errors import ConfigError, SwarmUnreachable
from .base import EdgeBytes
from .pairs import pair_secret
from .streams import NeighbourStreams


class InLoop(Protocol):
    """How a thread talks with the loop."""

    def soon(self, work: Callable[[NeighbourStreams], object]) -> None:
        """Does it in the loop; does nothing where there is no session."""
        ...

    def wait(self, work: Callable[[NeighbourStreams], Coroutine[Any, Any, Any]]) -> Any:
        """The result of work in the loop. Raises SwarmUnreachable: the link is not open, or was closed."""
        ...

    def now(self) -> NeighbourStreams | None:
        """For what is read from any thread; None: there is no session."""
        ...


class RemoteNeighbours:
    """See `NeighbourLink`. `key`: None, peer ids are only names here."""

    def __init__(self, loop: InLoop, run_id: bytes, key: Ed25519PrivateKey | None) -> None:
        self._loop, self._run_id, self._key = loop, run_id, key
        self._secrets: dict[str, bytes] = {}

    def send(self, round_: int, to: Sequence[str], data: bytes) -> None:
        names = tuple(to)
        self._loop.soon(lambda streams: streams.send(round_, names, data))

    def received(self, round_: int, awaited: Collection[str], timeout_s: float) -> list[tuple[str, bytes]]:
        try:
            found: list[tuple[str, bytes]] = self._loop.wait(lambda s: s.received(round_, awaited, timeout_s))
        except SwarmUnreachable:
            return []
        return found

    def latest(self, timeout_s: float) -> list[tuple[int, bytes]]:
        try:
            found: list[tuple[int, bytes]] = self._loop.wait(lambda s: s.latest(timeout_s))
        except SwarmUnreachable:
            return []
        return found

    def secret(self, peer: str) -> bytes:
        if peer not in self._secrets:
            if self._key is None:
                raise ConfigError("privacy needs peers with keys: use join")
            self._secrets[peer] = pair_secret(self._key, peer, self._run_id)
        return self._secrets[peer]

    def edges(self) -> Mapping[str, EdgeBytes]:
        streams = self._loop.now()
        return {} if streams is None else dict(streams.edges)

    def carried(self) -> int:
        streams = self._loop.now()
        return 0 if streams is None else streams.carrying.n_bytes

    def rejected(self) -> Mapping[str, int]:
        streams = self._loop.now()
        return {} if streams is None else {str(why): n for why, n in streams.inbox.rejected.items()}
