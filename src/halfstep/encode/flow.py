"""The flow of one process: read and decode -> batches across sequences -> lanes -> writer, each on its own threads.

Events travel with the batches, and batches come back in order, so the writer sees each sequence whole and one after the
other however many are under way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from halfstep.data.base import Array, FrameSequence, Problem, SourceError
from halfstep.encode.counts import Counts, Failure
from halfstep.encode.encoder import Encoded, EncoderLanes
from halfstep.encode.filling import StoreFiller
from halfstep.encode.job import EncodeJob
from halfstep.encode.plan import Event, Failed, Reuse, Sample, Skipped, ahead, plan
from halfstep.engine import Flow, Ledger, Stage, stop_request
from halfstep.progress import Progress
from halfstep.store.index import Row
from halfstep.store.writer import DatasetWriter


@dataclass
class _Batch:
    """Events in order, and the stacked pixels of the samples among them."""

    events: list[Event] = field(default_factory=list)
    values: list[Array] = field(default_factory=list)


_Encoding = tuple[_Batch, Future[Encoded] | None]


class _Write(Stage[_Encoding, None]):
    """The last stage: it waits for the batches in their order."""

    name = "write"

    def __init__(self, filler: StoreFiller, lanes: int) -> None:
        self._filler = filler
        self.room = lanes + 1

    def work(self, item: _Encoding) -> Iterable[None]:
        batch, future = item
        self._filler.carry_out(batch.events, future.result() if future is not None else None)
        return ()


def run(
    job: EncodeJob,
    sequences: list[FrameSequence],
    existing: Mapping[str, Row],
    lanes: EncoderLanes,
    writer: DatasetWriter,
    progress: Progress,
) -> Counts:
    """Bring the store up to date with `sequences` and return what was done; `progress` hears of items, and of the bytes
    written for them, as they finish.

    Raises StoppedError at the first failure when the job is strict, and KeyboardInterrupt when the process was asked to
    stop, once what was under way is done. When it is left by an exception, sequences that were complete by then are
    committed, unless the store itself failed.
    """
    failures: list[Failure] = []
    ledger: Ledger[Failure] = Ledger(failures.append)
    filler = StoreFiller(job, existing, writer, ledger, failures, progress)
    with stop_request() as stop, ThreadPoolExecutor(job.workers, "decode") as decode:
        try:
            with Flow(_Write(filler, lanes.count)) as flow:
                events = _booked(plan(job, sequences, existing, decode), ledger)
                for batch in _batches(job, ahead(events, 2 * job.batch_size + 2 * job.workers)):
                    flow.put((batch, lanes.submit(_stack(job, batch.values)) if batch.values else None))
                    if stop:
                        break
            if stop:
                raise KeyboardInterrupt
        except BaseException as error:
            decode.shutdown(cancel_futures=True)
            if not isinstance(error, OSError):
                writer.abandon()
                writer.commit()
            raise
    return filler.counts


def _booked(events: Iterable[Event], ledger: Ledger[Failure]) -> Iterator[Event]:
    """The same events; the items in them have come in."""
    for event in events:
        match event:
            case Sample() | Reuse() | Failed():
                ledger.take()
            case Skipped(row):
                ledger.take(row.length)
        yield event


def _batches(job: EncodeJob, events: Iterable[Event]) -> Iterator[_Batch]:
    """Group events so that each batch but the last is full; a sample whose pixels cannot be had becomes a failure."""
    copies = 2 if job.mirror else 1
    room = max(1, job.batch_size // copies)
    batch = _Batch()
    for event in events:
        if isinstance(event, Sample):
            try:
                clip = np.stack([future.result() for future in event.pixels])
            except SourceError as error:
                batch.events.append(Failed(event.sequence, Problem(str(error), event.number), attempted=True))
                continue
            batch.values.append(clip)
        batch.events.append(event)
        # Batches without pixels move on too: a rerun that skips everything must not pile up its events.
        if len(batch.values) == room or len(batch.events) >= 4 * room + 256:
            yield batch
            batch = _Batch()
    if batch.events:
        yield batch


def _stack(job: EncodeJob, values: list[Array]) -> Array:
    """One batch [B, T, H, W, 3] of the full size: mirrored pictures in the second half, zeros where samples are
    missing.

    Always the full size, because kernels for other sizes may round differently.
    """
    copies = 2 if job.mirror else 1
    room = max(1, job.batch_size // copies)
    batch = np.zeros((copies * room, *values[0].shape), values[0].dtype)
    batch[: len(values)] = values
    if job.mirror:
        batch[room : room + len(values)] = batch[: len(values), :, :, ::-1]
    return batch
