"""Tells the nodes of a run who is there, and who has which payload of the open round."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from .protocol.messages import Member, Members, Message, Offer, Offered

Told = tuple[tuple[int, tuple[str, ...]], ...]
"""Peers and where each can be reached."""


class Announcer:
    """`send` queues a message for a peer id; `peer_id` gives that of an index."""

    def __init__(self, send: Callable[[str, Message], None], peer_id: Callable[[int], str]) -> None:
        self._send, self._peer_id = send, peer_id
        self.addresses: dict[int, tuple[str, ...]] = {}
        self._told: Told = ()
        self._untold: set[int] = set()
        self._newcomers: set[int] = set()

    def opened(self, peer: int, addresses: tuple[str, ...]) -> None:
        """A session was opened: it hears everything at the next `tell`."""
        self.addresses[peer] = addresses
        self._untold.add(peer)
        self._newcomers.add(peer)

    def tell(self, connected: Iterable[int], offers: Mapping[int, Offer]) -> None:
        """Members, to everybody when they change; and to whoever has come since also the offers so far."""
        present = tuple((peer, self.addresses[peer]) for peer in connected)
        if present != self._told:
            self._told = present
            self._untold.update(peer for peer, _ in present)
        if self._untold:
            self._tell_members(present)
        if self._newcomers:
            newcomers = [peer for peer, _ in present if peer in self._newcomers]
            for peer, offer in offers.items():
                self.tell_offered(peer, offer, newcomers)
            self._newcomers.clear()

    def tell_offered(self, peer: int, offer: Offer, to: Collection[int]) -> None:
        """Who has the payload of an offer, to the others: they may fetch it ahead."""
        if offer.digest is None:
            return
        holder = self._peer_id(peer)
        offered = Offered(round=offer.round, holder=holder, digest=offer.digest, n_bytes=offer.n_bytes)
        self.send(offered, [other for other in to if other != peer])

    def send(self, message: Message, to: Iterable[int]) -> None:
        """To the peers with these indices."""
        for peer in to:
            self._send(self._peer_id(peer), message)

    def _tell_members(self, present: Told) -> None:
        members = Members(
            members=tuple(
                Member(peer_id=self._peer_id(peer), addresses=addresses) for peer, addresses in present
            )
        )
        self.send(members, [peer for peer, _ in present if peer in self._untold])
        self._untold.clear()
