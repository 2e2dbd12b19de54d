"""From events and encoded batches to sequences in the store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from halfstep.data.base import Array, FrameSequence, Problem
from halfstep.encode.counts import Counts, Failure, StoppedError
from halfstep.encode.encoder import Encoded
from halfstep.encode.job import EncodeJob
from halfstep.encode.plan import READER, UNREADABLE, Close, Event, Failed, FirstOnly, Open, Reuse, Sample, Skipped
from halfstep.engine import Ledger
from halfstep.progress import Progress
from halfstep.store.formats import LATENT_ARRAYS, safetensors_name
from halfstep.store.index import Row, shard_path
from halfstep.store.shard import MappedShard
from halfstep.store.writer import DatasetWriter


class StoreFiller:
    """Carries out events on the writer, in the writer's thread."""

    def __init__(
        self,
        job: EncodeJob,
        existing: Mapping[str, Row],
        writer: DatasetWriter,
        ledger: Ledger[Failure],
        failures: list[Failure],
        progress: Progress,
    ) -> None:
        self._job, self._existing, self._writer = job, existing, writer
        self._ledger, self._failures, self._progress = ledger, failures, progress
        self._not_finite = 0
        self._left_out: dict[str, int] = {}
        self._unused: dict[str, int] = {}
        self._mapped: tuple[int, MappedShard] | None = None
        self._key = ""
        self._digests: list[bytes] = []
        self._problem: str | None = None
        self._arrays: dict[str, Array] = {}
        self._places: dict[int, int] = {}

    @property
    def counts(self) -> Counts:
        return Counts(self._ledger.balance, self._not_finite, self._failures, self._left_out, self._unused)

    def carry_out(self, events: list[Event], encoded: Encoded | None) -> None:
        """Carry out one batch's events. After an error no more may be: a sequence that lacks the events of the batch
        that failed must never be finished."""
        slot = 0
        for event in events:
            match event:
                case Open(sequence, inspection):
                    self._key = sequence.key
                    self._digests, self._problem, self._arrays = [], None, inspection.arrays
                    self._places = {number: place for place, number in enumerate(inspection.numbers)}
                case Sample():
                    assert encoded is not None
                    self._add_sample(event, encoded, slot)
                    slot += 1
                case Reuse(number, frame_digest, place):
                    self._add_reused(number, frame_digest, place)
                case Failed(sequence, problem, attempted):
                    self._fail(sequence, problem)
                    if attempted:
                        self._keep_older(problem.frame)
                case FirstOnly(sequence, count):
                    self._unused[sequence.key] = count
                case Skipped(row):
                    self._ledger.skip(row.length)
                    self._note_left_out(row.key, row.attributes.get("left_out", 0))
                    self._progress.advance(row.length)
                case Close():
                    self._close(event)

    def _add_sample(self, event: Sample, encoded: Encoded, slot: int) -> None:
        mirrored_slot = slot + max(1, self._job.batch_size // 2)
        slots = (slot, mirrored_slot) if self._job.mirror else (slot,)
        reason = next((encoded.refused[s] for s in slots if s in encoded.refused), None)
        if reason is not None:
            self._not_finite += 1
            self._fail(event.sequence, Problem(f"{event.sequence.source}: {reason}", event.number))
            self._keep_older(event.number)
            return
        arrays = {name: values[slot : slot + 1] for name, values in encoded.arrays.items()}
        if self._job.mirror:
            arrays |= {f"{n}_mirror": v[mirrored_slot : mirrored_slot + 1] for n, v in encoded.arrays.items()}
        self._extend(event.number, event.digest, arrays)
        self._ledger.give(retried=any(s in encoded.retried for s in slots))
        self._progress.advance(written=sum(values.nbytes for values in arrays.values()))

    def _add_reused(self, number: int, frame_digest: bytes, place: int) -> None:
        # From the very row that the place was found in: a Ray task that is repeated has written newer ones since.
        row = self._existing[self._key]
        self._extend(number, frame_digest, self._older_arrays(row, place))
        self._ledger.skip()
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
            self._extend(number, UNREADABLE, self._older_arrays(row, place))

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
        self._ledger.refuse(failure)
        self._problem = failure.reason
        if self._job.strict:
            line = f"{failure.reason}; stopped because of --strict, what was complete is in the store"
            raise StoppedError(line, self._failures)

    def _note_left_out(self, key: str, frames: int) -> None:
        if frames:
            self._left_out[key] = frames

    def _close(self, event: Close) -> None:
        if not self._digests:
            return  # nothing of it could be read; an older version in the store stays
        digests, row = b"".join(self._digests), self._existing.get(event.sequence.key)
        if row is not None and digests and (row.fingerprint, row.digests) == (event.fingerprint, digests):
            self._writer.abandon()  # frames that failed before have failed again: nothing is new
            return
        attributes: dict[str, Any] = {}
        if self._problem and not self._places:
            attributes |= {"problem": self._problem, "reader": READER}
        if event.left_out:
            attributes["left_out"] = event.left_out
        self._note_left_out(event.sequence.key, event.left_out)
        self._writer.finish(
            event.sequence.key,
            label=event.sequence.label,
            fingerprint=event.fingerprint,
            digests=digests,
            attributes=attributes,
        )
        self._digests = []
