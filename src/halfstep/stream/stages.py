"""The stages of a run: admit | batch | peaks | commit. An event is one lease from the first to the last.

Axes: C panels, H W pixels, B samples of a batch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path

import google_crc32c
import numpy as np
import torch

from halfstep.engine import Ledger, RemoteError, Stage
from halfstep.engine.meter import Meter
from halfstep.errors import FileError, HalfstepError, InputError
from halfstep.files import write_durably
from halfstep.progress import Progress
from halfstep.stream.dead_letters import Loss
from halfstep.stream.events import Array, Event, Fact, Identity, Message, MessageError, Result
from halfstep.stream.model import Computed
from halfstep.stream.parts import Parts
from halfstep.stream.peaks import measure_peaks
from halfstep.stream.prepare import Preparation
from halfstep.stream.seen import Seen, Verdict
from halfstep.stream.sinks.events import EventRow
from halfstep.stream.sinks.facts import check_identity
from halfstep.stream.sources.base import Incoming, Source

_LEASE_BYTES = 6000  # of an event besides its data and samples, as Python and torch hold it

Consumer = Callable[[Result], None]
Submit = Callable[[torch.Tensor], Future[Computed]]


@dataclass(eq=False)
class Lease:
    """An event on its way: its data, its samples until they are computed, and what was found in it so far."""

    event: Event
    crc: int
    samples: torch.Tensor
    origin: str
    received: float  # time.monotonic
    received_at: float  # seconds since 1970
    left: int  # samples that are not computed yet
    size: int  # bytes
    peaks: list[Array] = field(default_factory=list)
    intensities: list[Array] = field(default_factory=list)
    masks: list[Array] = field(default_factory=list)
    outputs: list[Array] = field(default_factory=list)
    retried: bool = False
    problem: str | None = None


@dataclass(frozen=True)
class Read:
    """A message that was read: its events with their checksums and samples, or why they cannot be used."""

    message: Message
    samples: list[torch.Tensor | MessageError]
    crcs: list[int]


def read(incoming: Incoming, prepare: Preparation, meter: Meter) -> Read:
    """Read a message and prepare its events; in any thread. Raises MessageError when it is none."""
    started = time.perf_counter()
    message = incoming.load()
    loaded = time.perf_counter()
    samples: list[torch.Tensor | MessageError] = []
    for event in message.events:
        try:
            if event.data.ndim != 3 or not event.data.size or event.data.dtype.kind not in "uif":
                raise MessageError(
                    f"event: got {event.data.dtype} {list(event.data.shape)}; expected numbers [panels, height, width]"
                )
            samples.append(prepare(event.data))
        except MessageError as error:
            samples.append(error)
    crcs = [google_crc32c.value(_flat(event.data)) for event in message.events]
    if message.events:
        meter.took("decode", loaded - started)
        meter.took("prepare", time.perf_counter() - loaded)
    return Read(message, samples, crcs)


@dataclass(frozen=True)
class Books:
    """What all stages keep account with."""

    ledger: Ledger[Loss]
    seen: Seen
    source: Source
    meter: Meter

    def refuse(self, lease: Lease, reason: str) -> None:
        """Among the dead letters first, then the producer may let go of it."""
        identity = lease.event.identity
        self.ledger.refuse(Loss("refused", reason, lease.origin, identity, _raw(lease.event)))
        self.seen.release(identity, lease.crc)
        self.turn_down(identity, reason)

    def turn_down(self, identity: Identity, reason: str) -> None:
        """Let the producer of an event that is among the dead letters know."""
        self.seen.refuse(identity)
        self.source.refused(identity, reason)


class Ends:
    """Which runs of which sources have ended; with a `path`, also after this process was killed, for a producer says it
    once. `clear` when a run has come to its end: the next one has ends of its own."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.content: dict[tuple[str, str], int | None] = {}
        if path is not None and path.exists():
            try:
                self.content = {(run, source): count for run, source, count in json.loads(path.read_text())}
            except (ValueError, TypeError) as error:
                raise FileError(f"{path}: is damaged ({error}); delete it, and run again") from error

    def note(self, producer: tuple[str, str], count: int | None) -> None:
        known = self.content.get(producer, -1)
        self.content = {**self.content, producer: count}  # others read it meanwhile
        if self._path is not None and known != count:
            write_durably(self._path, json.dumps([[*key, value] for key, value in self.content.items()]).encode())

    def clear(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)


class Admit(Stage[tuple[Incoming, "Future[Read]", float], Lease]):
    """Messages to leases: repeats are left out, what cannot be used is refused, ends are noted."""

    name = "admit"

    def __init__(self, books: Books, workers: int, sources: int, total: int | None, ends: Ends) -> None:
        self._books, self.room = books, 2 * workers  # messages that are read, or soon will be
        self._sources, self._total = sources, total
        self._facts: dict[tuple[str, str], Mapping[str, Fact]] = {}
        self.expected: dict[tuple[str, str], int | None] = {}  # by starts
        self._ends = ends
        self.admitted = self.messages = self.repeats = 0

    def work(self, item: tuple[Incoming, Future[Read], float]) -> Iterator[Lease]:
        incoming, future, received = item
        try:
            content = future.result()
        except MessageError as error:
            self._books.ledger.take()
            self._books.ledger.refuse(Loss("refused", str(error), incoming.origin, error.identity, incoming.raw))
            if error.identity is not None:
                self._books.turn_down(error.identity, str(error))
            self.messages += 1
            return
        message = content.message
        for event, samples, crc in zip(message.events, content.samples, content.crcs, strict=True):
            yield from self._admit(event, samples, crc, incoming, received)
        producer = message.run, message.source
        if message.starts:
            self._facts[producer] = message.facts
            self.expected[producer] = message.expected
        if message.ends:
            self._ends.note(producer, message.expected or self.expected.get(producer))
        if message.asked or message.ends:
            self._books.source.answer(message, *self._books.seen.states(*producer, message.asked))
        self.messages += 1  # last: who waits for it may look at the rest

    def _admit(
        self, event: Event, samples: torch.Tensor | MessageError, crc: int, incoming: Incoming, received: float
    ) -> Iterator[Lease]:
        books, identity = self._books, event.identity
        books.ledger.take()
        try:
            check_identity(identity)
        except InputError as error:
            books.ledger.refuse(Loss("refused", str(error), incoming.origin, raw=_raw(event)))
            books.turn_down(identity, str(error))
            return
        if known := self._facts.get(identity[:2]):
            event = replace(event, facts={**known, **event.facts})
        verdict = books.seen.lease(identity, crc)
        if verdict in (Verdict.LEASED, Verdict.COMMITTED):
            books.ledger.skip()
            self.repeats += 1
            if verdict is Verdict.COMMITTED:
                books.source.committed([identity])
            return
        size = event.data.nbytes + (samples.nbytes if isinstance(samples, torch.Tensor) else 0) + _LEASE_BYTES
        now = time.time() - (time.monotonic() - received)
        lease = Lease(event, crc, torch.empty(0), incoming.origin, received, now, 0, size)
        if verdict is Verdict.OTHER:
            reason = f"event {identity.sequence} of {identity.source}: another event had this number before"
            books.ledger.refuse(Loss("refused", reason, incoming.origin, identity, _raw(event)))
            books.source.refused(identity, reason)
        elif isinstance(samples, MessageError):
            books.refuse(lease, str(samples))
        else:
            lease.samples, lease.left = samples, len(samples)
            self.admitted += 1
            yield lease

    @property
    def ends(self) -> dict[tuple[str, str], int | None]:
        """Runs and sources that have ended, and how many events they had, where they told."""
        return self._ends.content

    @property
    def finished(self) -> bool:
        """Whether all that is to come has come."""
        if self._total is not None and self.admitted >= self._total:
            return True
        if len({source for _, source in self.ends}) < self._sources:
            return False
        if self._books.source.guarantee != "acknowledged":
            return True
        return not any(self._books.seen.gaps(*producer, count) for producer, count in self.ends.items())


@dataclass(frozen=True)
class Batch:
    """`rows` say which sample of which lease stands where; `computed` will be what the network makes of them."""

    rows: list[tuple[Lease, int]]
    computed: Future[Computed]
    launched: float


class Gather(Stage[Lease, Batch]):
    """Samples to batches of one size, the last one padded with zeros. None waits longer than `most_wait_s`."""

    name = "batch"

    def __init__(
        self, books: Books, submit: Submit, batch_size: int, most_wait_s: float, room: int, drops: bool
    ) -> None:
        self._books, self._submit, self._batch_size, self._most_wait_s = books, submit, batch_size, most_wait_s
        self.room, self.drops = room, drops
        self._rows: list[tuple[Lease, int]] = []
        self._since = 0.0

    def size(self, item: Lease) -> int:
        return item.size

    def drop(self, item: Lease) -> None:
        identity = item.event.identity
        self._books.ledger.drop(Loss("dropped", "made room for newer events", item.origin, identity))
        self._books.seen.release(identity, item.crc)
        self._books.seen.refuse(identity)  # its number is known

    def work(self, item: Lease) -> Iterator[Batch]:
        for place in range(len(item.samples)):
            if self._rows and self._rows[0][0].samples.shape[1:] != item.samples.shape[1:]:
                yield from self.flush()
            if not self._rows:
                self._since = time.monotonic()
            self._rows.append((item, place))
            if len(self._rows) == self._batch_size:
                yield from self.flush()

    def deadline(self) -> float | None:
        return self._since + self._most_wait_s if self._rows else None

    def flush(self) -> Iterator[Batch]:
        if self._rows:
            rows, self._rows = self._rows, []
            yield launch(rows, self._submit, self._batch_size)


def launch(rows: list[tuple[Lease, int]], submit: Submit, batch_size: int) -> Batch:
    """Send samples to a lane, as a batch of the full size."""
    first = rows[0][0].samples
    samples = torch.zeros((batch_size, *first.shape[1:]), dtype=first.dtype)
    for row, (lease, place) in enumerate(rows):
        samples[row] = lease.samples[place]
    return Batch(rows, submit(samples), time.monotonic())


class FindPeaks(Stage[Batch, Lease]):
    """What was computed, back to the events: their peaks, in the wire's pixels, with the wire's values."""

    name = "peaks"

    def __init__(
        self, books: Books, submit: Submit, prepare: Preparation, batch_size: int, lanes: int, masks: bool
    ) -> None:
        self._books, self._submit, self._prepare = books, submit, prepare
        self._batch_size, self._masks = batch_size, masks
        self.room = lanes + 1

    def work(self, item: Batch) -> Iterator[Lease]:
        meter = self._books.meter
        try:
            computed = item.computed.result()
        except RemoteError as error:
            yield from self._one_by_one(item, error)
            return
        meter.add("busy_s", computed.seconds)
        meter.add("samples", len(item.rows))
        meter.took("compute", time.monotonic() - item.launched)
        started = time.perf_counter()
        for row, reason in computed.refused.items():
            if row < len(item.rows):
                item.rows[row][0].problem = reason
        for row in computed.retried:
            if row < len(item.rows):
                item.rows[row][0].retried = True
        if computed.masks is not None:
            self._find(item.rows, computed.masks)
        elif computed.outputs is not None:
            for (lease, _), output in zip(item.rows, computed.outputs, strict=False):
                lease.outputs.append(output)
        meter.took("peaks", time.perf_counter() - started)
        yield from self._settled(item.rows)

    def _find(self, rows: list[tuple[Lease, int]], masks: Array) -> None:
        """Panels of one shape and type together."""
        start = 0
        while start < len(rows):
            data = rows[start][0].event.data
            end = start + 1
            while end < len(rows) and _alike(rows[end][0].event.data, data):
                end += 1
            top, left = self._prepare.offset(data.shape)
            cropped = masks[start:end, top : top + data.shape[1], left : left + data.shape[2]]
            values = np.stack([self._values(lease, place) for lease, place in rows[start:end]])
            peaks, intensities = measure_peaks(cropped, values)
            bounds = np.searchsorted(peaks[:, 0], np.arange(end - start + 1))
            for at, (lease, place) in enumerate(rows[start:end]):
                own = slice(bounds[at], bounds[at + 1])
                found = peaks[own].copy()
                found[:, 0] = place
                lease.peaks.append(found)
                lease.intensities.append(intensities[own])
                if self._masks:
                    lease.masks.append(cropped[at].copy())
            start = end

    def _values(self, lease: Lease, place: int) -> Array:
        data = lease.event.data
        if self._prepare.channels == 1:
            panel: Array = data[place]
            return panel
        mean: Array = data.mean(axis=0, dtype=np.float32)
        return mean

    def _one_by_one(self, batch: Batch, error: RemoteError) -> Iterator[Lease]:
        """An actor died of this batch each time: find the sample that kills it, and refuse its event alone."""
        if len(batch.rows) == 1:
            batch.rows[0][0].problem = str(error)
            yield from self._settled(batch.rows)
            return
        for row in batch.rows:
            yield from self.work(launch([row], self._submit, self._batch_size))

    def _settled(self, rows: list[tuple[Lease, int]]) -> Iterator[Lease]:
        for lease, _ in rows:
            lease.left -= 1
            if lease.left:
                continue
            lease.samples = lease.samples[:0]
            if lease.problem is None:
                yield lease
            else:
                self._books.refuse(lease, lease.problem)


class Commit(Stage[Lease, None]):
    """Results to consumers and into parts: a part is `events` results, or `part_bytes`, or what there is when nothing
    has come for `idle_s` or the first has waited `most_wait_s`. Only then are its events acknowledged.

    When a part cannot be written it is tried again, ever more slowly, for `patience_s`; meanwhile nothing more comes
    in, and all leases are kept. Then the error ends the run.
    """

    name = "commit"
    room = 64

    def __init__(
        self,
        books: Books,
        parts: Parts | None,
        consumers: Sequence[Consumer],
        progress: Progress,
        stopping: Callable[[], bool],
        network: str,
        *,
        events: int = 100,
        part_bytes: int = 1 << 30,
        idle_s: float = 0.5,
        most_wait_s: float = 5.0,
        patience_s: float = 60.0,
    ) -> None:
        self._books, self._parts, self._consumers, self._progress = books, parts, consumers, progress
        self._stopping, self._network = stopping, network
        self._events, self._part_bytes, self._idle_s, self._most_wait_s = events, part_bytes, idle_s, most_wait_s
        self._patience_s = patience_s
        self._rows: list[tuple[Lease, EventRow]] = []
        self._bytes = 0
        self._first = self._latest = 0.0
        self.parts = 0

    def work(self, item: Lease) -> Iterable[None]:
        result = _result(item)
        if self._rows and not _alike(self._rows[0][0].event.data, item.event.data, panels=True):
            self.flush()  # a file has events of one shape
        for consume in self._consumers:
            consume(result)
        self._latest = time.monotonic()
        if not self._rows:
            self._first = self._latest
        self._rows.append((item, EventRow(result, item.retried, item.crc, item.received_at, self._network)))
        self._bytes += item.size
        if len(self._rows) >= self._events or self._bytes >= self._part_bytes or self._parts is None:
            self.flush()
        return ()

    def deadline(self) -> float | None:
        return min(self._first + self._most_wait_s, self._latest + self._idle_s) if self._rows else None

    def flush(self) -> Iterable[None]:
        if not self._rows:
            return ()
        if self._parts is not None:
            started = time.perf_counter()
            written = self._persist(self._parts, [row for _, row in self._rows])
            self._books.meter.took("commit", time.perf_counter() - started)
            self._books.meter.add("written_bytes", written)
            self.parts += 1
        now, meter = time.monotonic(), self._books.meter
        leases = [lease for lease, _ in self._rows]
        for lease, row in self._rows:
            self._books.seen.commit(lease.event.identity, lease.crc)
            self._books.ledger.give(retried=lease.retried)
            meter.took("whole", now - lease.received)
            meter.add("peaks", len(row.result.peaks))
        meter.came_out(len(leases))
        self._books.source.committed([lease.event.identity for lease in leases])
        self._rows, self._bytes = [], 0
        self._progress.advance(len(leases))
        return ()

    def _persist(self, parts: Parts, rows: list[EventRow]) -> int:
        latest = time.monotonic() + self._patience_s
        delay = 0.1
        while True:
            try:
                return parts.commit(rows)
            except FileError as error:
                if time.monotonic() + delay > latest or self._stopping():
                    raise
                self._progress.note(f"{error}; tried again in {delay:.1f} s, nothing is acknowledged meanwhile")
            again = time.monotonic() + delay
            while time.monotonic() < again and not self._stopping():
                time.sleep(0.1)
            delay = min(2 * delay, 5.0)


def _result(lease: Lease) -> Result:
    empty = np.zeros((0, 3), np.float32)
    peaks = np.concatenate([empty, *lease.peaks])
    intensities = np.concatenate([empty[:, 0], *lease.intensities])
    masks = np.stack(lease.masks) if lease.masks else None
    output = np.stack(lease.outputs) if lease.outputs else None
    return Result(lease.event, peaks, intensities, masks, output)


def _alike(a: Array, b: Array, panels: bool = False) -> bool:
    return a.dtype == b.dtype and a.shape[0 if panels else 1 :] == b.shape[0 if panels else 1 :]


def _flat(data: Array) -> Array:
    """Its bytes, without a copy where they are in one piece."""
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8)


def _raw(event: Event) -> memoryview:
    return _flat(event.data).data


def failure_line(error: BaseException) -> str:
    """What ended a run, for its record."""
    return str(error) if isinstance(error, HalfstepError) else f"{type(error).__name__}: {error}"
