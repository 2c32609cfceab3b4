"""Starts and stops libp2p: hivemind's daemon `p2pd`, one per process, and hivemind's client for it.

hivemind's own `P2P.create` leaves its daemon's sockets behind when its process is killed and does not
notice when the daemon dies, so the daemon is started here and `P2P.replicate` joins it. Measured with
hivemind 1.1.12: the daemon is ready after 0.3 s; it shares a taken port in silence; it ends by itself when
its client disconnects. A small shell waits for the end of its stdin, whose other end only this process
holds: however this process ends, also by SIGKILL, the shell kills the daemon and removes the sockets.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Awaitable, Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from thinwire.compression.errors import ConfigError, SwarmUnreachable
from thinwire.coordinator.addresses import dialable, knock, listen_address, require_free
from thinwire.coordinator.identity import save

_log = logging.getLogger("thinwire.p2p")

StreamHandler = Callable[[str, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
"""Gets the peer id that the secured connection proved, never what a message claims."""

_START_TIMEOUT_S = 20.0
_CONTROL_TIMEOUT_S = 30.0
_FOLDER_PREFIX = "thinwire-p2p-"
_KEY_NAME = "key"
_STALE_AFTER_S = 60.0
_LONGEST_TEMP_DIR = 60  # a Unix socket's path has at most 104 bytes

# $1: folder of the sockets; the rest: the daemon's command line. It runs in a session of its own, so that a
# Ctrl-C in the terminal leaves the connection up until the node has said that it leaves.
_KEEPER = """
folder=$1; shift
"$@" </dev/null &
daemon=$!
echo "pid $daemon"
exec >/dev/null 2>&1
while read -r _; do :; done
kill -KILL "$daemon"
wait "$daemon"
rm -rf -- "$folder"
"""


class Host:
    """This process's place in the network. Made by `start_p2p`; belongs to one event loop."""

    def __init__(self, p2p: Any, keeper: asyncio.subprocess.Process, daemon_pid: int, folder: Path) -> None:
        self.peer_id = str(p2p.peer_id)
        self.daemon_pid = daemon_pid
        self.died = asyncio.Event()
        self.addresses: tuple[str, ...] = ()
        self.port = 0
        self._p2p = p2p
        self._keeper = keeper
        self._folder = folder
        self._lock_fd = -1
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
            finally:
                self._handlers.discard(task)
                await close_writer(writer)

        await self._bounded(self._p2p.add_binary_stream_handler(protocol, on_stream), "to serve a protocol")

    async def dial(self, peer_id: str, addresses: Sequence[str], timeout_s: float) -> None:
        """Connects to a peer, trying all addresses at once. Raises SwarmUnreachable: why each one failed."""
        if not addresses:
            raise SwarmUnreachable(f"no address of {peer_id} is known")
        failed = await _knock_everywhere(addresses, timeout_s)
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
        await _end_keeper(self._keeper, self._folder)
        self.died.set()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    async def _watch(self) -> None:
        """The daemon's output ends when the daemon does: the keeper has closed its own end."""
        assert self._keeper.stdout is not None
        while said := await self._keeper.stdout.read(4096):
            _log.debug("p2pd: %s", said.decode(errors="replace").rstrip())
        _log.debug("p2pd %d has ended", self.daemon_pid)
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
                reader, writer = await asyncio.open_unix_connection(str(self._folder / "p2pd.sock"))
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
) -> Host:
    """Starts a daemon that listens on `host` and `port` (0: any free one) under the key's peer id.

    `announce`: addresses that others should try first (HOST, HOST:PORT or multiaddr). Blocks for the import
    of hivemind (3 s) the first time. Raises ConfigError: a taken port, a bad address, no daemon.
    """
    hivemind = _hivemind()
    listen = listen_address(host, port)
    if port:
        await asyncio.to_thread(require_free, host, port)
    folder, lock_fd = _new_folder()
    keeper = None
    try:
        save(key, folder / _KEY_NAME)
        keeper = await asyncio.create_subprocess_exec(
            *("/bin/sh", "-c", _KEEPER, "thinwire-p2pd", str(folder)),
            *_daemon_command(folder, listen),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "GOLOG_LOG_LEVEL": "error"},
        )
        async with asyncio.timeout(_START_TIMEOUT_S):
            daemon_pid = await _ready(keeper)
            (folder / _KEY_NAME).unlink()
            p2p_class: Any = type("_P2P", (hivemind.P2P,), {"_UNIX_SOCKET_PREFIX": f"/unix{folder}/"})
            p2p = await p2p_class.replicate(hivemind.Multiaddr(f"/unix{folder}/p2pd.sock"))
        bound = [a["tcp"] for a in await p2p.get_visible_maddrs() if "tcp" in a]
    except BaseException as e:
        if keeper is not None:
            await _end_keeper(keeper, folder)
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock_fd)
        if isinstance(e, TimeoutError | OSError | EOFError):
            raise ConfigError(f"libp2p did not start on {listen}: {e or 'no answer in time'}") from e
        raise
    result = Host(p2p, keeper, daemon_pid, folder)
    result._lock_fd = lock_fd
    if not bound or (port and int(bound[0]) != port):
        await result.close()
        raise ConfigError(f"cannot listen on {host} port {port}: is that an address of this machine?")
    result.port = int(bound[0])
    result.addresses = dialable(host, result.port, announce)
    return result


async def close_writer(writer: asyncio.StreamWriter) -> None:
    """Closes a stream whose other end may be gone already."""
    writer.close()
    try:
        async with asyncio.timeout(1.0):
            await writer.wait_closed()
    except (OSError, TimeoutError):
        writer.transport.abort()


def _daemon_command(folder: Path, listen: str) -> list[str]:
    spec = find_spec("hivemind")
    assert spec is not None
    assert spec.submodule_search_locations
    binary = Path(spec.submodule_search_locations[0]) / "hivemind_cli" / "p2pd"
    if not os.access(binary, os.X_OK):
        raise ConfigError(f"hivemind's daemon {binary} is missing: hivemind has no wheel for this platform")
    return [
        str(binary),
        f"-listen=/unix{folder}/p2pd.sock",
        f"-id={folder / _KEY_NAME}",
        f"-hostAddrs={listen}",
        "-idleTimeout=30s",  # ends when no client has come, and when the last one has gone
        "-tls=1",
        # No DHT, relay, NAT mapping or pruning of connections: tickets and member list name the addresses.
        *("-b=0", "-relay=0", "-relayService=0", "-autoRelay=0", "-autonat=0", "-natPortMap=0"),
        "-connManager=0",
    ]


async def _ready(keeper: asyncio.subprocess.Process) -> int:
    """The daemon's process id, once it accepts requests. Raises ConfigError with its last words."""
    assert keeper.stdout is not None
    daemon_pid, last = 0, ""
    while line := (await keeper.stdout.readline()).decode(errors="replace").strip():
        if line.startswith("pid "):
            daemon_pid = int(line.removeprefix("pid "))
        if line.startswith("Peer ID:"):
            return daemon_pid
        last = line
    raise ConfigError(f"libp2p did not start: {last}")


async def _end_keeper(keeper: asyncio.subprocess.Process, folder: Path) -> None:
    """The keeper kills the daemon and removes its folder when its stdin ends."""
    assert keeper.stdin is not None
    keeper.stdin.close()
    try:
        async with asyncio.timeout(5.0):
            await keeper.wait()
    except TimeoutError:
        keeper.kill()
        await keeper.wait()
    transport = getattr(keeper, "_transport", None)  # asyncio closes the pipes only when it is collected
    if transport is not None:
        transport.close()
    shutil.rmtree(folder, ignore_errors=True)


def _new_folder() -> tuple[Path, int]:
    """A private folder for sockets, locked by this process, after removing those that nobody holds."""
    root = Path(tempfile.gettempdir())
    root = root if len(str(root)) <= _LONGEST_TEMP_DIR else Path("/tmp")
    for old in root.glob(f"{_FOLDER_PREFIX}*"):
        _remove_if_stale(old)
    folder = Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX, dir=root))
    lock_fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock_fd, fcntl.LOCK_EX)
    return folder, lock_fd


def _remove_if_stale(folder: Path) -> None:
    try:
        info = folder.stat()
        if info.st_uid != os.getuid() or time.time() - info.st_mtime < _STALE_AFTER_S:
            return
        lock_fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:
        return  # another start removes it at the same time
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        return  # in use
    finally:
        os.close(lock_fd)


async def _knock_everywhere(addresses: Sequence[str], timeout_s: float) -> dict[str, str]:
    """Address -> why it does not answer; those that are slower than another one by 1 s are left out."""
    tasks = {asyncio.create_task(knock(a, timeout_s)): a for a in dict.fromkeys(addresses)}
    waiting, left_s = set(tasks), timeout_s + 1.0
    while waiting:
        done, waiting = await asyncio.wait(waiting, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            break
        if any(task.result() is None for task in done):
            left_s = 1.0
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    slow = {tasks[task]: "slower than the others" for task in waiting}
    answers = {a: task.result() for task, a in tasks.items() if task not in waiting}
    return slow | {a: why for a, why in answers.items() if why is not None}


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


_loaded: list[_Hivemind] = []


def _hivemind() -> Any:
    if not _loaded:
        _loaded.append(_Hivemind())
    return _loaded[0]


def _peer(peer_id: str) -> Any:
    return _hivemind().PeerID.from_base58(peer_id)
