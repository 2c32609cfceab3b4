"""Payloads that the coordinator gives to nodes: by itself, so that they come with the commit and nobody asks.

`Offered` names who has a payload of the open round, and a node asks there: there and back. Where that would
be the coordinator, it sends the payload at once, as an upload to the node, and names the node itself.
"""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Final

from ..blobs import BlobStore
from ..protocol.messages import Offered
from ..seats.fetching import OpenStream
from ..seats.pushing import Pusher
from .passing_on import Stored

LAST: Final = 64


class HandingOut:
    """One event loop. `open_stream`: for blobs, to a node; `me`: the coordinator's peer id."""

    def __init__(self, blobs: BlobStore, open_stream: OpenStream, me: str) -> None:
        self._me = me
        self._pusher = Pusher(open_stream, lambda digest: Stored(blobs, digest), self._given, lambda *_: None)
        self._has: defaultdict[str, deque[bytes]] = defaultdict(lambda: deque(maxlen=LAST))
        """What was last sent to each node: the same payload again is there."""

    def offered(self, peer_id: str, offered: Offered) -> Offered:
        """What the node is told: that it gets the payload now, or whom to ask."""
        is_new = offered.holder == self._me and offered.digest not in self._has[peer_id]
        if not is_new or not self._pusher.push(peer_id, offered.digest):
            return offered
        return offered.model_copy(update={"holder": peer_id})

    def forget(self, peer_id: str) -> None:
        """Its session is over."""
        self._pusher.forget(peer_id)
        self._has.pop(peer_id, None)

    def _given(self, peer_id: str, digest: bytes) -> None:
        self._has[peer_id].append(digest)
