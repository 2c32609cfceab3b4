"""Where a process can be dialled, and where it cannot: multiaddrs, ports, a first knock by plain TCP."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import os
import socket
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import psutil

from ...compression.errors import ConfigError

MAX_ADDRESSES = 32
_PORT_RETRY_S = 1.0
"""A coordinator that was killed leaves its port to its successor within milliseconds."""
_GREETING_S = 1.0
"""A listener of libp2p speaks first, within a round trip."""


class HttpAddress(NamedTuple):
    """Where to serve HTTP; `token`: who has it may read, None: everybody, by one of this machine's own names
    or `names`."""

    host: str
    port: int
    token: str | None = None
    names: tuple[str, ...] = ()

    @classmethod
    def from_plain(cls, plain: Sequence[Any]) -> HttpAddress:
        """What came through JSON."""
        host, port, token, names = plain
        return cls(host, port, token, tuple(names))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def url(self) -> str:
        """As it can be typed into a browser."""
        anywhere = self.host in {"0.0.0.0", "::"}
        return f"http://{self._replace(host=socket.gethostname()) if anywhere else self}"


def listen_address(host: str, port: int) -> str:
    """The multiaddr to listen on. Raises ConfigError for a host that is no IP address, or a bad port."""
    if not 0 <= port < 2**16:
        raise ConfigError(f"port {port} is not between 0 and 65535")
    try:
        ip = ipaddress.ip_address(host)
    except ValueError as e:
        raise ConfigError(f"cannot listen on {host!r}: give an IP address of this machine, or 0.0.0.0") from e
    return f"/ip{ip.version}/{ip}/tcp/{port}"


def announced(text: str, port: int) -> str:
    """The multiaddr for what a user announces: HOST, HOST:PORT or a multiaddr. Raises ConfigError."""
    if text.startswith("/"):
        return text.rstrip("/").split("/p2p/")[0]
    host, colon, own_port = text.rpartition(":")
    if not colon or "]" in own_port:
        host, own_port = text, str(port)
    if not own_port.isdigit() or not 0 < int(own_port) < 2**16 or not host:
        raise ConfigError(f"cannot announce {text!r}: write HOST, HOST:PORT or /ip4/.../tcp/...")
    try:
        ip = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return f"/dns/{host}/tcp/{own_port}"
    return f"/ip{ip.version}/{ip}/tcp/{own_port}"


def is_direct(multiaddr: str) -> bool:
    """Whether it leads to the machine itself, not to one that passes on."""
    return "/p2p-circuit" not in multiaddr


def is_public(multiaddr: str) -> bool:
    """Whether it may be reached from anywhere: no address of a network of its own."""
    _, kind, host, *_ = (*multiaddr.split("/"), "", "")
    try:
        return kind.startswith("dns") or ipaddress.ip_address(host).is_global
    except ValueError:
        return False


def host_of(text: str, port: int) -> str:
    """The name or the IP address in what a user announces. Raises ConfigError."""
    return announced(text, port or 1).split("/")[2]


def dialable(host: str, port: int, announce: Sequence[str]) -> tuple[str, ...]:
    """Multiaddrs for others to try: what was announced, then this machine's addresses, loopback last."""
    listen = ipaddress.ip_address(host)
    own = _interface_addresses(listen.version) if listen.is_unspecified else [listen]
    found = [announced(text, port) for text in announce]
    found += [f"/ip{ip.version}/{ip}/tcp/{port}" for ip in sorted(own, key=lambda ip: ip.is_loopback)]
    return tuple(dict.fromkeys(found))[:MAX_ADDRESSES]


def require_free(host: str, port: int, option: str = "--port") -> None:
    """Raises ConfigError when somebody listens there already (libp2p would share the port in silence), or
    nobody may. `option`: what the port was given by. Port 0: is the host this machine's?"""
    deadline_s = time.monotonic() + _PORT_RETRY_S
    while (error := _bind_error(host, port)) is not None:
        if error.errno == errno.EACCES:
            raise ConfigError(
                f"port {port} on {host} is not for this user (ports below 1024 need root, or "
                f"CAP_NET_BIND_SERVICE): choose a higher one with {option}"
            ) from error
        if error.errno != errno.EADDRINUSE:
            raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}") from error
        if time.monotonic() > deadline_s:
            raise ConfigError(
                f"port {port} is taken on {host}: stop what listens there or choose another with {option}"
            ) from error
        time.sleep(0.05)


async def knock(address: str, timeout_s: float) -> str | None:
    """Why a plain TCP connection to `address` fails; None: it works, or this is no TCP address.

    libp2p waits longer and longer before it dials a failed address again, so it is only asked to dial
    where somebody answers, and does not hang up before libp2p's greeting, as proxies do that cannot reach
    what is behind them.
    """
    parts = address.split("/")
    if len(parts) != 5 or parts[3] != "tcp" or parts[1] not in ("ip4", "ip6", "dns", "dns4", "dns6"):
        return None
    writer = None
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(parts[2], int(parts[4]))
        return await _hung_up(reader)
    except TimeoutError:
        return f"no answer within {timeout_s:g} s"
    except socket.gaierror as e:
        return f"unknown name ({e.strerror})"
    except OSError as e:
        return os.strerror(e.errno).lower() if e.errno else str(e)  # without asyncio's own words
    except (ValueError, OverflowError):
        return "not a valid address"
    finally:
        if writer is not None:
            writer.close()


async def _hung_up(reader: asyncio.StreamReader) -> str | None:
    """What is wrong where the other end closes before it has said anything. Raises OSError."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_GREETING_S):
            if await reader.read(1) == b"":
                return "connections are accepted and closed at once, as by a proxy with nothing behind it"
    return None


async def knock_everywhere(addresses: Sequence[str], timeout_s: float) -> dict[str, str]:
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


def _bind_error(host: str, port: int) -> OSError | None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # Connections of a predecessor that are still closing do not keep a port taken; listeners do.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as e:
            return e
    return None


def _interface_addresses(version: int) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    stats = psutil.net_if_stats()
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    found = []
    for name, entries in psutil.net_if_addrs().items():
        if name in stats and not stats[name].isup:
            continue
        texts = [e.address.split("%")[0] for e in entries if e.family == family]
        found += [ip for ip in map(ipaddress.ip_address, texts) if not ip.is_link_local]
    return found
