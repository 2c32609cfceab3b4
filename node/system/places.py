"""Where a command is to write and listen, checked before it starts anything: an hour's work is not lost to a
folder that is not there."""

from __future__ import annotations

import ipaddress
import logging
import math
import os
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ...compression.errors import ConfigError

if TYPE_CHECKING:
    from ...coordinator.protocol.addresses import HttpAddress

log = logging.getLogger("thinwire.cli")

_EXAMPLES: Final = {"--save": "model.safetensors", "--ticket-file": "ticket"}
_NAMES: Final = ("dns", "dns4", "dns6", "dnsaddr")


def refuse_file(option: str, path: Path | None) -> None:
    """Raises ConfigError if no file can be written at `path`. `option`: as on the command line, "--save"."""
    if path is None:
        return
    if path.is_dir():
        example = path / _EXAMPLES.get(option, "file")
        raise ConfigError(f"{option} {path}: that is a folder; name a file in it, e.g. {example}")
    folder = path.absolute().parent
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "is not there"
        raise ConfigError(f"{option} {path}: the folder {folder} {what}; make it first: mkdir -p {folder}")
    _try_to_write(option, path, folder)


def refuse_folder(option: str, path: Path | None) -> None:
    """Raises ConfigError if `path` is no folder that can be written in, and none can be made there."""
    if path is None:
        return
    there = path.absolute()
    while not (there.exists() or there.is_symlink()):
        there = there.parent
    if not there.is_dir():
        raise ConfigError(f"{option} {path}: {there} is a file where a folder is meant; name another")
    _try_to_write(option, path, there)


def refuse_address(host: str, port: int, announce: Sequence[str]) -> None:
    """Raises ConfigError for what cannot be listened on or announced: --host, --port, --announce."""
    from ...coordinator.protocol.addresses import announced, listen_address, require_free

    listen_address(host, port)
    for text in announce:
        _refuse_announced(text, announced(text, port or 1))
    require_free(host, port)


def refuse_http(address: HttpAddress | None) -> None:
    """Raises ConfigError for a host that is not this machine's, a port that is taken or forbidden."""
    from ...coordinator.protocol.addresses import require_free

    if address is None:
        return
    try:
        found = socket.getaddrinfo(address.host, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as e:
        raise ConfigError(
            f"--http {address}: {address.host!r} is no name or address of this machine; 127.0.0.1 serves "
            f"this machine, 0.0.0.0 everybody"
        ) from e
    require_free(str(found[0][4][0]), address.port, "--http")


def refuse_below(option: str, value: float | None, least: float, hint: str) -> None:
    """Raises ConfigError unless `value` is a number from `least` on. `hint`: what it means, an example."""
    if value is not None and not (math.isfinite(value) and value >= least):
        raise ConfigError(f"{option} {value:g}: a number from {least:g} on is needed; {hint}")


def _refuse_announced(text: str, address: str) -> None:
    """`address`: the multiaddr that it means. A name with dots may be known to others, or later, only."""
    parts = address.split("/")
    if len(parts) < 5 or not parts[4].isdigit() or not 0 < int(parts[4]) < 2**16:
        raise ConfigError(f"--announce {text}: write HOST, HOST:PORT or /ip4/HOST/tcp/PORT")
    if parts[1] in ("ip4", "ip6"):
        _refuse_ip(text, parts[1], parts[2])
    elif parts[1] not in _NAMES:
        raise ConfigError(f"--announce {text}: /{parts[1]} is unknown here; /ip4, /ip6 and /dns are known")
    elif (why := _unknown(parts[2])) is not None:
        said = f"--announce {text}: this machine knows no {parts[2]} ({why})"
        if "." not in parts[2]:
            raise ConfigError(f"{said}; give a public address or a full name, e.g. 203.0.113.7:4001")
        log.warning("%s; it is announced nevertheless, for those who do", said)


def _refuse_ip(text: str, version: str, host: str) -> None:
    try:
        if f"ip{ipaddress.ip_address(host).version}" == version:
            return
    except ValueError:
        pass
    raise ConfigError(f"--announce {text}: {host} is no address of /{version}")


def _unknown(name: str) -> str | None:
    """Why this name has no address; None: it has one."""
    try:
        socket.getaddrinfo(name, None)
    except OSError as e:
        return (e.strerror or str(e)).lower()
    except UnicodeError:
        return "not a name"
    return None


def _try_to_write(option: str, path: Path, folder: Path) -> None:
    """A file without a name: nothing of it is left, and nobody sees it."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        why = (e.strerror or str(e)).lower()
        raise ConfigError(f"{option} {path}: nothing can be written in {folder}: {why}") from e
    if path.exists() and path.is_file() and not os.access(path, os.W_OK):
        log.warning("%s %s is write-protected: it will be replaced", option, path)
