"""Who may read what is served over HTTP: tokens, the cookie of a browser that has shown one, host names."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from base64 import b64encode
from http.cookies import CookieError, SimpleCookie
from typing import Final
from urllib.parse import parse_qs

from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

OPEN_PATHS: Final = frozenset({"/healthz", "/readyz"})
"""What a container's supervisor asks for knows no token."""

COOKIE_S: Final = 30 * 24 * 3600
_STYLE: Final = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 27rem; margin: 18vh auto 0; padding: 0 1.25rem }
h1 { font-size: 1.4rem; margin: 0 0 .5rem }
form { display: flex; gap: .5rem; align-items: end; margin-top: 1.25rem }
label { flex: 1; font-weight: 550 }
input, button { font: inherit; padding: .45rem .7rem; border-radius: 7px; border: 1px solid #8088 }
input { display: block; width: 100%; box-sizing: border-box }
button { background: #2463d6; color: #fff; cursor: pointer }
"""
_ASK: Final = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>thinwire</title><link rel="icon" href="data:,"><style>{_STYLE}</style></head><body>
<h1>This swarm is protected</h1>
<p>Its token is the one that the coordinator was started with: --http-token, or THINWIRE_HTTP_TOKEN.</p>
<form action="/" method="get">
<label>Token <input name="token" type="password" required autofocus autocomplete="current-password"></label>
<button>Show it</button></form></body></html>
"""
_ASK_CSP: Final = (
    "default-src 'none'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'; img-src data:; "
    f"style-src 'sha256-{b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()}'"
)


class OnlyWithToken:
    """Whoever shows it may come in: as `Authorization: Bearer TOKEN`, or once as /?token=TOKEN, which sets a
    cookie for a browser."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token.encode()
        self._bearer = f"Bearer {token}".encode()
        # Ports share a host's cookies; and the cookie must not be the token itself.
        self._name = "thinwire-" + self._derived("name")[:16]
        self._value = self._derived("value")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._is_known(scope):
            await self._app(scope, receive, send)
        else:
            await self._answer(scope)(scope, receive, send)

    def _is_known(self, scope: Scope) -> bool:
        headers = dict(scope["headers"])
        if hmac.compare_digest(headers.get(b"authorization", b""), self._bearer):
            return not _shows_token(scope)
        cookie = _cookies(headers.get(b"cookie", b"")).get(self._name, "")
        return hmac.compare_digest(cookie.encode(), self._value.encode()) and not _shows_token(scope)

    def _answer(self, scope: Scope) -> Response:
        """To whoever has shown nothing yet, or the token in the address."""
        shown = _shown(scope)
        if shown is not None and hmac.compare_digest(shown.encode(), self._token):
            there = RedirectResponse("/", 303)  # the token is not to stay in the address
            there.set_cookie(self._name, self._value, max_age=COOKIE_S, httponly=True, samesite="lax")
            return there
        headers = {"www-authenticate": "Bearer", "cache-control": "no-store"}
        accepts = dict(scope["headers"]).get(b"accept", b"")
        if scope["path"] == "/" and b"text/html" in accepts:
            return HTMLResponse(_ASK, 401, {**headers, "content-security-policy": _ASK_CSP})
        return PlainTextResponse("a token is needed\n", 401, headers)

    def _derived(self, purpose: str) -> str:
        return hmac.new(self._token, f"thinwire {purpose}".encode(), hashlib.sha256).hexdigest()


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def names_this_machine(host_header: str) -> bool:
    """Whether a request for this Host, on a loopback address, was meant for this machine.

    A page from elsewhere may have its own name lead here (DNS rebinding); then the name is in this header.
    """
    host = host_header.strip().lower()
    if host.startswith("["):
        host, _, rest = host[1:].partition("]")
        return is_loopback(host) and (not rest or rest.startswith(":"))
    name = host.partition(":")[0]
    return is_loopback(name) or name.endswith(".localhost")


def _shown(scope: Scope) -> str | None:
    """The token in the address of the page."""
    if scope["path"] != "/" or len(scope["query_string"]) > 1000:
        return None
    values = parse_qs(scope["query_string"].decode("latin-1")).get("token")
    return values[0] if values else None


def _shows_token(scope: Scope) -> bool:
    return _shown(scope) is not None


def _cookies(header: bytes) -> dict[str, str]:
    try:
        return {name: morsel.value for name, morsel in SimpleCookie(header.decode("latin-1")).items()}
    except CookieError:
        return {}
