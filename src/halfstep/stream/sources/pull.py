"""Messages that producers push over ZeroMQ, in the formats that they send."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import zmq

from halfstep.stream.events import Message, MessageError
from halfstep.stream.sockets import Curve, Sockets, address
from halfstep.stream.sources.base import Guarantee, Incoming, Source

_WAITING = 4  # messages that libzmq may hold for us: those are lost when this process dies


class PullSource(Source):
    """PULL sockets at `urls`, bound or connected; `decode` reads a message. Between several sockets whichever has a
    message is read, in turn. Afterwards `urls` are their addresses with the ports that `tcp://HOST:*` came to.

    A producer that ends at once after its last message loses some of them over `ipc://`: what it has sent and we have
    not read goes with its connection. Over TCP it is kept.
    """

    def __init__(
        self,
        urls: Sequence[str],
        decode: Callable[[memoryview], Message],
        *,
        bind: bool,
        numbered: bool = False,
        curve: Curve | None = None,
    ) -> None:
        self.guarantee: Guarantee = "numbered" if numbered else "unnumbered"
        self._decode = decode
        self._sockets = Sockets(curve)
        with self._sockets.closed_on_error():
            opened = [self._sockets.open(zmq.PULL, url, bind=bind, rcvhwm=_WAITING) for url in urls]
        self._urls = {socket: address(socket) for socket in opened}
        self.urls = list(self._urls.values())
        self._poller = zmq.Poller()
        for socket in self._urls:
            self._poller.register(socket, zmq.POLLIN)
        self._ready: list[zmq.Socket[bytes]] = []

    def receive(self, timeout_s: float) -> Incoming | None:
        if not self._ready:
            self._ready = [socket for socket, _ in self._poller.poll(int(timeout_s * 1000))]
        if not self._ready:
            return None
        socket = self._ready.pop()
        frames = socket.recv_multipart(copy=False)
        parts = [frame.buffer for frame in frames]
        whole = parts[0] if len(parts) == 1 else memoryview(b"".join(parts))

        def load() -> Message:
            if len(parts) != 1:
                raise MessageError(f"message: got {len(parts)} parts; expected one")
            return self._decode(whole)

        return Incoming(whole.nbytes, load, whole, self._urls[socket])

    def close(self) -> None:
        self._sockets.close()
