"""What the coordinator lets in: protocol, heads, offers and uploads; and a count of the rest.

Every refusal is counted by a reason of a fixed, small set: the reasons become labels of a metric.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import TypeVar

from ..compression.errors import Incompatible, LedgerCorrupt
from .entry.gate import Gate
from .entry.rules import EntryRules
from .ledger import Ledger
from .protocol.chain import REPAIR_FORK
from .protocol.messages import (
    INLINE_BYTES,
    PROTOCOL_VERSION,
    AccessEntry,
    BadMessage,
    Hello,
    Offer,
    Rejected,
    digest_of,
)

UPLOADS_PER_ROUND = 4
"""Times `max_payload_bytes` that a peer may upload between two commits (offers are uploaded again after a
reconnect)."""

E = TypeVar("E", bound=Exception)


class AdmissionControl:
    """Of one run. `token`: that of its tickets; `banned`: peer ids. `rejected` counts by reason;
    `access`: see `Gate`."""

    def __init__(
        self,
        ledger: Ledger,
        token: str,
        banned: Iterable[str],
        rules: EntryRules,
        wall_ms: Callable[[], int],
        rejected: Counter[Rejected],
        access: AccessEntry | None = None,
    ) -> None:
        self._ledger = ledger
        self._limits = ledger.genesis.limits
        self._uploaded_bytes: Counter[int] = Counter()
        self.rejected = rejected
        self.gate = Gate(ledger, token, banned, rules, wall_ms, self.rejected, access)

    def refused(self, reason: Rejected, error: E) -> E:
        """Counts the reason; the caller raises what it gets back."""
        self.rejected[reason] += 1
        return error

    def check_hello(self, peer_id: str, hello: Hello) -> str:
        """Returns the invitation that lets the peer in, see `Gate.check`. Raises ConfigError (not let in) or
        Incompatible (version, run)."""
        invitation = self.gate.check(peer_id, hello.token)
        if hello.version != PROTOCOL_VERSION:
            text = f"protocol version {hello.version} here, {PROTOCOL_VERSION} at the coordinator"
            raise self.refused("version", Incompatible(f"{text}: install the same thinwire"))
        ours = self._ledger.run_id
        if hello.run_id != ours:
            text = f"the ticket is for run {hello.run_id.hex()[:16]}, this is run {ours.hex()[:16]}"
            raise self.refused("run", Incompatible(f"{text}: ask for a new ticket"))
        return invitation

    def check_head(self, hello: Hello) -> None:
        """Raises LedgerCorrupt: the node's head is not on the chain."""
        if hello.head_round is None:
            return
        ours = self._ledger.digest_at(hello.head_round)
        if ours is not None and ours == hello.head_digest:
            return
        text = f"the node's round {hello.head_round} is not on the coordinator's ledger"
        if ours is None:
            text += f", which ends with round {self._ledger.head_round}: was it restored from an older copy?"
        else:
            text += f", where another record has its place. {REPAIR_FORK}"
        raise self.refused("head", LedgerCorrupt(text))

    def has_room(self, n_present: int) -> bool:
        """Whether a peer that is not present yet may come in."""
        return n_present < self._limits.max_peers

    def full(self, n_present: int) -> Incompatible:
        """For the caller to raise."""
        text = f"the swarm is full: {n_present} of {self._limits.max_peers} peers are there"
        return self.refused("full", Incompatible(text))

    def check_offer(self, offer: Offer) -> bytes:
        """Returns the payload's digest. Raises BadMessage for an offer that no node of ours makes."""
        limits = self._limits
        if offer.n_bytes > limits.max_payload_bytes:
            text = f"a payload of {offer.n_bytes} bytes, the run allows {limits.max_payload_bytes}"
            raise self.refused("oversized", BadMessage(text))
        if offer.n_samples == 0 and (offer.n_bytes or offer.n_tokens or offer.loss is not None):
            raise self.refused("samples", BadMessage("an offer without samples that has something to say"))
        if offer.n_samples > limits.max_samples:
            text = f"{offer.n_samples} samples in an offer, the run allows {limits.max_samples}"
            raise self.refused("samples", BadMessage(text))
        match offer.payload, offer.digest:
            case None, bytes(digest):
                return digest
            case bytes(payload), None:
                if len(payload) > INLINE_BYTES or len(payload) != offer.n_bytes:
                    text = f"{len(payload)} bytes inside of an offer that says {offer.n_bytes}"
                    raise self.refused("size", BadMessage(text))
                return digest_of(payload)
            case _:
                raise self.refused("offer", BadMessage("an offer has either a payload or a digest"))

    def check_upload(self, peer: int, n_bytes: int) -> None:
        """Before a peer uploads a blob. Raises BadMessage: too large, too much since the last commit."""
        most = self._limits.max_payload_bytes
        if n_bytes > most:
            text = f"a payload of {n_bytes} bytes, the run allows {most}"
            raise self.refused("oversized", BadMessage(text))
        if self._uploaded_bytes[peer] + n_bytes > UPLOADS_PER_ROUND * most:
            text = f"{self._uploaded_bytes[peer]} bytes uploaded since the last commit, and {n_bytes} more"
            raise self.refused("quota", BadMessage(text))
        self._uploaded_bytes[peer] += n_bytes

    def give_back(self, peer: int, n_bytes: int) -> None:
        """What `check_upload` let in was not stored, and not for a fault of the peer's."""
        self._uploaded_bytes[peer] -= n_bytes

    def new_round(self) -> None:
        """Everybody may upload again."""
        self._uploaded_bytes.clear()
