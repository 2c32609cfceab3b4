"""This process's transport in a libp2p network: hivemind's client, on a daemon of our own.

`P2P.replicate` joins the daemon that `p2p_daemon` starts. Requests go over a connection of their own each, as
hivemind's client does it, but with a time limit and closed whatever happens.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import warnings
from collections.abc import Awaitable, Sequence
from importlib.util import find_spec, module_from_spec
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ...compression.errors import ConfigError, SwarmUnreachable
from .addresses import dialable, knock_everywhere, listen_address, require_free
from .p2p_daemon import SOCKET_NAME, Daemon, start_daemon
from .transport import StreamHandler

_log = logging.getLogger("thinwire.p2p")

_CONTROL_TIMEOUT_S = 30.0


class P2PTransport:
    """`Transport` over libp2p. Made by `start_p2p`; the secured connection proves peer ids."""

    def __init__(self, p2p: Any, daemon: Daemon, port: int, addresses: tuple[str, ...]) -> None:
        self.peer_id = str(p2p.peer_id)
        self.port, self.addresses = port, addresses
        self.daemon = daemon
        self.died = asyncio.Event()
        self._p2p = p2p
        self._handlers: set[asyncio.Task[None]] = set()
        self._opened: list[asyncio.StreamWriter] = []
        self._watcher = asyncio.create_task(self._watch())

    async def handle(self, protocol: str, handler: StreamHandler) -> None:
        """Calls `handler` for every stream that a peer opens; the stream is closed when it returns."""

        async def on_stream(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self._handlers.add(task)
            try:
                await handler(str(info.peer_id), reader, writer)
            except asyncio.CancelledError:
                # `close` ends the handlers. The task is over in any case, and asyncio before Python 3.12
                # prints a traceback for the task of a stream that ends as cancelled.
                _log.debug("a stream of %s is dropped", info.peer_id)
            finally:
                self._handlers.discard(task)
                await close_writer(writer)

        await self._bounded(self._p2p.add_binary_stream_handler(protocol, on_stream), "to serve a protocol")

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
        pb = _hivemind().p2pd_pb2
        request = pb.StreamOpenRequest(peer=_peer(peer_id).to_bytes(), proto=[protocol])
        answer, reader, writer = await self._request(
            pb.Request(type=pb.Request.STREAM_OPEN, streamOpen=request), timeout_s
        )
        if answer.type == pb.Response.ERROR:
            await close_writer(writer)
            raise SwarmUnreachable(f"{peer_id} does not serve {protocol}: {answer.error.msg}")
        self._opened = [w for w in self._opened if not w.is_closing()] + [writer]
        return reader, writer

    async def disconnect(self, peer_id: str) -> None:
        """Drops the connection to a peer and with it all streams; silent when there is none."""
        pb = _hivemind().p2pd_pb2
        request = pb.DisconnectRequest(peer=_peer(peer_id).to_bytes())
        _, _, writer = await self._request(
            pb.Request(type=pb.Request.DISCONNECT, disconnect=request), _CONTROL_TIMEOUT_S
        )
        await close_writer(writer)

    async def close(self) -> None:
        """Ends all streams, handlers and the daemon, and removes its sockets. May be called twice."""
        self._watcher.cancel()
        for writer in self._opened:
            writer.transport.abort()
        for task in list(self._handlers):
            task.cancel()
        await asyncio.gather(self._watcher, *self._handlers, return_exceptions=True)
        await self._p2p.shutdown()
        await self.daemon.end()
        self.died.set()

    async def _watch(self) -> None:
        while said := await self.daemon.output():
            _log.debug("p2pd: %s", said.decode(errors="replace").rstrip())
        _log.debug("p2pd %d has ended", self.daemon.pid)
        self.died.set()

    async def _connect(self, peer_id: str, addresses: Sequence[str], timeout_s: float) -> str | None:
        """What the daemon says when it cannot connect."""
        hivemind = _hivemind()
        pb = hivemind.p2pd_pb2
        packed = [hivemind.Multiaddr(a).to_bytes() for a in addresses]
        request = pb.ConnectRequest(peer=_peer(peer_id).to_bytes(), addrs=packed)
        try:
            answer, _, writer = await self._request(
                pb.Request(type=pb.Request.CONNECT, connect=request), timeout_s
            )
        except SwarmUnreachable as e:
            return str(e)
        await close_writer(writer)
        return str(answer.error.msg) if answer.type == pb.Response.ERROR else None

    async def _request(
        self, request: Any, timeout_s: float
    ) -> tuple[Any, asyncio.StreamReader, asyncio.StreamWriter]:
        """One request on its own connection to the daemon, as hivemind's client does, but leaking none."""
        hivemind = _hivemind()
        answer = hivemind.p2pd_pb2.Response()
        writer = None
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_unix_connection(str(self.daemon.folder / SOCKET_NAME))
                await hivemind.write_pbmsg(writer, request)
                await hivemind.read_pbmsg_safe(reader, answer)
        except BaseException as e:
            if writer is not None:
                await close_writer(writer)
            if isinstance(e, TimeoutError):
                raise SwarmUnreachable(f"no answer within {timeout_s:g} s") from e
            if isinstance(e, OSError | EOFError):
                raise SwarmUnreachable("this machine's p2pd does not answer: it has ended") from e
            raise
        return answer, reader, writer

    async def _bounded(self, work: Awaitable[Any], what: str) -> None:
        try:
            async with asyncio.timeout(_CONTROL_TIMEOUT_S):
                await work
        except (OSError, EOFError, TimeoutError) as e:
            raise SwarmUnreachable(f"this machine's p2pd does not answer ({what})") from e


async def start_p2p(
    key: Ed25519PrivateKey, *, host: str = "127.0.0.1", port: int = 0, announce: Sequence[str] = ()
) -> P2PTransport:
    """Starts a daemon that listens on `host` and `port` (0: any free one) under the key's peer id.

    `announce`: addresses that others should try first (HOST, HOST:PORT or multiaddr). Blocks for the import
    of hivemind (3 s) the first time. Raises ConfigError: a taken port, a bad address, no daemon.
    """
    hivemind = _hivemind()
    listen = listen_address(host, port)
    if port:
        await asyncio.to_thread(require_free, host, port)
    daemon = await start_daemon(key, listen)
    try:
        async with asyncio.timeout(_CONTROL_TIMEOUT_S):
            p2p_class: Any = type("_P2P", (hivemind.P2P,), {"_UNIX_SOCKET_PREFIX": f"/unix{daemon.folder}/"})
            p2p = await p2p_class.replicate(hivemind.Multiaddr(f"/unix{daemon.folder}/{SOCKET_NAME}"))
            bound = [int(a["tcp"]) for a in await p2p.get_visible_maddrs() if "tcp" in a]
    except BaseException as e:
        await daemon.end()
        if isinstance(e, TimeoutError | OSError | EOFError):
            raise ConfigError(f"libp2p did not start on {listen}: {e or 'no answer in time'}") from e
        raise
    if not bound or (port and bound[0] != port):
        await p2p.shutdown()
        await daemon.end()
        raise ConfigError(f"cannot listen on {host} port {port}: is that an address of this machine?")
    return P2PTransport(p2p, daemon, bound[0], dialable(host, bound[0], announce))


async def close_writer(writer: asyncio.StreamWriter) -> None:
    """Closes a stream whose other end may be gone already."""
    writer.close()
    try:
        async with asyncio.timeout(1.0):
            await writer.wait_closed()
    except (OSError, TimeoutError):
        writer.transport.abort()


def _reason_for(address: str, answer: str) -> str:
    """The daemon's words about one address, shortened."""
    for line in answer.splitlines():
        if line.strip().startswith(f"* [{address}]"):
            why = line.split("] ", 1)[1]
            if "peer id mismatch" in why:
                return f"another peer answers there ({why.rsplit(' ', 1)[-1]}): an old ticket?"
            return why
    return answer.splitlines()[0] if answer else "no reason given"


class _Hivemind:
    """What is used of hivemind, imported once and quietly."""

    def __init__(self) -> None:
        level_name = logging.getLevelName(logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _put_off_its_trainers()
            from hivemind.p2p import P2P, PeerID
            from hivemind.p2p.p2p_daemon_bindings.utils import read_pbmsg_safe, write_pbmsg
            from hivemind.proto import p2pd_pb2
            from hivemind.utils.multiaddr import Multiaddr
        logging.addLevelName(logging.WARNING, level_name)  # hivemind renames it
        noisy = logging.getLogger("hivemind")
        noisy.handlers = [logging.NullHandler()]
        noisy.propagate = False
        self.P2P, self.PeerID, self.Multiaddr = P2P, PeerID, Multiaddr
        self.p2pd_pb2: Any = p2pd_pb2
        self.read_pbmsg_safe, self.write_pbmsg = read_pbmsg_safe, write_pbmsg


def _put_off_its_trainers() -> None:
    """Makes hivemind a package whose `__init__` runs when something of it is asked for: it loads optimizers,
    experts and scipy, a tenth of the time that a node takes to start, of which nothing is needed here."""
    spec = find_spec("hivemind")
    if spec is None or spec.loader is None or "hivemind" in sys.modules:
        return
    package, run = module_from_spec(spec), spec.loader.exec_module

    def first_use(name: str) -> Any:
        if name.startswith("__") and name != "__version__":
            raise AttributeError(name)
        if (begun := sys.modules.get(f"hivemind.{name}")) is not None:  # it is being imported
            return begun
        del package.__dict__["__getattr__"]
        run(package)
        return getattr(package, name)

    package.__dict__["__getattr__"] = first_use
    sys.modules["hivemind"] = package


_loaded: list[_Hivemind] = []
_loading = threading.Lock()


def _hivemind() -> Any:
    with _loading:
        if not _loaded:
            _loaded.append(_Hivemind())
        return _loaded[0]


def _peer(peer_id: str) -> Any:
    return _hivemind().PeerID.from_base58(peer_id)
