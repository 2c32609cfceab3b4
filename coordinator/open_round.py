"""The open round: offers in, and out comes which of them count.

`Rounds` decides; here are the offers themselves, their payloads, and what peers are told of both.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from .admission import AdmissionControl
from .announcer import Announcer
from .blobs import BlobStore
from .membership import Membership
from .observe.notices import Notices
from .protocol.figures import finite
from .protocol.messages import BadMessage, Offer, OfferEntry, Rejected
from .protocol.trust.signed_offers import work_of
from .retention import PayloadRetention
from .rounds import (
    Action,
    BytesArrived,
    Excused,
    OfferKept,
    OfferMade,
    OfferRefused,
    RoundClosed,
    RoundEvent,
    RoundOpened,
    Rounds,
)
from .trust.sentences import Sentences

log = logging.getLogger("thinwire.coordinator")


class OpenRound:
    """Of one run; when a round's record is sealed, the next one opens.

    `close` is called with what is to be proposed: its round's offers are taken with `offers.entries`, and
    then cleared.
    """

    def __init__(
        self,
        rounds: Rounds,
        offers: OpenOffers,
        admission: AdmissionControl,
        retention: PayloadRetention,
        members: Membership,
        announcer: Announcer,
        notices: Notices,
        sentences: Sentences,
        close: Callable[[RoundClosed, float], None],
    ) -> None:
        self.rounds, self.offers = rounds, offers
        self._admission, self._retention = admission, retention
        self._members, self._announcer, self._notices = members, announcer, notices
        self._sentences, self._close = sentences, close

    def offered(self, peer: int, offer: Offer, now_s: float) -> None:
        """Raises BadMessage for an offer that no node of ours makes."""
        made = self.offers.checked(peer, offer)
        if offer.digest is not None and self.offers.is_here(offer):
            self._retention.offered(offer.digest, self.rounds.round)
            self._retention.named(offer.digest)
        self.handle(made, now_s, offer)

    def blob_arrived(self, digest: bytes, now_s: float) -> None:
        """The blob is in the store: offers that name it become eligible, if they say its size and enough
        seats hold it."""
        for peer, offer in self.offers.of(digest):
            if self.offers.is_here(offer):
                self._retention.named(digest)
                self._announce(peer, offer)
            else:
                self._admission.rejected["size"] += 1
                self._notices.refused_offer(peer, "its blob is of another size than it says")
                self.handle(Excused(peer, self.rounds.round), now_s)
        self._retention.offered(digest, self.rounds.round)
        self.held_arrived(digest, now_s)

    def held_arrived(self, digest: bytes, now_s: float) -> None:
        """Enough seats may hold the blob by now: then offers that name it become eligible."""
        if self.offers.is_held(digest):
            self.handle(BytesArrived(digest), now_s)

    def handle(self, event: RoundEvent, now_s: float, offer: Offer | None = None) -> None:
        """`offer`: the one that the event is about."""
        self.act(self.rounds.handle(event, now_s), now_s, offer)

    def act(self, actions: Iterable[Action], now_s: float, offer: Offer | None = None) -> None:
        """Does what `Rounds` says."""
        for action in actions:
            match action:
                case RoundClosed():
                    self._close(action, now_s)
                case OfferRefused(peer, reason):
                    self._refused(peer, reason)
                case RoundOpened(round_, expected):
                    self._notices.round_opened(now_s)
                    log.debug("round %d is open for %d peers", round_, len(expected))
                case OfferKept(peer, is_new):
                    if is_new and offer is not None:
                        self.offers.keep(peer, offer)
                        self._announce(peer, offer)

    def _announce(self, peer: int, offer: Offer) -> None:
        """Others may fetch the offer's payload ahead, once it is here."""
        if offer.digest is not None and self.offers.is_here(offer):
            self._announcer.tell_offered(peer, offer, self._members)

    def _refused(self, peer: int, reason: Rejected) -> None:
        self._admission.rejected[reason] += 1
        self._notices.refused_offer(peer, reason)
        if reason == "changed_offer":
            self._notices.changed_offer(peer)
        elif reason == "condemned":
            self._sentences.refused(peer)


class OpenOffers:
    """Offers by the index of their peer. Which of them count, `Rounds` decides. `held`: see `Service`."""

    def __init__(self, blobs: BlobStore, admission: AdmissionControl, held: Callable[[bytes], bool]) -> None:
        self._blobs, self._admission, self._held = blobs, admission, held
        self._offers: dict[int, Offer] = {}

    def checked(self, peer: int, offer: Offer) -> OfferMade:
        """What `Rounds` is to know of an offer. Raises BadMessage for one that no node of ours makes."""
        digest = self._admission.check_offer(offer)
        stored = None if offer.digest is None else self._blobs.size(digest)
        if stored is not None and stored != offer.n_bytes:
            text = f"a blob of {stored} bytes offered as {offer.n_bytes}"
            raise self._admission.refused("size", BadMessage(text))
        has_bytes = offer.payload is not None or (stored is not None and self._held(digest))
        return OfferMade(peer, offer.round, digest, has_bytes, offer.n_samples)

    def keep(self, peer: int, offer: Offer) -> None:
        """The peer's offer of this round."""
        self._offers[peer] = offer

    def of(self, digest: bytes) -> list[tuple[int, Offer]]:
        """Peers that have offered this payload, and their offers."""
        return [(peer, offer) for peer, offer in self._offers.items() if offer.digest == digest]

    def is_held(self, digest: bytes) -> bool:
        """Whether the blob is in the store, and enough other seats have it, too."""
        return digest in self._blobs and self._held(digest)

    def is_here(self, offer: Offer) -> bool:
        """Whether the blob that the offer names is in the store, and of the size that it says."""
        return offer.digest is not None and self._blobs.size(offer.digest) == offer.n_bytes

    def fetchable(self) -> dict[int, Offer]:
        """Offers whose payload others may fetch ahead. Not before it is here: the line of the peer that made
        it is for the upload first, which the round waits for."""
        return {peer: offer for peer, offer in self._offers.items() if self.is_here(offer)}

    def entries(self, peers: Iterable[int]) -> tuple[OfferEntry, ...]:
        """The offers of these peers, in this order, as a commit carries them."""
        return tuple(_entry(peer, self._offers[peer]) for peer in peers)

    def work(self, peers: Iterable[int]) -> bytes:
        """The signatures of the offers of these peers, see `work_of`."""
        return work_of(self._offers[peer].signature for peer in peers)

    def clear(self) -> None:
        """The round has closed."""
        self._offers.clear()


def _entry(peer: int, offer: Offer) -> OfferEntry:
    return OfferEntry(
        peer=peer,
        n_samples=offer.n_samples,
        n_tokens=offer.n_tokens,
        loss=finite(offer.loss),
        n_bytes=offer.n_bytes,
        payload=offer.payload,
        digest=offer.digest,
        own_data=offer.own_data,
    )
