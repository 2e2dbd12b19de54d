"""Producers, for tests and for users without one: events from files or at random, sent in any of the formats."""

from __future__ import annotations

import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import zmq

from halfstep.data.diffraction import diffraction_frame
from halfstep.errors import HalfstepError, InputError
from halfstep.progress import SILENT, Progress
from halfstep.stream.events import Event, Identity, MessageError
from halfstep.stream.formats import dectris, hdf5, npz
from halfstep.stream.protocol import FIRST_WINDOW, State, pack_ask, pack_end, pack_event, unpack_state
from halfstep.stream.sockets import DEAD_LINKS, Curve, Sockets

SEND_FORMATS = ("halfstep", "npz", "hdf5", "dectris")

_WAITING = 4  # messages that libzmq may hold
_ASK_AFTER_S = 1.0
_POLL_S = 0.1
_FAREWELL_S = 30.0


class SendError(HalfstepError):
    """Events could not be delivered."""


@dataclass(frozen=True)
class SendReport:
    """`sent` events; of the acknowledged protocol also how many were sent again, and what was refused, by number."""

    sent: int
    seconds: float
    resent: int = 0
    refused: dict[int, str] | None = None


def send(
    events: Iterable[Event],
    url: str,
    *,
    format: str = "halfstep",
    bind: bool = False,
    source: str = "sender",
    run: str | None = None,
    curve: Curve | None = None,
    give_up_s: float = 600.0,
    stopping: Callable[[], bool] = lambda: False,
    progress: Progress = SILENT,
) -> SendReport:
    """Send `events` in their order, which numbers them, to an engine at `url`.

    In the format `halfstep` an event is kept until it is acknowledged; the others are pushed, and what libzmq holds
    when the engine dies is lost. `run` names this run: a producer that goes on with an earlier one's events gives the
    same. Raises InputError for a format that is not known or an address that cannot be used, SendError when nothing was
    heard of an engine for `give_up_s`.
    """
    if format not in SEND_FORMATS:
        raise InputError(f"--format: got {format!r}; expected one of {', '.join(SEND_FORMATS)}")
    sockets = Sockets(curve)
    started = time.monotonic()
    try:
        if format == "halfstep":
            name = run or uuid.uuid4().hex
            options = {**DEAD_LINKS, "sndhwm": _WAITING, "immediate": 1}
            socket = sockets.open(zmq.DEALER, url, bind=bind, reconnect_ivl_max=2000, **options)
            sender = _Sender(socket, name, source, give_up_s, stopping, progress)
            sender.send(events)
            return SendReport(sender.sent, time.monotonic() - started, sender.resent, sender.refused)
        socket = sockets.open(zmq.PUSH, url, bind=bind, sndhwm=_WAITING, immediate=1)
        sent = 0
        for message, count in _messages(events, format, run or uuid.uuid4().hex):
            _push(socket, message, url, give_up_s, stopping)
            sent += count
            progress.advance(count)
        return SendReport(sent, time.monotonic() - started)
    finally:
        sockets.close(linger_s=min(give_up_s, 30.0) if format != "halfstep" else 1.0)


def _messages(events: Iterable[Event], format: str, run: str) -> Iterator[tuple[bytes, int]]:
    """Messages, and how many events each has."""
    if format == "dectris":
        yield dectris.encode_start(run, 0), 0
    for number, event in enumerate(events):
        if format == "npz":
            yield npz.encode([event]), 1
        elif format == "hdf5":
            paths = {name: f"/data/{name}" for name in ("data", *event.facts)}
            yield hdf5.encode([event], paths), 1
        else:
            yield dectris.encode_image(run, number, event.data), 1
    if format == "dectris":
        yield dectris.encode_end(run), 0


def _push(socket: zmq.Socket[bytes], message: bytes, url: str, give_up_s: float, stopping: Callable[[], bool]) -> None:
    latest = time.monotonic() + give_up_s
    while not socket.poll(int(_POLL_S * 1000), zmq.POLLOUT):
        if stopping():
            raise KeyboardInterrupt
        if time.monotonic() > latest:
            raise SendError(f"{url}: no engine took a message within {give_up_s:g} s; start one, or name its address")
    socket.send(message, copy=False)


class _Sender:
    """A producer of the acknowledged protocol."""

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        run: str,
        source: str,
        give_up_s: float,
        stopping: Callable[[], bool],
        progress: Progress,
    ) -> None:
        self._socket, self._run, self._source = socket, run, source
        self._give_up_s, self._stopping, self._progress = give_up_s, stopping, progress
        self._open: OrderedDict[int, Event] = OrderedDict()  # not acknowledged yet
        self._window = FIRST_WINDOW
        self._heard = self._asked = time.monotonic()
        self._ended = False
        self._engine = ""
        self.sent = self.resent = 0
        self.refused: dict[int, str] = {}

    def send(self, events: Iterable[Event]) -> None:
        count = 0
        for event in events:
            while len(self._open) >= self._window:
                self._listen(_POLL_S)
            identity = event.identity
            numbered = replace(event, identity=identity._replace(run=self._run, source=self._source, sequence=count))
            self._open[count] = numbered
            self._give(numbered)
            count += 1
            self._listen(0)
        while self._open:
            self._listen(_POLL_S)
        latest = time.monotonic() + min(_FAREWELL_S, self._give_up_s)
        while not self._ended and time.monotonic() < latest:  # nothing is at stake any more
            if self._socket.poll(0, zmq.POLLOUT):
                self._socket.send_multipart(pack_end(self._run, self._source, count))
            self._listen(_ASK_AFTER_S)

    def _give(self, event: Event) -> None:
        while not self._socket.poll(int(_POLL_S * 1000), zmq.POLLOUT):
            self._listen(0)
        self._socket.send_multipart(pack_event(event), copy=False)

    def _listen(self, timeout_s: float) -> None:
        """Hear what the engine says, if it does; ask when it has been silent for long."""
        if self._stopping():
            raise KeyboardInterrupt
        while self._socket.poll(int(timeout_s * 1000)):
            timeout_s = 0
            try:
                state = unpack_state(self._socket.recv_multipart())
            except MessageError:
                continue  # damaged on the way; it will be asked for again
            self._heard = time.monotonic()
            if (state.run, state.source) == (self._run, self._source):
                self._take(state)
        now = time.monotonic()
        if self._open and now - self._heard > self._give_up_s:
            raise SendError(
                f"nothing was heard of an engine for {self._give_up_s:g} s; {len(self._open)} of {self.sent} events "
                f"are not acknowledged: start the engine, and send them again with the same run, {self._run}"
            )
        if now - max(self._heard, self._asked) > _ASK_AFTER_S and self._open and self._socket.poll(0, zmq.POLLOUT):
            self._asked = now
            ranges = [(min(self._open), max(self._open))]
            self._socket.send_multipart(pack_ask(self._run, self._source, ranges))

    def _take(self, state: State) -> None:
        self._window = state.window
        self._ended = state.ended or (self._ended and state.engine == self._engine)
        self._engine = state.engine
        before = len(self._open)
        for first, last in state.committed:
            for number in range(first, last + 1):
                self._open.pop(number, None)
        for number, reason in state.refused:
            if self._open.pop(number, None) is not None:
                self.refused[number] = reason
        self.sent += before - len(self._open)
        self._progress.advance(before - len(self._open))
        if state.answers >= 0:
            known = {number for first, last in state.leased for number in range(first, last + 1)}
            for number in [number for number in self._open if number not in known and number <= state.answers]:
                if number in self._open:  # giving listens too
                    self.resent += 1
                    self._give(self._open[number])


def simulated(count: int, size: tuple[int, int], seed: int = 0) -> Iterator[Event]:
    """Simulated diffraction: `count` events of one panel, uint16 of `size` (height, width)."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        frame = diffraction_frame(rng, size)
        yield Event(Identity("", "", str(number)), frame.values[None], {"timestamp": number / 120})
