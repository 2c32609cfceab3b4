"""Payloads that the coordinator gives to nodes: by itself, so that they come with the commit and nobody asks.

`Offered` names who has a payload of the open round, and a node asks there: there and back. Where that would
be the coordinator, it sends the payload at once, as an upload to the node, and names the node itself.
"""

from __future__ import annotations

from ..blobs import BlobStore
from ..protocol.messages import Offered
from ..seats.fetching import OpenStream
from ..seats.pushing import Pusher
from .passing_on import Stored


class HandingOut:
    """One event loop. `open_stream`: for blobs, to a node; `me`: the coordinator's peer id."""

    def __init__(self, blobs: BlobStore, open_stream: OpenStream, me: str) -> None:
        self._me = me
        self._pusher = Pusher(
            open_stream, lambda digest: Stored(blobs, digest), lambda *_: None, lambda *_: None
        )

    def offered(self, peer_id: str, offered: Offered) -> Offered:
        """What the node is told: that it gets the payload now, or whom to ask."""
        if offered.holder != self._me or not self._pusher.push(peer_id, offered.digest):
            return offered
        return offered.model_copy(update={"holder": peer_id})

    def forget(self, peer_id: str) -> None:
        """Its session is over."""
        self._pusher.forget(peer_id)
