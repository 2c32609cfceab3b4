"""hivemind's libp2p daemon `p2pd` as a child process that cannot be left behind.

hivemind's own `P2P.create` leaves sockets behind when its process is killed, so the daemon is started here.
Measured with hivemind 1.1.12: it is ready after 0.3 s and ends by itself when its client disconnects. A small
shell, the watchdog, waits for the end of its stdin, whose other end only this process holds: however this
process ends, also by SIGKILL, the watchdog kills the daemon and removes its folder.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ...compression.errors import ConfigError, ThinwireError
from .files import disk_error, keep_from_children
from .identity import save

SOCKET_NAME = "p2pd.sock"

_START_TIMEOUT_S = 20.0
_END_TIMEOUT_S = 5.0
_FOLDER_PREFIX = "thinwire-p2p-"
_KEY_NAME = "key"
_CONFIG_NAME = "config.json"
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


@dataclass(slots=True, eq=False, weakref_slot=True)
class Daemon:
    """A running daemon, and the private folder of its sockets."""

    pid: int
    folder: Path
    watchdog: asyncio.subprocess.Process
    lock_fd: int

    async def output(self) -> bytes:
        """What it says next; empty when it has ended, because the watchdog has closed its own end."""
        assert self.watchdog.stdout is not None
        return await self.watchdog.stdout.read(4096)

    def close_in_child(self) -> None:
        """A fork of this process would keep the watchdog waiting, which ends the daemon when stdin ends."""
        process = vars(self.watchdog)["_transport"]
        for stream in (0, 1):
            transport = process.get_pipe_transport(stream)
            pipe = None if transport is None else transport.get_extra_info("pipe")
            if pipe is not None:
                pipe.close()
        if self.lock_fd >= 0:
            os.close(self.lock_fd)
            self.lock_fd = -1

    async def end(self) -> None:
        """Kills it and removes its folder. May be called twice."""
        await _end_watchdog(self.watchdog)
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.lock_fd >= 0:
            os.close(self.lock_fd)
            self.lock_fd = -1


async def start_daemon(key: Ed25519PrivateKey, listen: str) -> Daemon:
    """Listens on the multiaddr `listen` under the key's peer id. Raises ConfigError.

    A port that somebody else listens on is shared in silence: see `addresses.require_free`.
    """
    try:
        folder, lock_fd = _new_folder()
    except OSError as e:
        raise _not_started(listen, e) from e
    watchdog = None
    try:
        save(key, folder / _KEY_NAME)
        (folder / _CONFIG_NAME).write_text(_NO_RELAY)
        watchdog = await asyncio.create_subprocess_exec(
            "/bin/sh",
            "-c",
            _KEEPER,
            "thinwire-p2pd",
            str(folder),
            *_command(folder, listen),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "GOLOG_LOG_LEVEL": "error"},
        )
        async with asyncio.timeout(_START_TIMEOUT_S):
            pid = await _ready(watchdog)
        (folder / _KEY_NAME).unlink()
    except BaseException as e:
        if watchdog is not None:
            await _end_watchdog(watchdog)
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock_fd)
        if isinstance(e, OSError):
            raise _not_started(listen, e) from e
        raise
    daemon = Daemon(pid, folder, watchdog, lock_fd)
    keep_from_children(daemon)
    return daemon


def _not_started(listen: str, error: OSError) -> ThinwireError:
    other = ConfigError(f"libp2p did not start on {listen}: {str(error) or 'no answer in time'}")
    return disk_error(error, Path(tempfile.gettempdir())) or other


def _command(folder: Path, listen: str) -> list[str]:
    spec = find_spec("hivemind")
    assert spec is not None
    assert spec.submodule_search_locations
    binary = Path(spec.submodule_search_locations[0]) / "hivemind_cli" / "p2pd"
    if not os.access(binary, os.X_OK):
        raise ConfigError(f"hivemind's daemon {binary} is missing: hivemind has no wheel for this platform")
    return [
        str(binary),
        f"-listen=/unix{folder}/{SOCKET_NAME}",
        f"-id={folder / _KEY_NAME}",
        f"-f={folder / _CONFIG_NAME}",
        f"-hostAddrs={listen}",
        "-idleTimeout=30s",  # ends when no client has come, and when the last one has gone
        "-tls=1",
        *_SWITCHED_OFF,
    ]


# Tickets and member list name the addresses: no DHT, relay, NAT mapping or pruning of connections.
_SWITCHED_OFF: Final = (
    "-b=0",
    "-relay=0",
    "-relayService=0",
    "-autoRelay=0",
    "-autonat=0",
    "-natPortMap=0",
    "-connManager=0",
)

# p2pd's `-relay` never switches off what is on. As a relay it would carry strangers' traffic, and read in a
# table of the whole Internet's networks first: 0.25 s of a core and 30 MB of memory.
_NO_RELAY: Final = '{"Relay": {"Enabled": false}}'


async def _ready(watchdog: asyncio.subprocess.Process) -> int:
    """The daemon's process id, once it accepts requests. Raises ConfigError with its last words."""
    assert watchdog.stdout is not None
    daemon_pid, last = 0, ""
    while line := (await watchdog.stdout.readline()).decode(errors="replace").strip():
        if line.startswith("pid "):
            daemon_pid = int(line.removeprefix("pid "))
        if line.startswith("Peer ID:"):
            return daemon_pid
        last = line
    raise ConfigError(f"libp2p did not start: {last}")


async def _end_watchdog(watchdog: asyncio.subprocess.Process) -> None:
    """The watchdog kills the daemon when its stdin ends."""
    assert watchdog.stdin is not None
    watchdog.stdin.close()
    try:
        async with asyncio.timeout(_END_TIMEOUT_S):
            await watchdog.wait()
    except TimeoutError:
        watchdog.kill()
        await watchdog.wait()
    transport = getattr(watchdog, "_transport", None)  # asyncio closes the pipes only when it is collected
    if transport is not None:
        transport.close()


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
