"""Producers of the acknowledged protocol (see `halfstep.stream.protocol`)."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterable, Sequence

import zmq

from halfstep.stream.events import Identity, Message
from halfstep.stream.protocol import Ranges, State, pack_state, unpack
from halfstep.stream.sockets import DEAD_LINKS, Curve, Sockets, address
from halfstep.stream.sources.base import Incoming, Source

_LINGER_S = 5.0  # for the last acknowledgments


class AcknowledgedSource(Source):
    """ROUTER sockets at `urls`, bound or connected, for any number of producers. Each may have `window` events under
    way, twice a part's, so that a part fills while another is written. Afterwards `urls` are the addresses, with the
    ports that `tcp://HOST:*` came to."""

    guarantee = "acknowledged"

    def __init__(self, urls: Sequence[str], *, bind: bool, window: int, curve: Curve | None = None) -> None:
        self._sockets = Sockets(curve)
        self._window = window
        self._engine = uuid.uuid4().hex
        with self._sockets.closed_on_error():
            options = {**DEAD_LINKS, "rcvhwm": 4}
            self._producers = [self._sockets.open(zmq.ROUTER, url, bind=bind, **options) for url in urls]
            self.urls = [address(socket) for socket in self._producers]
            self._states = self._sockets.open(zmq.PULL, "inproc://states", bind=True, rcvhwm=0)
            self._telling = self._sockets.open(zmq.PUSH, "inproc://states", bind=False, sndhwm=0)
        self._lock = threading.Lock()  # of `_telling`, which several threads use
        self._senders: dict[tuple[str, str], tuple[zmq.Socket[bytes], bytes]] = {}
        self._poller = zmq.Poller()
        for socket in (*self._producers, self._states):
            self._poller.register(socket, zmq.POLLIN)

    def receive(self, timeout_s: float) -> Incoming | None:
        ready = dict(self._poller.poll(int(timeout_s * 1000)))
        if self._states in ready:
            self._tell()
        for socket in self._producers:
            if socket in ready:
                return self._incoming(socket)
        return None

    def _incoming(self, socket: zmq.Socket[bytes]) -> Incoming:
        frames = socket.recv_multipart(copy=False)
        sender, parts = frames[0].bytes, [frame.buffer for frame in frames[1:]]

        def load() -> Message:
            message = unpack(parts)
            self._senders[message.run, message.source] = socket, sender
            return message

        raw = parts[2] if len(parts) == 4 else memoryview(b"".join(parts))
        return Incoming(sum(part.nbytes for part in parts), load, raw, "producer")

    def committed(self, identities: Sequence[Identity]) -> None:
        by_producer: dict[tuple[str, str], list[int]] = {}
        for identity in identities:
            by_producer.setdefault(identity[:2], []).append(identity.sequence)
        for (run, source), numbers in by_producer.items():
            self._say(State(run, source, self._engine, self._window, ranges(numbers), [], []))

    def refused(self, identity: Identity, reason: str) -> None:
        run, source, _, sequence = identity
        self._say(State(run, source, self._engine, self._window, [], [], [(sequence, reason)]))

    def answer(self, message: Message, committed: Ranges, leased: Ranges, refused: Ranges) -> None:
        run, source = message.run, message.source
        reasons = [(number, "was refused before") for first, last in refused for number in range(first, last + 1)]
        answers = max((last for _, last in message.asked), default=-1)
        state = State(run, source, self._engine, self._window, committed, leased, reasons, message.ends, answers)
        self._say(state)

    def tell(self) -> None:
        while self._states.poll(0):
            self._tell()

    def close(self) -> None:
        self.tell()
        self._sockets.close(_LINGER_S)

    def _say(self, state: State) -> None:
        with self._lock:
            self._telling.send_multipart([state.run.encode(), state.source.encode(), *pack_state(state)])

    def _tell(self) -> None:
        run, source, *parts = self._states.recv_multipart()
        if found := self._senders.get((run.decode(), source.decode())):
            socket, sender = found
            socket.send_multipart([sender, *parts])  # one who is gone will ask again


def ranges(numbers: Iterable[int]) -> Ranges:
    """First and last of each run of numbers that follow each other."""
    found: Ranges = []
    for number in sorted(numbers):
        if found and number <= found[-1][1] + 1:
            found[-1] = found[-1][0], max(found[-1][1], number)
        else:
            found.append((number, number))
    return found
