"""serve(app): an ASGI application on an address of this machine, behind its guard, until Ctrl-C."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress

import uvicorn
from starlette.types import ASGIApp

from halfstep.errors import InputError
from halfstep.web.guard import LOOPBACK_NAMES, Guard, names_of

LOOPBACK = "127.0.0.1"
_BACKLOG = 128
_PATIENCE_S = 2  # for answers that are under way when the server ends


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server on `host`."""
    return host in LOOPBACK_NAMES


class _Server(uvicorn.Server):
    """Tells when it can be asked, and ended by Ctrl-C; says nothing of answers that it cuts off at its end, which
    somebody asked for."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None], over: Callable[[], bool]) -> None:
        super().__init__(config)
        self._ready, self._over = ready, over

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._over()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)


def serve(
    app: ASGIApp,
    *,
    host: str = LOOPBACK,
    port: int = 0,
    listening: Callable[[str], None],
    over: Callable[[], bool] = lambda: False,
) -> None:
    """Serve `app` behind a `Guard` until Ctrl-C or SIGTERM, or until `over` says so, from the main thread.

    `port` 0 takes any that is free. `listening` is called once with the URL, as soon as it can be asked. Raises
    InputError when the address cannot be had.
    """
    with _listen(host, port) as listener:
        url = _url(host, listener.getsockname()[1])
        config = uvicorn.Config(
            Guard(app, names_of(host)),
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=_PATIENCE_S,
        )
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            with suppress(KeyboardInterrupt):  # uvicorn raises signals again once it has ended: that is how one leaves
                _Server(config, lambda: listening(url), over).run(sockets=[listener])
        finally:
            signal.signal(signal.SIGTERM, before)


def _listen(host: str, port: int) -> socket.socket:
    """Bound before anything is served, so that what is wrong with the address is one line."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise InputError(f"--host: got {host!r}; expected a name or address of this machine ({error})") from error
    listener = socket.socket(found[0], socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(found[4])
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"--port: {port} is taken on {host}; give another, or 0 for any that is free") from error
        what = os.strerror(error.errno) if error.errno else str(error)
        raise InputError(f"--host, --port: cannot listen on {host}, port {port} ({what}); give others") from error
    return listener


def _url(host: str, port: int) -> str:
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/"
