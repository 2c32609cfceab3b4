"""What a coordinator does as one seat of several: it leads a reign with a service, or follows without one."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ...compression.errors import ConfigError
from ..blobs import BlobStore
from ..ledger import Ledger
from ..observe.run_view import RunView
from ..protocol.figures import wall_ms
from ..protocol.messages import CommitteeEntry, SeatEntry
from ..protocol.settings import Keep
from ..protocol.streams import Meter
from ..quorum.checking import RecordChecks
from ..quorum.log import Log
from ..quorum.recollection import Recollection
from ..quorum.replicated import Replicated
from ..service import Service
from ..serving.parts import FAREWELL_S
from ..state import StateDir
from .driving.council import Council
from .plan import SeatPlan
from .recovery import recovery_digest
from .ticket import SeatTicket
from .view import Beginning, status_of, view_of
from .watchers import WhoLeads

log = logging.getLogger("thinwire.coordinator")


class Reigns(Protocol):
    """A server that has a service while its seat leads."""

    @property
    def reign(self) -> Service | None:
        """The service of who leads; None: this one follows."""
        ...

    def begin_reign(self, order: Log, recollection: Recollection, held: Callable[[bytes], bool]) -> None:
        """Serves the run with a new service."""
        ...

    def end_reign(self, why: str) -> None:
        """Drops the service as a whole, and tells nodes to come to whoever leads now."""
        ...

    def followed(self, round_: int) -> None:
        """A record is on the disk that another seat has proposed."""
        ...

    def renewed(self) -> None:
        """There is another committee, or who may come in has changed."""
        ...


class Hosting:
    """Of one server; see `driving.owner.Owner`. `council` drives the seat. Raises ConfigError or OSError."""

    def __init__(
        self,
        server: Reigns,
        state: StateDir,
        ledger: Ledger,
        key: Ed25519PrivateKey,
        blobs: BlobStore,
        who: WhoLeads,
        meter: Meter,
        plan: SeatPlan,
        keep: Keep,
    ) -> None:
        self._server, self._state, self._ledger, self._blobs, self._keep = server, state, ledger, blobs, keep
        self._recollection: Recollection | None = None
        self._checks: RecordChecks | None = None
        self._needs_payloads = plan.waits_for_payloads
        self._log: Replicated | None = None
        self._over_s: float | None = None
        self.council = Council(
            state.path,
            ledger,
            key,
            blobs,
            self,
            self,
            who,
            meter,
            plan,
            is_new=state.is_new,
            rng=random.Random(),
        )
        self._recollect()

    # --------------------------------------------------------------------------------- `quorum.disk.Records`

    place = staticmethod(RecordChecks.place)

    def may_vote(self, record: bytes, work: bytes) -> bool:
        return self._checks is not None and self._checks.may_vote(record, work)

    # ----------------------------------------------------------------------------- `driving.owner.Owner`

    def leads(self) -> None:
        """See `driving.owner.Owner`, here and below."""
        self._recollect()
        if self._recollection is None or self._checks is None:
            raise ConfigError("it has not got all that the run needs")
        self._recollection.catch_up()
        self._log = Replicated(self.council.seat, self._ledger, self._checks)
        log.info("this coordinator leads now")
        self._server.begin_reign(self._log, self._recollection, self.council.held)

    def steps_down(self, why: str) -> None:
        log.warning("this coordinator does not lead any more: %s", why)
        self._log, memory = None, self.memory()
        self._server.end_reign(why)
        if self._recollection is not None and memory:
            self._recollection.reign_ended(memory)

    def recorded(self, round_: int) -> None:
        if self._log is not None:
            now_s = time.monotonic()
            self.council.telling.observed.sealed(now_s - self._log.proposed_s)
            self._log.new_record(round_, now_s)
            return
        if self._recollection is not None:
            self._recollection.catch_up()
        self._server.followed(round_)

    def renewed(self) -> None:
        self._server.renewed()

    def held(self, digest: bytes) -> None:
        if self._server.reign is not None:
            self._server.reign.held_arrived(digest, time.monotonic())

    def arrived(self, digest: bytes) -> None:
        if self._recollection is None:
            self._recollect()
        if self._recollection is not None:
            self._recollection.payload_arrived(digest)

    def missing(self) -> Mapping[bytes, int]:
        return {} if self._recollection is None else self._recollection.missing_payloads()

    def has_room(self, n_bytes: int) -> bool:
        return self._recollection is None or self._recollection.has_room(n_bytes)

    def is_ready(self) -> bool:
        return self._recollection is not None

    def kept_from(self) -> int:
        return 0 if self._recollection is None else self._recollection.derived.retention.kept_from

    def name_committee(self, entry: CommitteeEntry) -> None:
        if self._server.reign is not None:
            try:
                self._server.reign.name_committee(entry, time.monotonic())
            except ConfigError as e:
                log.error("another committee cannot be named: %s", e)

    def memory(self) -> bytes:
        return b"" if self._server.reign is None else self._server.reign.memory()

    def remember(self, packed: bytes) -> None:
        if self._recollection is not None:
            self._recollection.remember(packed)

    def verify(self, record: bytes, work: bytes) -> Awaitable[None] | None:
        if self._checks is None or not self._checks.is_slow(work):
            return None
        return asyncio.to_thread(self._checks.verify, record, work)

    def recovery(self) -> bytes:
        return b"" if self._ledger.recovery else recovery_digest(self._state.path)

    # ------------------------------------------------------------------------------------- for the server

    def settled(self) -> bool:
        """What the service has proposed takes its course. False: the reign is over."""
        self.council.settle()
        return self._server.reign is not None

    def adopted(self) -> None:
        """Nodes have given back rounds that were lost here."""
        if self._recollection is not None:
            self._recollection.catch_up()
        self.council.adopted()

    @property
    def here(self) -> SeatEntry:
        """This seat, as a record names it."""
        return SeatEntry(peer_id=self.council.me, addresses=self.council.addresses())

    def places(self, ours: SeatEntry) -> Sequence[SeatEntry]:
        """The seats of the committee as a ticket names them: `ours` first, or whoever leads."""
        seats = [seat for seat in self.council.seats() if seat.addresses]
        first = ours.peer_id if self.council.is_seat else self.council.seat.leader
        seats.sort(key=lambda seat: seat.peer_id != first)
        return [ours, *seats[1:]] if self.council.is_seat else seats or [ours]

    @property
    def is_over(self) -> bool:
        """The last round is here."""
        recollection = self._recollection
        return recollection is not None and recollection.derived.course.run.is_over(self._ledger.head_round)

    @property
    def may_go(self) -> bool:
        """Whether nobody needs this seat for the run's last words."""
        if not self.is_over:
            self._over_s = None
            return False
        now_s = time.monotonic()
        self._over_s = now_s if self._over_s is None else self._over_s
        return self.council.seat.leader is None or now_s > self._over_s + FAREWELL_S

    def status(self) -> dict[str, Any]:
        """JSON-able."""
        refused = {} if self._checks is None else dict(self._checks.refused)
        return {**status_of(self.council), "refused": refused}

    def ticket(self, token: str) -> SeatTicket:
        """For another machine that is to be a seat."""
        council = self.council
        places = [seat for seat in council.seats() if seat.addresses]
        return SeatTicket(
            run_id=self._ledger.run_id, secret=council.plan.secret, token=token, seats=tuple(places)
        )

    def view(self) -> RunView | Beginning:
        """How people see the run from a seat that does not lead it."""
        if self._recollection is None:
            return Beginning(self._ledger)
        return view_of(self._ledger, self._blobs, self._recollection, self._state)

    def _recollect(self) -> None:
        """Reads the ledger, once all is here that a run needs."""
        genesis = self._ledger.genesis
        blobs = [blob for blob in (genesis.base, genesis.held_out, genesis.corpus) if blob is not None]
        if self._recollection is None and all(blob.digest in self._blobs for blob in blobs):
            history = self._state.history()
            self._recollection = Recollection(self._ledger, self._blobs, self._keep, history)
            self._checks = RecordChecks(
                self._ledger, self._blobs, self._recollection, wall_ms, needs_payloads=self._needs_payloads
            )
