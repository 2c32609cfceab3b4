"""A coordinator's service without a network, whose clock the test moves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from thinwire.coordinator.blobs import BlobStore
from thinwire.coordinator.ledger import Ledger
from thinwire.coordinator.protocol.messages import (
    INLINE_BYTES,
    PROTOCOL_VERSION,
    GenesisBody,
    Heartbeat,
    Hello,
    Message,
    NodeState,
    Offer,
    Report,
    State,
    Welcome,
    digest_of,
)
from thinwire.coordinator.service import Service


class World:
    """A service with its ledger and blobs, a clock, and peers that are known by their names."""

    def __init__(self, path: Path, genesis: GenesisBody, key: Ed25519PrivateKey) -> None:
        self.path, self.key = path, key
        self.now_s = 100.0
        self.wall_ms = 123
        self.sent: list[tuple[str, Message]] = []
        self.committed: list[int] = []
        self.ended: list[tuple[str, str]] = []
        self.sessions: dict[str, int] = {}
        self.ledger = Ledger.create(path / "ledger.db", genesis, key)
        self.start()

    def start(self, **options: Any) -> None:
        self.blobs = BlobStore(self.path / "blobs")
        self.service = Service(
            ledger=self.ledger,
            blobs=self.blobs,
            key=self.key,
            token="secret",
            send=lambda peer, message: self.sent.append((peer, message)),
            on_commit=self.committed.append,
            end=lambda peer, why: self.ended.append((peer, str(why))),
            now_s=self.now_s,
            wall_ms=lambda: self.wall_ms,
            **options,
        )

    def restart(self, **options: Any) -> None:
        """As after a crash: what is on the disk, nothing else."""
        self.ledger.close()
        self.ledger = Ledger.open(self.path / "ledger.db", self.key.public_key())
        self.start(**options)

    def hello(self, **changes: Any) -> Hello:
        hello = Hello(
            version=PROTOCOL_VERSION,
            run_id=self.ledger.run_id,
            token="secret",
            head_round=None,
            head_digest=None,
            addresses=("/ip4/127.0.0.1/tcp/1",),
            agent="test",
        )
        return hello.model_copy(update=changes)

    def open(self, *peers: str, **changes: Any) -> Welcome:
        for peer in peers:
            session = self.sessions.get(peer, 0) + 1
            welcome = self.service.open(peer, session, self.hello(**changes), self.now_s)
            self.sessions[peer] = session
        return welcome

    def say(self, peer: str, message: Message) -> None:
        self.service.receive(peer, self.sessions[peer], message, self.now_s)
        self.service.tick(self.now_s)

    def train(self, *peers: str) -> None:
        self.open(*peers)
        for peer in peers:
            self.say(peer, State(state=NodeState.TRAINING))

    def wait(self, seconds: float, *alive: str) -> None:
        """Time passes in small steps; the peers named send heartbeats."""
        for _ in range(round(seconds / 0.5)):
            self.now_s += 0.5
            for peer in alive:
                self.say(peer, Heartbeat(round=0, sent_bytes=10, received_bytes=20, payload_bytes=5))
            self.service.tick(self.now_s)

    def status(self) -> dict[str, Any]:
        status = self.service.status(self.now_s)
        json.dumps(status, allow_nan=False)
        return status

    def round(self, round_: int, *peers: str, payload: bytes = b"abc") -> None:
        """All of the peers offer something, those after the first one the same plus their name."""
        for n, peer in enumerate(peers):
            data = payload if n == 0 else payload + peer.encode()
            if len(data) > INLINE_BYTES:
                self.upload(peer, data)
                self.say(peer, blob_offer(round_, data))
            else:
                self.say(peer, offer(round_, data))

    def snapshot(self, round_: int, *peers: str, manifest: bytes = b"m" * 32) -> None:
        for peer in peers:
            self.say(peer, Report(round=round_, snapshot=manifest, snapshot_bytes=1000 + round_))

    def peer(self, name: str) -> dict[str, Any]:
        return next(p for p in self.status()["peers"] if p["peer_id"] == name)

    def messages(self, kind: type[Message], to: str | None = None) -> list[Any]:
        return [m for peer, m in self.sent if isinstance(m, kind) and to in (None, peer)]

    def upload(self, peer: str, data: bytes) -> bytes:
        self.service.may_store(peer, len(data))
        if digest_of(data) not in self.blobs:
            writer = self.blobs.writer(digest_of(data), len(data), peer)
            writer.write(data)
            writer.finish()
        self.service.blob_arrived(peer, digest_of(data), self.now_s)
        return digest_of(data)


def offer(round_: int, data: bytes = b"abc", **changes: Any) -> Offer:
    plain = Offer(
        round=round_,
        n_samples=4,
        n_tokens=64,
        loss=1.5,
        n_bytes=len(data),
        payload=data,
        digest=None,
    )
    return plain.model_copy(update=changes)


def blob_offer(round_: int, data: bytes) -> Offer:
    return offer(round_, data, payload=None, digest=digest_of(data))


MakeWorld = Callable[..., World]
"""With keys of the run's config."""
