"""The offer of an open round: sent, and sent again after every break, until its round is over."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from statistics import median

from ...compression.errors import SwarmUnreachable
from ...coordinator.protocol.blob_streams import NotServed
from ...coordinator.protocol.messages import INLINE_BYTES, Digest, Offer, digest_of
from .blob_client import BlobClient
from .coordinator_session import CoordinatorSession
from .mailbox import Mailbox
from .payloads import Payloads

_MEASURED_UPLOADS = 8
_FIRST_RETRY_S, _LAST_RETRY_S = 0.3, 5.0


class OfferSender:
    """Has one offer at a time; a large payload goes as a blob of its own. One event loop.

    `uploads`: to the coordinator; `payloads`: where members find this node's own.
    """

    def __init__(
        self, coordinator: CoordinatorSession, uploads: BlobClient, payloads: Payloads, mailbox: Mailbox
    ) -> None:
        self._coordinator, self._uploads = coordinator, uploads
        self._payloads, self._mailbox = payloads, mailbox
        self._offer: Offer | None = None
        self._upload: asyncio.Task[None] | None = None
        self._sent: Digest | None = None
        """The payload that was last sent, or has begun to be."""
        self._upload_rates: deque[float] = deque(maxlen=_MEASURED_UPLOADS)
        self.upload_bytes_per_s: float | None = None
        """As payloads reached the coordinator: the median of the last ones; None: none has yet. Read from any
        thread."""
        self.payload_bytes = 0
        """Of all offers so far, each once."""

    @property
    def is_open(self) -> bool:
        """Whether there is an offer whose round has not been committed."""
        return self._offer is not None

    def make(self, offer: Offer, head_round: int) -> None:
        """`offer.payload` has the bytes; `head_round`: the last commit that this node has."""
        assert offer.payload is not None
        if offer.round < head_round:
            # Told to be far too late, so that its time is known; its payload is of use to nobody.
            self._coordinator.post(_without_payload(offer))
            return
        self._offer = offer
        self.payload_bytes += len(offer.payload)
        self.resend()

    def resend(self) -> None:
        """What is open goes out once more, its payload as well; nothing if there is nothing."""
        offer = self._offer
        if offer is None or offer.payload is None:
            return
        payload = offer.payload
        if len(payload) <= INLINE_BYTES:
            self._coordinator.post(offer)
            return
        digest = self._payloads.keep_own(offer.round, payload)
        self._coordinator.post(offer.model_copy(update={"payload": None, "digest": digest}))
        if self._upload is not None:
            self._upload.cancel()
        self._upload = asyncio.ensure_future(self._put(offer.round, digest, payload))

    def committed(self, round_: int) -> None:
        """Offers for this round and earlier ones are settled."""
        if self._offer is not None and self._offer.round <= round_:
            self._offer = None

    def drop(self) -> None:
        """The coordinator refuses it: it must not be sent again."""
        self._offer = None

    async def _put(self, round_: int, digest: Digest, payload: bytes) -> None:
        """Until the coordinator has it or the round is over; after a reconnect the offer is sent anew.

        What it refuses, for a full disk or quota, it may take a little later, and its round waits for it.
        """
        pause_s, refusals = _FIRST_RETRY_S, 0
        while self._offer is not None and self._offer.round == round_:
            began_s = time.monotonic()
            try:
                again, self._sent = self._sent == digest, digest
                await self._uploads.put(digest, payload, "payload", may_be_there=again)
            except NotServed as e:
                refusals += 1
                if refusals == 1:
                    text = f"the payload of round {round_} was not taken, trying again while it is open: {e}"
                    self._mailbox.put_event(text, True)
            except SwarmUnreachable:
                pass
            else:
                self._uploaded(len(payload), time.monotonic() - began_s)
                if refusals:
                    self._mailbox.put_event(f"the payload of round {round_} was taken now", False)
                return
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LAST_RETRY_S)
            await self._coordinator.is_up.wait()

    def _uploaded(self, n_bytes: int, took_s: float) -> None:
        self._upload_rates.append(n_bytes / max(took_s, 1e-6))
        self.upload_bytes_per_s = median(self._upload_rates)


def _without_payload(offer: Offer) -> Offer:
    """As it is sent when the payload goes another way, or nowhere."""
    assert offer.payload is not None
    if len(offer.payload) <= INLINE_BYTES:
        return offer
    return offer.model_copy(update={"payload": None, "digest": digest_of(offer.payload)})
