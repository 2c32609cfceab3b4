"""Coordinators of one run that are seats of a committee, and peers that offer, all in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from tests.support.committee import KEYS, RECOVERY_KEY, SEATS, Sealing, entry, raw_public
from tests.support.loop_transport import LoopTransport, Network
from thinwire.compression.errors import SwarmUnreachable
from thinwire.coordinator.ledger import Ledger
from thinwire.coordinator.protocol.blob_streams import put_blob
from thinwire.coordinator.protocol.identity import new_key, peer_id_of, save
from thinwire.coordinator.protocol.messages import (
    INLINE_BYTES,
    PROTOCOL_VERSION,
    Commit,
    Elsewhere,
    Follow,
    GenesisBody,
    Hello,
    NodeState,
    Offer,
    Refused,
    State,
    Welcome,
    digest_of,
)
from thinwire.coordinator.protocol.streams import BLOB, FROM_COORDINATOR, SESSION, Meter, Stream
from thinwire.coordinator.protocol.trust.signed_offers import signed
from thinwire.coordinator.quorum.events import Timing
from thinwire.coordinator.seats.beginning import begin
from thinwire.coordinator.seats.plan import SeatPlan
from thinwire.coordinator.seats.ticket import SeatTicket, keep_ticket
from thinwire.coordinator.seats.votes import Votes
from thinwire.coordinator.server import CoordinatorServer
from thinwire.coordinator.state import VOTE_NAME, StateDir

QUICK = Timing(beat_s=0.05, patience_s=0.3, retry_s=0.1)


async def until(condition: Callable[[], Any], timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


class SeatWorld:
    """`servers`: those that run, by the number of their key."""

    def __init__(self, path: Path, genesis: GenesisBody) -> None:
        self.path, self.network = path, Network()
        recovery = digest_of(raw_public(RECOVERY_KEY))
        self.genesis = genesis.model_copy(update={"coordinator": SEATS[0], "recovery": recovery})
        self.sealing = Sealing(self.genesis)
        self.servers: dict[int, CoordinatorServer] = {}
        self._states: dict[int, StateDir] = {}

    def named(self, *numbers: int) -> None:
        """Folders of these seats, whose ledgers have one record: it names them."""
        sealed = self.sealing.add(self.sealing.governing(committee=entry(numbers)))
        for n in numbers:
            folder = self.folder(n)
            ledger = Ledger.begin(
                folder / "ledger.db", self.sealing.genesis_record, self.sealing.genesis_signature
            )
            ledger.take(sealed)
            ledger.close()
            Votes(folder / VOTE_NAME, self.sealing.run_id, SEATS[n]).wake()
            ticket = SeatTicket(
                run_id=self.sealing.run_id, secret=b"s" * 32, token="secret", seats=entry(numbers).seats
            )
            keep_ticket(folder, ticket)

    async def found(self) -> None:
        """The run begins: the founder orders it alone."""
        folder = self.folder(0)
        Ledger.create(folder / "ledger.db", self.genesis, KEYS[0]).close()
        self._states[0] = StateDir(folder)
        server = CoordinatorServer(self._states[0], port=4001, start_transport=self.network.start)
        self.servers[0] = server
        await server.start()

    async def join(self, n: int, **plan: Any) -> None:
        """A seat begins with nothing but the seat ticket that some other one has written."""
        tickets = (server.seat_ticket for server in self.servers.values())
        ticket = next(path for path in tickets if path is not None)
        await until(ticket.exists)
        with StateDir(self.path / str(n)) as state:
            key = KEYS[n]
            state.save_token("secret")
            keep_ticket(state.path, SeatTicket.read(str(ticket)))
            await begin(
                state.ledger_path,
                SeatTicket.read(str(ticket)),
                key,
                self.network.start,
                host="",
                port=0,
                announce=(),
            )
            save(key, state.key_path)
            Votes(state.path / VOTE_NAME, self.sealing.run_id, SEATS[n]).wake()
        await self.start(n, **plan)

    def folder(self, n: int) -> Path:
        folder = self.path / str(n)
        if not folder.exists():
            folder.mkdir()
            save(KEYS[n], folder / "key")
            (folder / "token").write_text("secret")
        return folder

    async def start(self, n: int, **plan: Any) -> CoordinatorServer:
        seats = replace(SeatPlan.of(self.folder(n)), timing=QUICK, **plan)
        self._states[n] = StateDir(self.folder(n))
        server = CoordinatorServer(
            self._states[n], seats=seats, port=4001 + n, start_transport=self.network.start
        )
        self.servers[n] = server
        await server.start()
        return server

    async def stop(self, n: int) -> None:
        await self.servers.pop(n).stop()
        self._states.pop(n).close()

    async def kill(self, n: int) -> None:
        """Nobody hears of it first; what is on the disk is left."""
        server = self.servers.pop(n)
        await self.network.transports[SEATS[n]].close()
        await server.stop()
        self._states.pop(n).close()

    @property
    def leader(self) -> int | None:
        return next((n for n, server in self.servers.items() if server.reign is not None), None)

    async def led(self) -> int:
        """Who leads, once somebody does."""
        await until(lambda: self.leader is not None)
        assert self.leader is not None
        return self.leader

    def heads(self) -> list[int]:
        return [server.head for server in self.servers.values()]

    def records(self, n: int) -> list[bytes]:
        return [commit.digest for commit in self.servers[n].ledger.all_commits()]

    async def close(self) -> None:
        for n in list(self.servers):
            await self.stop(n)


class Peer:
    """Offers in every round, to whoever leads; keeps the commits that it has seen."""

    def __init__(self, world: SeatWorld, payload_bytes: int = 10) -> None:
        self.world, self.payload_bytes = world, payload_bytes
        self.key = new_key()
        self.peer_id = peer_id_of(self.key.public_key())
        self.commits: list[Commit] = []
        self.told: list[Elsewhere] = []
        self._transport: LoopTransport | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Peer:
        self._transport = await self.world.network.start(self.key)
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        assert self._transport is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self._transport.close()

    async def _run(self) -> None:
        leader: str | None = None
        for i in count():
            known = [SEATS[n] for n in self.world.servers]
            seat = leader if leader in known else known[i % len(known)] if known else None
            leader = None
            if seat is not None:
                with contextlib.suppress(OSError, EOFError, SwarmUnreachable, TimeoutError):
                    leader = await self._session(seat)
            await asyncio.sleep(0.1)

    async def _session(self, seat: str) -> str | None:
        """Until it breaks; returns who leads, if this one does not."""
        assert self._transport is not None
        stream = Stream(*await self._transport.open_stream(seat, SESSION), Meter())
        try:
            await stream.send_message(self._hello())
            answer = await stream.receive_message(FROM_COORDINATOR)
            if isinstance(answer, Follow):
                for commit in self.commits[answer.after :]:
                    await stream.send_message(commit)
                answer = await stream.receive_message(FROM_COORDINATOR)
            if isinstance(answer, Elsewhere):
                self.told.append(answer)
                return answer.leader
            if not isinstance(answer, Welcome):
                raise EOFError(str(answer))
            await stream.send_message(State(state=NodeState.TRAINING))
            await stream.send_message(Follow(after=len(self.commits)))
            await self._offer(stream, seat)
            while True:
                message = await stream.receive_message(FROM_COORDINATOR)
                if isinstance(message, Commit):
                    self._take(message)
                    await self._offer(stream, seat)
                elif isinstance(message, Elsewhere):
                    return message.leader
                elif isinstance(message, Refused):
                    return None
        finally:
            stream.abort()

    def _take(self, commit: Commit) -> None:
        if commit.body.round == len(self.commits) + 1:
            parent = self.commits[-1].digest if self.commits else self.world.sealing.run_id
            assert commit.body.parent == parent, "a fork"
            self.commits.append(commit)

    async def _offer(self, stream: Stream, seat: str) -> None:
        round_ = len(self.commits) + 1
        data = f"{self.peer_id} {round_}".encode().ljust(self.payload_bytes, b".")
        is_inline = len(data) <= INLINE_BYTES
        if not is_inline:
            assert self._transport is not None
            blobs = Stream(*await self._transport.open_stream(seat, BLOB), Meter())
            await put_blob(blobs, digest_of(data), data, "payload")
            blobs.abort()
        offer = Offer(
            round=round_,
            n_samples=4,
            n_tokens=64,
            loss=1.5,
            n_bytes=len(data),
            payload=data if is_inline else None,
            digest=None if is_inline else digest_of(data),
        )
        await stream.send_message(signed(offer, self.world.sealing.run_id, self.key))

    def _hello(self) -> Hello:
        head = self.commits[-1] if self.commits else None
        return Hello(
            version=PROTOCOL_VERSION,
            run_id=self.world.sealing.run_id,
            token="secret",
            head_round=None if head is None else head.body.round,
            head_digest=None if head is None else head.digest,
            addresses=("/ip4/127.0.0.1/tcp/1",),
            agent="test",
        )
