"""What is done when a majority of a run's coordinators is lost for ever: the newest sealed records are taken
from whoever has them, and the recovery key names another committee upon these."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ...compression.errors import ConfigError
from ..ledger import Ledger
from ..protocol.messages import Commit, CommitteeEntry, SeatEntry, digest_of, encode_record
from ..protocol.trust.seals import Sealed
from ..serving.offerless import Last, offerless
from .recovery import raw_public


class Returns:
    """Takes commits that nodes have and this seat has not; see `adoption.Adopter`. `adopted`: is told when
    there are some."""

    def __init__(self, ledger: Ledger, adopted: Callable[[], object]) -> None:
        self._ledger, self._adopted = ledger, adopted
        self._n_adopted = 0

    @property
    def head(self) -> int:
        """The newest round here."""
        return self._ledger.head_round

    def hold(self) -> None:
        """No round closes here anyhow."""

    def adopt(self, commits: Sequence[Commit]) -> None:
        """All of them, or none. Raises BadMessage or LedgerCorrupt."""
        self._ledger.adopt(commits)
        self._n_adopted += len(commits)

    def go_on(self, now_s: float) -> None:
        """That were all."""
        n_adopted, self._n_adopted = self._n_adopted, 0
        if n_adopted:
            self._adopted()


def check_key(ledger: Ledger, key: Ed25519PrivateKey) -> None:
    """Raises ConfigError unless it is the run's recovery key."""
    if not ledger.recovery:
        raise ConfigError("this run has no recovery key: it has never had a committee")
    if digest_of(raw_public(key)) != ledger.recovery:
        raise ConfigError("this is not the run's recovery key: its first coordinator wrote it")


def recovery_record(ledger: Ledger, key: Ed25519PrivateKey, seats: Sequence[SeatEntry]) -> Sealed:
    """The record after the head: these seats order the run from the next round on. `key`: the recovery
    key."""
    entry = CommitteeEntry(seats=tuple(seats), need=len(seats) // 2 + 1, recovered_with=raw_public(key))
    record = encode_record(offerless(ledger, Last.of(ledger), committee=entry))
    return Sealed(record=record, seal=key.sign(record))
