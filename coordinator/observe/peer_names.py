"""What a peer is called where people read of it: in the log and in notices, and on the page."""

from __future__ import annotations

from collections.abc import Callable

from ..protocol.figures import short


class PeerNames:
    """`peer_id` gives that of an index."""

    def __init__(self, peer_id: Callable[[int], str]) -> None:
        self._peer_id = peer_id

    def short(self, index: int) -> str:
        """For the log and notices: the peer id, or its beginning and its end."""
        return short(self._peer_id(index))

    def on_page(self, index: int) -> str:
        """As the page calls it, where every peer has its index."""
        return f"peer {index} …{self._peer_id(index)[-6:]}"
