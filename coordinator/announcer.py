"""Tells the nodes of a run who is there, and who has which payload of the open round."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Final

from .membership import Membership
from .protocol.addresses import is_direct, is_public
from .protocol.messages import Member, Members, Message, Offer, Offered
from .serving.fanout import Fanout

FEW: Final = 32
"""Members that are told of every change at once."""

PAUSE_S: Final = 2e-3
"""For each of more members: what a thousand who come one after the other bring about is told together."""


class Announcer:
    """`send` queues a message for a peer id; `peer_id` gives that of an index. `own`: the coordinator's;
    `fanout` knows from whom a payload is to be fetched."""

    def __init__(
        self,
        send: Callable[[str, Message], None],
        peer_id: Callable[[int], str],
        own: str,
        fanout: Fanout,
    ) -> None:
        self._send, self._peer_id, self._own, self._fanout = send, peer_id, own, fanout
        self.addresses: dict[int, tuple[str, ...]] = {}
        self._direct: set[int] = set()
        self._public: set[int] = set()
        """Who has an address of its own; one that may be reached from anywhere."""
        self._told: dict[int, tuple[str, ...]] = {}
        """Peers and where each is reached, as all but the newcomers know."""
        self._n_changes = 0
        """Of the members, when they were told last."""
        self._newcomers: set[int] = set()
        self._not_before_s = 0.0
        self.next_s: float | None = None
        """When there will be something to tell; None: nothing is."""

    def opened(self, peer: int, addresses: tuple[str, ...]) -> None:
        """A session was opened: it hears everything at the next `tell`."""
        self.addresses[peer] = addresses
        direct = [address for address in addresses if is_direct(address)]
        for peers, belongs in ((self._direct, bool(direct)), (self._public, any(map(is_public, direct)))):
            (peers.add if belongs else peers.discard)(peer)
        self._newcomers.add(peer)

    def tell(self, members: Membership, offers: Callable[[], Mapping[int, Offer]], now_s: float) -> None:
        """What has changed of the members, to everybody; and to whoever has come since all of them, and the
        offers so far. Not before the last news are some time ago."""
        is_news = members.n_changes != self._n_changes or bool(self._newcomers)
        self.next_s = self._not_before_s if is_news and now_s < self._not_before_s else None
        if not is_news or self.next_s is not None:
            return
        self._n_changes = members.n_changes
        present = members.connected()
        newcomers = self._tell_members(present)
        self._not_before_s = now_s + (PAUSE_S * len(present) if len(present) > FEW else 0.0)
        if newcomers:
            for peer, offer in offers().items():
                self.tell_offered(peer, offer, members, newcomers)

    def tell_offered(
        self, peer: int, offer: Offer, members: Membership, to: Collection[int] | None = None
    ) -> None:
        """From whom each of the others may fetch the payload of an offer ahead. `to`: None: all that are
        here."""
        if offer.digest is None:
            return
        to = members.connected() if to is None else to
        training = members.training()
        origin, listening = self._peer_id(peer), {self._peer_id(p) for p in to}
        others = [self._peer_id(p) for p in dict.fromkeys((*training, *to)) if p != peer]
        relays = list(map(self._peer_id, self._reachable(training)))
        sources = self._fanout.sources(offer.n_bytes, origin, others, relays)
        said = {
            source: Offered(
                round=offer.round, holder=source or self._own, digest=offer.digest, n_bytes=offer.n_bytes
            )
            for source in set(sources.values())
        }
        told = {other: source for other, source in sources.items() if other in listening}
        from_peers = {o: source for o, source in told.items() if source}
        maker = origin if origin in relays else None
        self._fanout.deliveries.told(offer.digest, from_peers, offer.n_bytes, maker)
        for other, source in told.items():
            self._send(other, said[source])

    def _reachable(self, peers: Iterable[int]) -> list[int]:
        """Those that other members can dial: by a public address, where anybody has one."""
        there = list(peers)
        return [p for p in there if p in self._public] or [p for p in there if p in self._direct]

    def send(self, message: Message, to: Iterable[int]) -> None:
        """To the peers with these indices."""
        for peer in to:
            self._send(self._peer_id(peer), message)

    def _tell_members(self, present: list[int]) -> list[int]:
        """Returns the newcomers."""
        newcomers = [peer for peer in present if peer in self._newcomers]
        others = [peer for peer in present if peer not in self._newcomers]
        self._newcomers.clear()
        told, self._told = self._told, {peer: self.addresses[peer] for peer in present}
        came = [peer for peer in present if told.get(peer) != self.addresses[peer]]
        left = [peer for peer in told if peer not in self._told]
        is_much = bool(came or left) and 2 * (len(came) + len(left)) >= len(present)
        if newcomers or is_much:
            self.send(Members(members=self._entries(present)), present if is_much else newcomers)
        if (came or left) and not is_much:
            gone = tuple(map(self._peer_id, left))
            self.send(Members(members=self._entries(came), left=gone, is_change=True), others)
        return newcomers

    def _entries(self, peers: Iterable[int]) -> tuple[Member, ...]:
        return tuple(Member(peer_id=self._peer_id(p), addresses=self.addresses[p]) for p in peers)
