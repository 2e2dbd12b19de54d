"""The pipeline of one process: read and decode -> batches across sequences -> lanes -> writer, each on its own threads.

What happens to a sequence is a row of steps in order (Open, Sample, Reuse, Failed, Close). Steps travel with the
batches,
and batches come back in order, so the writer sees each sequence whole and one after the other however many are under
way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from halfstep.data.base import Array, FrameSequence, Inspection, Problem, SourceError, digest
from halfstep.data.keys import name_to_key
from halfstep.encode.clips import cut_clips
from halfstep.encode.job import EncodeJob
from halfstep.encode.lanes import Encoded, Lanes
from halfstep.errors import HalfstepError
from halfstep.progress import Progress
from halfstep.store.formats import LATENT_ARRAYS, safetensors_name
from halfstep.store.index import DIGEST_BYTES, Row, shard_path
from halfstep.store.shard import MappedShard
from halfstep.store.writer import DatasetWriter

T = TypeVar("T")

# Stands for the content of a frame that is kept from before, because what the source has now cannot be read.
_UNREADABLE = bytes(DIGEST_BYTES)

# Kept beside the problem of a video. One that was read by an older reader is tried again: more of it may be had now.
_READER = 2


@dataclass(frozen=True)
class Failure:
    """One line of failures.jsonl. Paths in it that are not UTF-8 are escaped as keys are."""

    key: str
    source: str
    reason: str
    frame: int | None = None

    @classmethod
    def of(cls, sequence: FrameSequence, problem: Problem) -> Failure:
        return cls(sequence.key, name_to_key(str(sequence.source)), name_to_key(problem.reason), problem.frame)


@dataclass
class Counts:
    """What one process did, in items: `retried` in fp32, `refused` because they are not finite there either. By
    sequence, `left_out` counts the frames that make no whole clip, and `unused` those beyond the first of an animation
    whose first frame alone is wanted."""

    encoded: int = 0
    skipped: int = 0
    retried: int = 0
    refused: int = 0
    failures: list[Failure] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    unused: dict[str, int] = field(default_factory=dict)


class StoppedError(HalfstepError):
    """--strict met a failure. `failures` are those up to then."""

    def __init__(self, line: str, failures: Sequence[Failure] = ()) -> None:
        super().__init__(line)
        self.failures = list(failures)


@dataclass(frozen=True)
class _Open:
    sequence: FrameSequence
    inspection: Inspection


@dataclass(frozen=True)
class _Sample:
    """A frame, or with an autoencoder over time a clip that starts at frame `number`; loaders run in the decode
    pool."""

    sequence: FrameSequence
    number: int
    digest: bytes
    pixels: tuple[Future[Array], ...]


@dataclass(frozen=True)
class _Reuse:
    """A frame that is in the store already, at `place` in its sequence."""

    number: int
    digest: bytes
    place: int


@dataclass(frozen=True)
class _Failed:
    """`attempted` when it is a frame of the open sequence that could not be read, in the place of its sample."""

    sequence: FrameSequence
    problem: Problem
    attempted: bool = False


@dataclass(frozen=True)
class _FirstOnly:
    sequence: FrameSequence
    count: int


@dataclass(frozen=True)
class _Skipped:
    row: Row


@dataclass(frozen=True)
class _Close:
    sequence: FrameSequence
    fingerprint: bytes
    left_out: int


_Step = _Open | _Sample | _Reuse | _Failed | _FirstOnly | _Skipped | _Close


@dataclass
class _Batch:
    """Steps in order, and the stacked pixels of the samples among them."""

    steps: list[_Step] = field(default_factory=list)
    values: list[Array] = field(default_factory=list)


def fingerprint_of(job: EncodeJob, inspection: Inspection) -> bytes:
    """Digest of a sequence's source bytes and of everything that decides its latents."""
    return digest(job.recipe, inspection.content)


def run(
    job: EncodeJob,
    sequences: list[FrameSequence],
    existing: Mapping[str, Row],
    lanes: Lanes,
    writer: DatasetWriter,
    progress: Progress,
) -> Counts:
    """Bring the store up to date with `sequences` and return what was done; `progress` hears of items, and of the bytes
    written for them, as they finish.

    Raises StoppedError at the first failure when the job is strict. When it is left by an exception, sequences that
    were complete by then are committed, unless the store itself failed.
    """
    counts = Counts()
    recorder = _Recorder(job, existing, writer, counts, progress)
    with ThreadPoolExecutor(job.workers, "decode") as decode, ThreadPoolExecutor(1, "write") as write:
        under_way: deque[tuple[_Batch, Future[Encoded] | None]] = deque()
        written: deque[Future[None]] = deque()

        def finish_oldest() -> None:
            batch, future = under_way.popleft()
            encoded = future.result() if future is not None else None
            written.append(write.submit(recorder.record, batch.steps, encoded))
            while len(written) > lanes.count:
                written.popleft().result()

        try:
            steps = _plan(job, sequences, existing, decode)
            for batch in _batches(job, _ahead(steps, 2 * job.batch_size + 2 * job.workers)):
                under_way.append((batch, lanes.submit(_stack(job, batch.values)) if batch.values else None))
                if len(under_way) > lanes.count + 1:
                    finish_oldest()
            while under_way:
                finish_oldest()
            while written:
                written.popleft().result()
        except BaseException as error:
            decode.shutdown(cancel_futures=True)
            write.shutdown(cancel_futures=True)
            if not isinstance(error, OSError):
                writer.abandon()
                writer.commit()
            raise
    return counts


def plan_only(job: EncodeJob, sequences: list[FrameSequence], existing: Mapping[str, Row]) -> Counts:
    """What `run` would do, without decoding anything: for --dry-run."""
    counts = Counts()
    with ThreadPoolExecutor(job.workers) as pool:
        for sequence, future in _inspected(sequences, pool, job.workers):
            try:
                inspection = future.result()
            except SourceError as error:
                counts.failures.append(Failure.of(sequence, Problem(str(error))))
                continue
            if inspection.unused:
                counts.unused[sequence.key] = inspection.unused
            counts.failures += [Failure.of(sequence, problem) for problem in inspection.problems]
            row = existing.get(sequence.key)
            unchanged = row is not None and row.fingerprint == fingerprint_of(job, inspection)
            if row is not None and unchanged and _is_complete(row, inspection):
                if "problem" in row.attributes:
                    counts.failures.append(Failure.of(sequence, Problem(row.attributes["problem"])))
                if left_out := row.attributes.get("left_out"):
                    counts.left_out[row.key] = left_out
                counts.skipped += row.length
                continue
            stored = _stored_places(row)
            reused = sum(digest(job.recipe, d) in stored for d in inspection.digests)
            counts.skipped += reused
            counts.encoded += (len(inspection.numbers) or sequence.expected) - reused
    return counts


def _inspected(
    sequences: list[FrameSequence], pool: ThreadPoolExecutor, workers: int
) -> Iterator[tuple[FrameSequence, Future[Inspection]]]:
    return _ahead(((sequence, pool.submit(sequence.inspect)) for sequence in sequences), 4 * workers)


def _ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """The same items, made `count` items before they are asked for, so that the work they started can go on."""
    made: deque[T] = deque()
    for item in items:
        made.append(item)
        if len(made) > count:
            yield made.popleft()
    yield from made


def _plan(
    job: EncodeJob, sequences: list[FrameSequence], existing: Mapping[str, Row], pool: ThreadPoolExecutor
) -> Iterator[_Step]:
    """The steps of all sequences. Those that did not change are skipped; of those that did, frames whose content is in
    the store are reused."""
    for sequence, future in _inspected(sequences, pool, job.workers):
        try:
            inspection = future.result()
        except SourceError as error:
            yield _Failed(sequence, Problem(str(error)))
            continue
        for problem in inspection.problems:
            yield _Failed(sequence, problem)
        if inspection.unused:
            yield _FirstOnly(sequence, inspection.unused)
        row = existing.get(sequence.key)
        fingerprint = fingerprint_of(job, inspection)
        if row is not None and row.fingerprint == fingerprint and _is_complete(row, inspection):
            if "problem" in row.attributes:
                yield _Failed(sequence, Problem(row.attributes["problem"]))
            yield _Skipped(row)
            continue
        yield _Open(sequence, inspection)
        left_out = yield from _frame_steps(job, sequence, inspection, row, pool)
        yield _Close(sequence, fingerprint, left_out)


def _is_complete(row: Row, inspection: Inspection) -> bool:
    """False when some frames failed last time: they are tried again, those of a video when it is read better now."""
    if not inspection.numbers:
        return "problem" not in row.attributes or row.attributes.get("reader") == _READER
    return len(row.digests) == len(inspection.numbers) * DIGEST_BYTES and _UNREADABLE not in _stored_places(row)


def _frame_steps(
    job: EncodeJob, sequence: FrameSequence, inspection: Inspection, row: Row | None, pool: ThreadPoolExecutor
) -> Generator[_Step, None, int]:
    """Returns how many frames make no whole clip."""
    clip_length = job.spec.pixels.clip_length if job.spec.pixels else 1
    digests = {n: digest(job.recipe, d) for n, d in zip(inspection.numbers, inspection.digests, strict=True)}
    stored = _stored_places(row) if clip_length == 1 else {}
    wanted = [n for n in inspection.numbers if digests[n] not in stored]
    if inspection.numbers:
        try:
            loaders = dict(sequence.frames(wanted))
        except SourceError as error:
            yield _Failed(sequence, Problem(str(error)))
            return 0
        for number in inspection.numbers:
            if number in loaders:
                yield _Sample(sequence, number, digests[number], (pool.submit(loaders[number]),))
            else:
                yield _Reuse(number, digests[number], stored[digests[number]])
        return 0
    problems: list[Problem] = []
    clips = left_out = 0
    for clip in cut_clips(_submitted(sequence, pool, problems), clip_length, job.last_clip):
        if len(clip) < clip_length:
            left_out += len(clip)
            continue
        yield _Sample(sequence, clip[0][0], b"", tuple(future for _, future in clip))
        clips += 1
    if left_out and not clips and not problems:
        problems.append(Problem(f"{sequence.source}: {left_out} frames; one clip has {clip_length}"))
    for problem in problems:
        yield _Failed(sequence, problem)
    return left_out if clips else 0


def _submitted(
    sequence: FrameSequence, pool: ThreadPoolExecutor, problems: list[Problem]
) -> Iterator[tuple[int, Future[Array]]]:
    """The frames of a video, being loaded; why there are no more is added to `problems`."""
    try:
        for number, load in sequence.frames(()):
            yield number, pool.submit(load)
    except SourceError as error:
        problems.append(Problem(str(error)))


def _stored_places(row: Row | None) -> dict[bytes, int]:
    if row is None:
        return {}
    data = row.digests
    return {data[i : i + DIGEST_BYTES]: i // DIGEST_BYTES for i in range(0, len(data), DIGEST_BYTES)}


def _batches(job: EncodeJob, steps: Iterable[_Step]) -> Iterator[_Batch]:
    """Group steps so that each batch but the last is full; a sample whose pixels cannot be had becomes a failure."""
    copies = 2 if job.mirror else 1
    room = max(1, job.batch_size // copies)
    batch = _Batch()
    for step in steps:
        if isinstance(step, _Sample):
            try:
                clip = np.stack([future.result() for future in step.pixels])
            except SourceError as error:
                batch.steps.append(_Failed(step.sequence, Problem(str(error), step.number), attempted=True))
                continue
            batch.values.append(clip)
        batch.steps.append(step)
        # Batches without pixels move on too: a rerun that skips everything must not pile up its steps.
        if len(batch.values) == room or len(batch.steps) >= 4 * room + 256:
            yield batch
            batch = _Batch()
    if batch.steps:
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


class _Recorder:
    """Carries out steps on the writer, in the writer's thread."""

    def __init__(
        self,
        job: EncodeJob,
        existing: Mapping[str, Row],
        writer: DatasetWriter,
        counts: Counts,
        progress: Progress,
    ) -> None:
        self._job, self._existing, self._writer, self._counts = job, existing, writer, counts
        self._progress = progress
        self._mapped: tuple[int, MappedShard] | None = None
        self._stopped = False
        self._key = ""
        self._digests: list[bytes] = []
        self._problem: str | None = None
        self._arrays: dict[str, Array] = {}
        self._places: dict[int, int] = {}

    def record(self, steps: list[_Step], encoded: Encoded | None) -> None:
        """Carry out one batch's steps. After an error nothing more is carried out: a sequence that lacks the steps of
        the batch that failed must never be finished."""
        if self._stopped:
            return
        self._stopped = True
        self._record(steps, encoded)
        self._stopped = False

    def _record(self, steps: list[_Step], encoded: Encoded | None) -> None:
        slot = 0
        for step in steps:
            match step:
                case _Open(sequence, inspection):
                    self._key = sequence.key
                    self._digests, self._problem, self._arrays = [], None, inspection.arrays
                    self._places = {number: place for place, number in enumerate(inspection.numbers)}
                case _Sample():
                    assert encoded is not None
                    self._add_sample(step, encoded, slot)
                    slot += 1
                case _Reuse(number, frame_digest, place):
                    self._add_reused(number, frame_digest, place)
                case _Failed(sequence, problem, attempted):
                    self._fail(sequence, problem)
                    if attempted:
                        self._keep_older(problem.frame)
                case _FirstOnly(sequence, count):
                    self._counts.unused[sequence.key] = count
                case _Skipped(row):
                    self._counts.skipped += row.length
                    self._note_left_out(row.key, row.attributes.get("left_out", 0))
                    self._progress.advance(row.length)
                case _Close():
                    self._close(step)

    def _add_sample(self, step: _Sample, encoded: Encoded, slot: int) -> None:
        mirrored_slot = slot + max(1, self._job.batch_size // 2)
        slots = (slot, mirrored_slot) if self._job.mirror else (slot,)
        reason = next((encoded.refused[s] for s in slots if s in encoded.refused), None)
        self._counts.retried += any(s in encoded.retried for s in slots)
        if reason is not None:
            self._counts.refused += 1
            self._fail(step.sequence, Problem(f"{step.sequence.source}: {reason}", step.number))
            self._keep_older(step.number)
            return
        arrays = {name: values[slot : slot + 1] for name, values in encoded.arrays.items()}
        if self._job.mirror:
            arrays |= {f"{n}_mirror": v[mirrored_slot : mirrored_slot + 1] for n, v in encoded.arrays.items()}
        self._extend(step.number, step.digest, arrays)
        self._counts.encoded += 1
        self._progress.advance(written=sum(values.nbytes for values in arrays.values()))

    def _add_reused(self, number: int, frame_digest: bytes, place: int) -> None:
        # From the very row that the place was found in: a Ray task that is repeated has written newer ones since.
        row = self._existing[self._key]
        self._extend(number, frame_digest, self._older_arrays(row, place))
        self._counts.skipped += 1
        self._progress.advance()

    def _keep_older(self, number: int | None) -> None:
        """Bad input takes nothing away: where the store has the frame from a time when it could be read, that stays."""
        row = self._existing.get(self._key)
        if row is None or number not in self._places:
            return
        shard = self._shard(row)
        numbers = shard.rows("frame", row.start, row.start + row.length)
        arrays = ["latents", "logvar"] if self._job.moments else ["latents"]
        wanted = {*arrays, *(f"{name}_mirror" for name in arrays if self._job.mirror)}
        alike = wanted == {name for name in LATENT_ARRAYS if name in shard.layouts}
        if number in numbers and alike and shard.layouts["latents"].type_name == safetensors_name(self._job.storage):
            place = int(np.flatnonzero(numbers == number)[0])
            self._extend(number, _UNREADABLE, self._older_arrays(row, place))

    def _older_arrays(self, row: Row, place: int) -> dict[str, Array]:
        shard, at = self._shard(row), row.start + place
        return {name: shard.rows(name, at, at + 1) for name in LATENT_ARRAYS if name in shard.layouts}

    def _shard(self, row: Row) -> MappedShard:
        if self._mapped is None or self._mapped[0] != row.shard:
            self._mapped = (row.shard, MappedShard(shard_path(self._job.output, row.shard)))
        return self._mapped[1]

    def _extend(self, number: int, frame_digest: bytes, arrays: dict[str, Array]) -> None:
        place = self._places.get(number)
        own = {} if place is None else {name: values[place : place + 1] for name, values in self._arrays.items()}
        self._writer.extend(**arrays, frame=np.array([number], np.int32), **own)
        self._digests.append(frame_digest)

    def _fail(self, sequence: FrameSequence, problem: Problem) -> None:
        failure = Failure.of(sequence, problem)
        self._counts.failures.append(failure)
        self._problem = failure.reason
        if self._job.strict:
            line = f"{failure.reason}; stopped because of --strict, what was complete is in the store"
            raise StoppedError(line, self._counts.failures)

    def _note_left_out(self, key: str, frames: int) -> None:
        if frames:
            self._counts.left_out[key] = frames

    def _close(self, step: _Close) -> None:
        if not self._digests:
            return  # nothing of it could be read; an older version in the store stays
        digests, row = b"".join(self._digests), self._existing.get(step.sequence.key)
        if row is not None and digests and (row.fingerprint, row.digests) == (step.fingerprint, digests):
            self._writer.abandon()  # frames that failed before have failed again: nothing is new
            return
        attributes: dict[str, Any] = {}
        if self._problem and not self._places:
            attributes |= {"problem": self._problem, "reader": _READER}
        if step.left_out:
            attributes["left_out"] = step.left_out
        self._note_left_out(step.sequence.key, step.left_out)
        self._writer.finish(
            step.sequence.key,
            label=step.sequence.label,
            fingerprint=step.fingerprint,
            digests=digests,
            attributes=attributes,
        )
        self._digests = []
