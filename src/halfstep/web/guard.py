"""Who may ask a server on this machine, and what its pages may load: an ASGI middleware around any application.

A page of a foreign site can send requests to loopback addresses from its visitor's browser, and can make its own name
point to them (DNS rebinding). So each request and each WebSocket handshake must name this server as its host, and must
come from a page of this server, if from any.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketDisconnect

from halfstep.errors import HalfstepError, InputError

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_ANY_ADDRESS = frozenset({"0.0.0.0", "::", ""})
_POLICY_VIOLATION, _INTERNAL_ERROR = 1008, 1011  # RFC 6455, 7.4.1
_MOST_REASON = 120  # bytes that fit in the frame that closes a WebSocket

_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


class Refusal(InputError):
    """A request that is not done, with the HTTP status that says why: 403 not allowed, 404 not there."""

    def __init__(self, line: str, status: int = 403) -> None:
        super().__init__(line)
        self.status = status


def names_of(host: str) -> frozenset[str] | None:
    """The names under which a server bound to `host` may be asked: those of loopback, and the one given; None for any
    address of this machine, which is asked by addresses or by its own name."""
    return None if host in _ANY_ADDRESS else LOOPBACK_NAMES | {host.lower()}


class Guard:
    """`app` behind checks of Host and Origin. `names`: of hosts that are this server (see `names_of`).

    Answers have headers that let a page load only what comes from this server, unless the application set them itself.
    An error is one plain line; what nobody foresaw is raised again after that, for the server to report.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str] | None = LOOPBACK_NAMES) -> None:
        self._app = app
        self._names = None if names is None else frozenset(names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        is_socket, begun, closed = scope["type"] == "websocket", False, False

        async def guarded(message: Message) -> None:
            nonlocal begun, closed
            begun = begun or message["type"] == "http.response.start"
            closed = closed or message["type"] == "websocket.close"
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            if (why := self._refused(scope)) is not None:
                raise Refusal(why)
            await self._app(scope, receive, guarded)
        except WebSocketDisconnect:
            return  # the page is gone: that is how most of them end
        except Exception as error:
            line, status = _told(error)
            if is_socket and not closed:
                code = _POLICY_VIOLATION if isinstance(error, HalfstepError) else _INTERNAL_ERROR
                await send({"type": "websocket.close", "code": code, "reason": _cut(line)})
            elif not is_socket and not begun:
                await _answer(guarded, line, status)
            if not isinstance(error, (HalfstepError, HTTPException)):
                raise

    def _refused(self, scope: Scope) -> str | None:
        """Why a request is not for us to answer; None when it is."""
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_ours(_name(hosts[0])):
            return f"Host: got {', '.join(hosts)[:80]!r}; expected the name or address that it was started with"
        for origin in headers.getlist("origin"):
            scheme, _, place = origin.partition("://")
            if scheme not in ("http", "https") or place.lower() != hosts[0].lower():
                return f"Origin: got {origin[:80]!r}; this server answers its own pages only"
        site, mode = headers.get("sec-fetch-site", "none"), headers.get("sec-fetch-mode", "")
        if site not in ("same-origin", "none") and (mode != "navigate" or scope.get("method") != "GET"):
            return f"Sec-Fetch-Site: got {site[:20]!r}; this server answers its own pages only"
        return None

    def _is_ours(self, name: str | None) -> bool:
        if name is None:
            return False
        if self._names is not None:
            return name in self._names
        return name in LOOPBACK_NAMES or name == socket.gethostname().lower() or _is_address(name)


def _name(host: str) -> str | None:
    """The name in a Host header, without its port."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port  # which must be a number
    except ValueError:
        return None
    return parts.hostname if parts.netloc == host and "@" not in host else None


def _is_address(name: str) -> bool:
    """Whether a host is named by its address, which no foreign name server can give away."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _told(error: Exception) -> tuple[str, int]:
    """An error as one line, and its HTTP status."""
    if isinstance(error, HTTPException):
        return error.detail, error.status_code
    if isinstance(error, Refusal):
        return str(error), error.status
    if isinstance(error, HalfstepError):
        return str(error), 400 if isinstance(error, InputError) else 500
    return f"unexpected {type(error).__name__}: {error}", 500


def _cut(line: str) -> str:
    return line.encode(errors="replace")[:_MOST_REASON].decode(errors="ignore")


async def _answer(send: Send, line: str, status: int) -> None:
    body = (" ".join(line.split()) + "\n").encode(errors="backslashreplace")
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
