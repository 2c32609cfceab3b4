"""How a service has its records ordered: alone, or by a committee. The contract, and the plain one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ..ledger import Ledger
from ..protocol.identity import peer_id_of
from ..protocol.messages import Commit, CommitBody

OnSealed = Callable[[Commit, float], None]
"""Takes the record that was proposed, once it is sealed and on the disk, and the time, in monotonic
seconds."""


class Log(Protocol):
    """Of the seat that leads. One record is open at a time."""

    on_sealed: OnSealed
    """Set by the service, before it proposes."""

    @property
    def is_over(self) -> bool:
        """Whether the reign has ended: nothing is proposed any more."""
        ...

    @property
    def resting(self) -> Mapping[str, bytes]:
        """Seats that are up to date and have lost their votes, and the nonces that a record would have to
        name."""
        ...

    def propose(self, body: CommitBody, work: bytes, now_s: float) -> None:
        """The record after the head, and the signatures that it names. `on_sealed` is called, now or later,
        or this seat's reign ends: what becomes of the record then is not known here."""
        ...


class Alone:
    """A committee of one: its signature is the seal. Raises sqlite3.Error."""

    on_sealed: OnSealed

    def __init__(self, ledger: Ledger, key: Ed25519PrivateKey) -> None:
        self._ledger, self._key = ledger, key
        self._me = peer_id_of(key.public_key())

    @property
    def is_over(self) -> bool:
        """See `Log.is_over`: once a record names others, too."""
        return not self._ledger.committee.is_only(self._me)

    @property
    def resting(self) -> Mapping[str, bytes]:
        """See `Log.resting`: nobody votes."""
        return {}

    def propose(self, body: CommitBody, work: bytes, now_s: float) -> None:
        """See `Log.propose`; sealed when this returns."""
        self.on_sealed(self._ledger.append(body, self._key, work), now_s)
