"""This process's transport in a libp2p network: a thin client of hivemind's daemon, which is our own.

Nothing of hivemind is loaded: see `libp2p.wire`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ...compression.errors import ConfigError, SwarmUnreachable
from .addresses import dialable, knock_everywhere, listen_address, require_free
from .identity import peer_id_of
from .libp2p.client import ANSWER_TIMEOUT_S, DaemonClient, close_writer
from .libp2p.wire import BadWords, connect, disconnect, stream_open, tcp_port
from .p2p_daemon import SOCKET_NAME, Daemon, start_daemon
from .transport import StreamHandler

_log = logging.getLogger("thinwire.p2p")


class P2PTransport:
    """`Transport` over libp2p. Made by `start_p2p`; the secured connection proves peer ids."""

    def __init__(
        self, client: DaemonClient, daemon: Daemon, peer_id: str, port: int, addresses: tuple[str, ...]
    ) -> None:
        self.peer_id = peer_id
        self.port, self.addresses = port, addresses
        self.daemon = daemon
        self.died = asyncio.Event()
        self._client = client
        self._handlers: set[asyncio.Task[None]] = set()
        self._opened: list[asyncio.StreamWriter] = []
        self._watcher = asyncio.create_task(self._watch())

    async def handle(self, protocol: str, handler: StreamHandler) -> None:
        """Calls `handler` for every stream that a peer opens; the stream is closed when it returns."""

        async def on_stream(peer_id: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._handlers.add(task)
            try:
                await handler(peer_id, reader, writer)
            except asyncio.CancelledError:
                # `close` ends the handlers. The task is over in any case, and asyncio before Python 3.12
                # prints a traceback for the task of a stream that ends as cancelled.
                _log.debug("a stream of %s is dropped", peer_id)
            finally:
                self._handlers.discard(task)
                await close_writer(writer)

        await self._client.serve(protocol, on_stream)

    async def dial(self, peer_id: str, addresses: Sequence[str], timeout_s: float) -> None:
        """Connects to a peer, trying all addresses at once. Raises SwarmUnreachable: why each one failed."""
        if not addresses:
            raise SwarmUnreachable(f"no address of {peer_id} is known")
        failed = await knock_everywhere(addresses, timeout_s)
        answering = [a for a in addresses if a not in failed]
        if answering:
            why = await self._connect(peer_id, answering, timeout_s)
            if why is None:
                return
            failed |= {a: _reason_for(a, why) for a in answering}
        listing = "\n".join(f"  {a}: {failed[a]}" for a in addresses)
        raise SwarmUnreachable(f"cannot reach {peer_id}:\n{listing}")

    async def open_stream(
        self, peer_id: str, protocol: str, timeout_s: float = 10.0
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A binary stream to a peer that was dialled. Raises SwarmUnreachable."""
        answer, reader, writer = await self._client.request(stream_open(peer_id, protocol), timeout_s)
        if answer.error is not None:
            await close_writer(writer)
            raise SwarmUnreachable(f"{peer_id} does not serve {protocol}: {answer.error}")
        self._opened = [w for w in self._opened if not w.is_closing()] + [writer]
        return reader, writer

    async def disconnect(self, peer_id: str) -> None:
        """Drops the connection to a peer and with it all streams; silent when there is none."""
        await self._client.ask(disconnect(peer_id), ANSWER_TIMEOUT_S)

    async def close(self) -> None:
        """Ends all streams, handlers and the daemon, and removes its sockets. May be called twice."""
        self._watcher.cancel()
        for writer in self._opened:
            writer.transport.abort()
        for task in list(self._handlers):
            task.cancel()
        await asyncio.gather(self._watcher, *self._handlers, return_exceptions=True)
        await self._client.close()
        await self.daemon.end()
        self.died.set()

    async def _watch(self) -> None:
        while said := await self.daemon.output():
            _log.debug("p2pd: %s", said.decode(errors="replace").rstrip())
        _log.debug("p2pd %d has ended", self.daemon.pid)
        self.died.set()

    async def _connect(self, peer_id: str, addresses: Sequence[str], timeout_s: float) -> str | None:
        """What the daemon says when it cannot connect."""
        try:
            return (await self._client.ask(connect(peer_id, addresses), timeout_s)).error
        except (SwarmUnreachable, BadWords) as e:
            return str(e)


async def start_p2p(
    key: Ed25519PrivateKey, *, host: str = "127.0.0.1", port: int = 0, announce: Sequence[str] = ()
) -> P2PTransport:
    """Starts a daemon that listens on `host` and `port` (0: any free one) under the key's peer id.

    `announce`: addresses that others should try first (HOST, HOST:PORT or multiaddr). Raises ConfigError: a
    taken port, a bad address, no daemon.
    """
    listen = listen_address(host, port)
    if port:
        await asyncio.to_thread(require_free, host, port)
    daemon = await start_daemon(key, listen)
    client = DaemonClient(daemon.folder, SOCKET_NAME)
    try:
        found = await client.open()
    except BaseException as e:
        await client.close()
        await daemon.end()
        if isinstance(e, SwarmUnreachable):
            raise ConfigError(f"libp2p did not start on {listen}: {e}") from e
        raise
    bound = [n for address in found.addresses if (n := tcp_port(address)) is not None]
    if not bound or (port and bound[0] != port):
        await client.close()
        await daemon.end()
        raise ConfigError(f"cannot listen on {host} port {port}: is that an address of this machine?")
    peer_id = peer_id_of(key.public_key())
    return P2PTransport(client, daemon, peer_id, bound[0], dialable(host, bound[0], announce))


def _reason_for(address: str, answer: str) -> str:
    """The daemon's words about one address, shortened."""
    for line in answer.splitlines():
        if line.strip().startswith(f"* [{address}]"):
            why = line.split("] ", 1)[1]
            if "peer id mismatch" in why:
                return f"another peer answers there ({why.rsplit(' ', 1)[-1]}): an old ticket?"
            return why
    return answer.splitlines()[0] if answer else "no reason given"
