"""ZeroMQ sockets as they are used here: bound or connected, with errors that name the address."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from halfstep.errors import InputError

# A link that is down is noticed within some ten seconds, and connected anew. By TCP itself: libzmq's heartbeats abort
# the process when they meet a closing connection (`!_io_error` in stream_engine_base.cpp, libzmq 4.3.5).
DEAD_LINKS = {
    "tcp_keepalive": 1,
    "tcp_keepalive_idle": 5,
    "tcp_keepalive_intvl": 2,
    "tcp_keepalive_cnt": 3,
    "tcp_maxrt": 10_000,
}


@dataclass(frozen=True)
class Curve:
    """CURVE encryption (RFC 26/ZMTP). `secret`: this side's certificate file, with its secret key. The side that binds
    lets in the certificates in the folder `clients`; the side that connects knows the other's public one, `server`."""

    secret: Path
    clients: Path | None = None
    server: Path | None = None


class Sockets:
    """Sockets of one context, closed together."""

    def __init__(self, curve: Curve | None = None) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self._curve = curve
        self._authenticator: ThreadAuthenticator | None = None
        self._open: list[zmq.Socket[Any]] = []

    def open(self, kind: int, url: str, *, bind: bool, **options: int) -> zmq.Socket[Any]:
        """A socket with `options` set, bound or connected to `url`. Raises InputError when it cannot be."""
        socket: zmq.Socket[Any] = self.context.socket(kind)
        self._open.append(socket)
        for name, value in {"linger": 0, **options}.items():
            socket.setsockopt(getattr(zmq, name.upper()), value)
        if self._curve is not None and not url.startswith("inproc:"):
            self._encrypt(socket, bind=bind)
        try:
            socket.bind(url) if bind else socket.connect(url)
        except zmq.ZMQError as error:
            if error.errno == errno.EADDRINUSE:
                raise InputError(f"{url}: is taken by another process; end it, or name another port") from error
            what = "listen there" if bind else "connect"
            raise InputError(
                f"{url}: cannot {what} ({error.strerror}); expected tcp://HOST:PORT or ipc://PATH"
            ) from error
        return socket

    @contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """Close all of them when the block fails."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def close(self, linger_s: float = 0.0) -> None:
        """Close all of them; for `linger_s` what was sent may still go out."""
        if self._authenticator is not None:
            self._authenticator.stop()
        for socket in self._open:
            socket.close(linger=int(linger_s * 1000))
        self._open = []
        self.context.term()

    def _encrypt(self, socket: zmq.Socket[Any], *, bind: bool) -> None:
        curve = self._curve
        assert curve is not None
        public, secret = _certificate(curve.secret)
        if secret is None:
            raise InputError(f"{curve.secret}: holds no secret key; name the .key_secret file")
        socket.curve_publickey, socket.curve_secretkey = public, secret
        if bind:
            if curve.clients is None:
                raise InputError("curve.clients: is not given; expected the folder of allowed certificates")
            if self._authenticator is None:
                self._authenticator = ThreadAuthenticator(self.context)
                self._authenticator.start()
                self._authenticator.configure_curve(domain="*", location=str(curve.clients))
            socket.curve_server = True
        else:
            if curve.server is None:
                raise InputError("curve.server: is not given; expected the other side's certificate")
            socket.curve_serverkey = _certificate(curve.server)[0]


def address(socket: zmq.Socket[Any]) -> str:
    """Where a socket is bound or connected to, with its port."""
    return socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")


def _certificate(path: Path) -> tuple[bytes, bytes | None]:
    try:
        return zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: is no ZeroMQ certificate ({error})") from error
