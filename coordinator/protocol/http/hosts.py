"""For which names a server of HTTP answers: a page from elsewhere may have its own name lead here.

That is DNS rebinding: a browser that shows such a page asks this server in that name, and the page reads the
answer. The name is in the request's Host header.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from typing import Final

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ..addresses import HttpAddress

OPEN_PATHS: Final = frozenset({"/healthz", "/readyz"})
"""What a container's supervisor asks for knows no token, and no name."""

_LABEL: Final = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address that is listened on."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def named_in(host_header: str) -> str:
    """The name or address without its port, in small letters and without brackets; "" for what is none."""
    host = host_header.strip().lower()
    if host.startswith("["):
        host, _, rest = host[1:].partition("]")
        return host if _is_ip(host) and (not rest or rest.startswith(":")) else ""
    return host.partition(":")[0].rstrip(".")


def names_this_machine(host_header: str) -> bool:
    """Whether a request for this Host, on a loopback address, was meant for this machine."""
    name = named_in(host_header)
    return is_loopback(name) or name.endswith(".localhost")


class OnlyForItsNames:
    """Answers requests for this machine alone, by its loopback names; and, where others reach `address`, by
    any IP address, by a name without dots (a service, a machine of this network), by this machine's name and
    by `address.names`.

    Nobody can register a name without dots for a page of his, and no page is at an IP address but that of its
    own server.
    """

    def __init__(self, app: ASGIApp, address: HttpAddress) -> None:
        self._app = app
        self._is_local = is_loopback(address.host)
        own = socket.gethostname()
        self._names = frozenset(name.lower().rstrip(".") for name in (own, f"{own}.local", *address.names))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            host = Headers(scope=scope).get("host", "")
            if not self._is_meant(host):
                app = PlainTextResponse(self._refusal(host), 403)
        await app(scope, receive, send)

    def _is_meant(self, host_header: str) -> bool:
        name = named_in(host_header)
        if names_this_machine(host_header) or name in self._names:
            return bool(name)
        return not self._is_local and (_is_ip(name) or _LABEL.fullmatch(name) is not None)

    def _refusal(self, host: str) -> str:
        where = "is for this machine alone" if self._is_local else "is not known by that name"
        said = named_in(host)[:60].encode("ascii", "replace").decode() or "NAME"
        return (
            f"this address {where}: ask for it by its IP address, or start what serves here with --http-host "
            f"{said}, too; --http-token protects what others are to see\n"
        )


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
