"""Live consumers of results, over ZeroMQ. Nothing is kept for them: what must not be lost goes to files."""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

import zmq

from halfstep.errors import HalfstepError
from halfstep.stream.events import Result
from halfstep.stream.sinks.messages import crystfel_message, result_message
from halfstep.stream.sockets import Curve, Sockets, address

PUSH_URL = "tcp://127.0.0.1:5003"
CRYSTFEL_URL = "tcp://127.0.0.1:5002"  # the address in CrystFEL's manual

_HELD_MESSAGES = 5  # for each consumer, as lclstreamer's
_LINGER_S = 1.0
_ANSWER_WITHIN_S = 2.5  # indexamajig waits for 3 s
_NOTHING_YET = b""  # it takes a message of at most 15 bytes for none, and asks again
_LARGEST_REQUEST_BYTES = 4096


class ConsumerError(HalfstepError):
    """A live consumer does not take what is sent to it, or what serves it has ended."""


class Pusher:
    """Sends results to whoever pulls: each to one of the consumers, which must be there. For one thread.

    A message is what `result_message` makes.
    """

    def __init__(
        self, url: str = PUSH_URL, bind: bool = True, curve: Curve | None = None, timeout_s: float = 10.0
    ) -> None:
        """Binds or connects, "tcp://127.0.0.1:*" to a free port. `url` is then the address itself. Raises InputError
        at once where that cannot be done."""
        self._sockets = Sockets(curve)
        options = {"sndhwm": _HELD_MESSAGES, "sndtimeo": round(timeout_s * 1000)}
        with self._sockets.closed_on_error():
            # Queued for nobody is not taken.
            self._socket = self._sockets.open(zmq.PUSH, url, bind=bind, immediate=1, **options)
        self.url = address(self._socket)
        self._timeout_s = timeout_s

    def send(self, results: Sequence[Result]) -> None:
        """Send each of `results`, waiting for a consumer that has room. Raises ConsumerError when none had within
        `timeout_s`: what was sent before stays sent. A consumer that ends loses what it has not read."""
        for number, result in enumerate(results):
            try:
                self._socket.send(result_message(result), copy=False)
            except zmq.Again:
                raise ConsumerError(
                    f"{self.url}: nobody took a result within {self._timeout_s:g} s, after {number} of {len(results)}; "
                    "start a consumer, or a faster one"
                ) from None

    def close(self) -> None:
        """Give what is under way a second to arrive, and end."""
        self._sockets.close(_LINGER_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class CrystfelResponder:
    """Hands hits to `indexamajig --zmq-input=URL --zmq-request=next --data-format=msgpack --peaks=msgpack`, any number
    of them, each hit to one. The geometry is that of `geometry(..., live=True)`.

    It is a look at what is there now: `capacity` hits wait to be asked for, then the oldest makes room and is counted
    in `dropped`. `taken` counts the hits that were sent.
    """

    def __init__(self, url: str = CRYSTFEL_URL, capacity: int = 16) -> None:
        """Binds, and answers in a thread of its own. Raises InputError at once where it cannot bind."""
        self._sockets = Sockets()
        with self._sockets.closed_on_error():
            # No REP: that answers one after the other, and with nothing to send each would wait for those before it.
            # Mandatory, so that a hit for a client that has gone is kept.
            options = {"router_mandatory": 1, "maxmsgsize": _LARGEST_REQUEST_BYTES}
            self._socket = self._sockets.open(zmq.ROUTER, url, bind=True, **options)
        self.url = address(self._socket)
        self.taken = self.dropped = 0
        self._hits: deque[Result] = deque()
        self._capacity = capacity
        self._lock = threading.Lock()
        self._closing = False
        self._bell, self._bell_pull = os.pipe()
        os.set_blocking(self._bell_pull, False)
        self._thread = threading.Thread(target=self._serve, name="crystfel", daemon=True)
        self._thread.start()

    def offer(self, hit: Result) -> None:
        """Let a hit be asked for. Never waits. Raises ConsumerError when the thread that answers has ended."""
        if not self._thread.is_alive():
            raise ConsumerError(f"{self.url}: no longer answers; start the run again")
        with self._lock:
            if len(self._hits) == self._capacity:
                self._hits.popleft()
                self.dropped += 1
            self._hits.append(hit)
        self._ring()

    def close(self) -> None:
        """End at once. Hits that nobody asked for are dropped."""
        if self._closing:
            return
        self._closing = True
        self._ring()
        self._thread.join()
        self._sockets.close()
        os.close(self._bell)
        os.close(self._bell_pull)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _ring(self) -> None:
        with suppress(BlockingIOError):  # it has been rung often enough
            os.write(self._bell_pull, b"!")

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._bell, zmq.POLLIN)
        asked: deque[tuple[float, list[bytes]]] = deque()  # until when, and by whom; the oldest first
        message = None
        while not self._closing:
            wait_ms = math.ceil(max(0, asked[0][0] - time.monotonic()) * 1000) if asked else None
            for rung, _ in poller.poll(wait_ms):
                if rung == self._bell:
                    os.read(self._bell, 4096)
                else:
                    *envelope, _ = self._socket.recv_multipart()
                    asked.append((time.monotonic() + _ANSWER_WITHIN_S, envelope))
            while asked and (message := message or self._next_message()):
                if self._reply(asked.popleft()[1], message):
                    self.taken += 1
                    message = None
            while asked and asked[0][0] <= time.monotonic():
                self._reply(asked.popleft()[1], _NOTHING_YET)
        self.dropped += len(self._hits) + (message is not None)

    def _next_message(self) -> bytes | None:
        with self._lock:
            if not self._hits:
                return None
            hit = self._hits.popleft()
        return crystfel_message(hit)

    def _reply(self, envelope: list[bytes], message: bytes) -> bool:
        """False where the client has gone."""
        try:
            self._socket.send_multipart([*envelope, message], zmq.NOBLOCK, copy=False)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        return True
