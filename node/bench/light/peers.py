"""The process of some light peers: they say what nodes say, sign 16 random bytes for every round, and read no
more of what comes than its kind and round."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import struct
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgpack
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ....coordinator.protocol.identity import new_key, peer_id_of
from ....coordinator.protocol.messages import (
    PROTOCOL_VERSION,
    Commit,
    Follow,
    Heartbeat,
    Hello,
    Message,
    NodeState,
    Offer,
    Refused,
    State,
    Welcome,
    encode_message,
)
from ....coordinator.protocol.streams import HEADER, SESSION, FrameKind
from ....coordinator.protocol.ticket import Ticket
from ....coordinator.protocol.trust.signed_offers import signed
from ...system.output import to_stdout

PAYLOAD_BYTES: Final = 16
FIRST_RETRY_S, LAST_RETRY_S = 0.25, 4.0
BEAT_S: Final = 1.0


class LightPeer(asyncio.Protocol):
    """One peer, over as many sessions as it takes. `n_lost`: sessions that ended after their Welcome."""

    def __init__(self, socket: Path, ticket: Ticket, n_rounds: int, seed: int) -> None:
        self._socket, self._ticket, self._n_rounds = socket, ticket, n_rounds
        self._key: Ed25519PrivateKey = new_key()
        self._peer_id = peer_id_of(self._key.public_key())
        self._random = random.Random(seed)
        self._transport: Any = None
        self._data = bytearray()
        self._closed = asyncio.Event()
        self._is_open = False
        self.round = 0
        self.n_lost = self.n_refused = 0
        self.refusal = ""
        self.received_bytes = 0

    async def run(self) -> None:
        """Until the last round is committed."""
        retry_s = FIRST_RETRY_S
        while self.round < self._n_rounds:
            self._closed.clear()
            try:
                await asyncio.get_running_loop().create_unix_connection(lambda: self, str(self._socket))
                await self._session()
            except OSError:
                self.n_refused += 1
            if self.round < self._n_rounds:
                self.n_lost += self._is_open
                self.n_refused += not self._is_open
                await asyncio.sleep(retry_s * self._random.uniform(0.7, 1.3))
                retry_s = min(2 * retry_s, LAST_RETRY_S)
            self._is_open = False

    async def _session(self) -> None:
        while not self._closed.is_set() and self.round < self._n_rounds:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BEAT_S):
                    await self._closed.wait()
            if self._is_open:
                beat = Heartbeat(round=self.round, sent_bytes=0, received_bytes=0, payload_bytes=0)
                self._send(beat)
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self._data = transport, bytearray()
        self._transport.write(f"{self._peer_id} {SESSION}\n".encode())
        self._send(
            Hello(
                version=PROTOCOL_VERSION,
                run_id=self._ticket.run_id,
                token=self._ticket.token,
                head_round=None,
                head_digest=None,
                addresses=("/ip4/192.0.2.1/tcp/40000",),
                agent="thinwire bench",
            )
        )

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed.set()

    def data_received(self, data: bytes) -> None:
        self.received_bytes += len(data)
        self._data += data
        at = 0
        while len(self._data) - at >= HEADER.size:
            n_bytes, _ = HEADER.unpack_from(self._data, at)
            if len(self._data) - at < HEADER.size + n_bytes:
                break
            self._heard(at + HEADER.size, n_bytes)
            at += HEADER.size + n_bytes
        del self._data[:at]

    def _heard(self, at: int, n_bytes: int) -> None:
        """A message is a list that begins with its tag."""
        tag = self._data[at + 1]
        if tag == Welcome.tag:
            self._is_open = True
            self._send(Follow(after=self.round))
            self._send(State(state=NodeState.TRAINING))
            self._offer(self.round + 1)
        elif tag == Commit.tag:
            self.round = max(self.round, _round_in(self._data, at))
            if self.round < self._n_rounds:
                self._offer(self.round + 1)
            else:
                self._closed.set()
        elif tag == Refused.tag:
            self.refusal = str(msgpack.unpackb(bytes(self._data[at : at + n_bytes])))[:200]

    def _offer(self, round_: int) -> None:
        offer = Offer(
            round=round_,
            n_samples=1,
            n_tokens=1,
            loss=self._random.random(),
            n_bytes=PAYLOAD_BYTES,
            payload=self._random.randbytes(PAYLOAD_BYTES),
            digest=None,
        )
        self._send(signed(offer, self._ticket.run_id, self._key))

    def _send(self, message: Message) -> None:
        body = encode_message(message)
        self._transport.write(HEADER.pack(len(body), FrameKind.MESSAGE) + body)


def _round_in(data: bytearray, at: int) -> int:
    """Of the commit whose message begins there: the first field of the record, which is its first field."""
    start = at + 2 + {0xC4: 2, 0xC5: 3, 0xC6: 5}[data[at + 2]] + 1
    kind = data[start]
    if kind < 0x80:
        return kind
    unpack = {0xCC: ">B", 0xCD: ">H", 0xCE: ">I"}[kind]
    (found,) = struct.unpack_from(unpack, data, start + 1)
    return int(found)


async def swarm(folder: Path, socket: Path, n_peers: int, n_rounds: int, seed: int) -> dict[str, Any]:
    """Runs them, all from the beginning."""
    ticket_path = folder / "ticket"
    while not ticket_path.exists() or not (line := ticket_path.read_text()):
        await asyncio.sleep(0.01)
    ticket = Ticket.parse(line)
    peers = [LightPeer(socket, ticket, n_rounds, seed * 10_000 + i) for i in range(n_peers)]
    await asyncio.gather(*(peer.run() for peer in peers))
    return {
        "cpu_s": time.process_time(),
        "lost": sum(peer.n_lost for peer in peers),
        "refused": sum(peer.n_refused for peer in peers),
        "refusals": sorted({peer.refusal for peer in peers} - {""})[:3],
        "received_bytes": sum(peer.received_bytes for peer in peers),
    }


def main() -> None:
    """`python -m thinwire.node.bench.light.peers FOLDER SOCKET PEERS ROUNDS SEED`."""
    folder, socket, *numbers = sys.argv[1:]
    run = partial(swarm, Path(folder), Path(socket), *map(int, numbers))
    to_stdout(json.dumps(asyncio.run(run())))


if __name__ == "__main__":
    main()
