"""The plan of one process: what is to happen to each sequence, as a row of events in order.

A sequence is opened, its frames are new samples, reused from the store or failures, and it is closed; or it is skipped
as a whole. Nothing is written here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

from halfstep.data.base import Array, FrameSequence, Inspection, Problem, SourceError, digest
from halfstep.encode.clips import cut_clips
from halfstep.encode.counts import Counts, Failure
from halfstep.encode.job import EncodeJob
from halfstep.engine.ledger import Balance
from halfstep.store.index import DIGEST_BYTES, Row

T = TypeVar("T")

# Stands for the content of a frame that is kept from before, because what the source has now cannot be read.
UNREADABLE = bytes(DIGEST_BYTES)

# Kept beside the problem of a video. One that was read by an older reader is tried again: more of it may be had now.
READER = 2


@dataclass(frozen=True)
class Open:
    sequence: FrameSequence
    inspection: Inspection


@dataclass(frozen=True)
class Sample:
    """A frame, or with an autoencoder over time a clip that starts at frame `number`; loaders run in the decode
    pool."""

    sequence: FrameSequence
    number: int
    digest: bytes
    pixels: tuple[Future[Array], ...]


@dataclass(frozen=True)
class Reuse:
    """A frame that is in the store already, at `place` in its sequence."""

    number: int
    digest: bytes
    place: int


@dataclass(frozen=True)
class Failed:
    """`attempted` when it is a frame of the open sequence that could not be read, in the place of its sample."""

    sequence: FrameSequence
    problem: Problem
    attempted: bool = False


@dataclass(frozen=True)
class FirstOnly:
    sequence: FrameSequence
    count: int


@dataclass(frozen=True)
class Skipped:
    row: Row


@dataclass(frozen=True)
class Close:
    sequence: FrameSequence
    fingerprint: bytes
    left_out: int


Event = Open | Sample | Reuse | Failed | FirstOnly | Skipped | Close


def fingerprint_of(job: EncodeJob, inspection: Inspection) -> bytes:
    """Digest of a sequence's source bytes and of everything that decides its latents."""
    return digest(job.recipe, inspection.content)


def plan_only(job: EncodeJob, sequences: list[FrameSequence], existing: Mapping[str, Row]) -> Counts:
    """What `run` would do, without decoding anything: for --dry-run."""
    counts = Counts()
    encoded = skipped = 0
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
                skipped += row.length
                continue
            stored = _stored_places(row)
            reused = sum(digest(job.recipe, d) in stored for d in inspection.digests)
            skipped += reused
            encoded += (len(inspection.numbers) or sequence.expected) - reused
    failed = len(counts.failures)
    return replace(counts, balance=Balance(encoded + skipped + failed, encoded, skipped, failed))


def _inspected(
    sequences: list[FrameSequence], pool: ThreadPoolExecutor, workers: int
) -> Iterator[tuple[FrameSequence, Future[Inspection]]]:
    return ahead(((sequence, pool.submit(sequence.inspect)) for sequence in sequences), 4 * workers)


def ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """The same items, made `count` items before they are asked for, so that the work they started can go on."""
    made: deque[T] = deque()
    for item in items:
        made.append(item)
        if len(made) > count:
            yield made.popleft()
    yield from made


def plan(
    job: EncodeJob, sequences: list[FrameSequence], existing: Mapping[str, Row], pool: ThreadPoolExecutor
) -> Iterator[Event]:
    """The events of all sequences. Those that did not change are skipped; of those that did, frames whose content is in
    the store are reused."""
    for sequence, future in _inspected(sequences, pool, job.workers):
        try:
            inspection = future.result()
        except SourceError as error:
            yield Failed(sequence, Problem(str(error)))
            continue
        for problem in inspection.problems:
            yield Failed(sequence, problem)
        if inspection.unused:
            yield FirstOnly(sequence, inspection.unused)
        row = existing.get(sequence.key)
        fingerprint = fingerprint_of(job, inspection)
        if row is not None and row.fingerprint == fingerprint and _is_complete(row, inspection):
            if "problem" in row.attributes:
                yield Failed(sequence, Problem(row.attributes["problem"]))
            yield Skipped(row)
            continue
        yield Open(sequence, inspection)
        left_out = yield from _frame_events(job, sequence, inspection, row, pool)
        yield Close(sequence, fingerprint, left_out)


def _is_complete(row: Row, inspection: Inspection) -> bool:
    """False when some frames failed last time: they are tried again, those of a video when it is read better now."""
    if not inspection.numbers:
        return "problem" not in row.attributes or row.attributes.get("reader") == READER
    return len(row.digests) == len(inspection.numbers) * DIGEST_BYTES and UNREADABLE not in _stored_places(row)


def _frame_events(
    job: EncodeJob, sequence: FrameSequence, inspection: Inspection, row: Row | None, pool: ThreadPoolExecutor
) -> Generator[Event, None, int]:
    """Returns how many frames make no whole clip."""
    clip_length = job.spec.pixels.clip_length if job.spec.pixels else 1
    digests = {n: digest(job.recipe, d) for n, d in zip(inspection.numbers, inspection.digests, strict=True)}
    stored = _stored_places(row) if clip_length == 1 else {}
    wanted = [n for n in inspection.numbers if digests[n] not in stored]
    if inspection.numbers:
        try:
            loaders = dict(sequence.frames(wanted))
        except SourceError as error:
            yield Failed(sequence, Problem(str(error)))
            return 0
        for number in inspection.numbers:
            if number in loaders:
                yield Sample(sequence, number, digests[number], (pool.submit(loaders[number]),))
            else:
                yield Reuse(number, digests[number], stored[digests[number]])
        return 0
    problems: list[Problem] = []
    clips = left_out = 0
    for clip in cut_clips(_submitted(sequence, pool, problems), clip_length, job.last_clip):
        if len(clip) < clip_length:
            left_out += len(clip)
            continue
        yield Sample(sequence, clip[0][0], b"", tuple(future for _, future in clip))
        clips += 1
    if left_out and not clips and not problems:
        problems.append(Problem(f"{sequence.source}: {left_out} frames; one clip has {clip_length}"))
    for problem in problems:
        yield Failed(sequence, problem)
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
