"""The journal of a run that is being recorded: steps that are durable before their group is full and encoded.

One append-only file; a record is a header and the step's float32 values, both under CRC-32. What a crash cut off at the
end is not a record. The file is locked as long as its writer lives.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from upath import UPath

from halfstep.errors import BusyError
from halfstep.files import FileLock
from halfstep.store.run import Float32

NAME = "journal"

_HEADER = struct.Struct("<4sqddQI")  # magic, step, timestep, sigma, bytes of values, CRC-32 of the values
_CHECKSUM = struct.Struct("<I")  # of the header
_MAGIC = b"HSJ1"
_ATTEMPTS = 100


@dataclass(frozen=True)
class JournalEntry:
    """One step in a journal: its labels, and where its record begins in the file."""

    step: int
    timestep: float
    sigma: float
    start: int


class Journal:
    """The journal at `path`, opened by the one who writes it. Raises BusyError when someone else does."""

    def __init__(self, path: Path) -> None:
        self._lock = FileLock(path)
        for _ in range(_ATTEMPTS):  # one who only asks whether it is written holds it for a moment
            if self._lock.try_exclusive():
                break
            time.sleep(0.01)
        else:
            self._lock.release()
            raise BusyError(f"{path}: another process is recording this run; wait for it to end")
        self.path = path
        self._closed = False
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        self._end = os.fstat(self._descriptor).st_size

    def append(self, step: int, timestep: float, sigma: float, values: Float32) -> JournalEntry:
        """Write one step; when this returns, it survives a crash. A write that fails leaves the journal as it was."""
        data = np.ascontiguousarray(values, "<f4").reshape(-1).view(np.uint8).data
        header = _HEADER.pack(_MAGIC, step, timestep, sigma, len(data), zlib.crc32(data))
        record_start = self._end
        try:
            for part in (header + _CHECKSUM.pack(zlib.crc32(header)), data):
                view = memoryview(part)
                while view:
                    view = view[os.write(self._descriptor, view) :]
            os.fdatasync(self._descriptor)
        except OSError:
            os.ftruncate(self._descriptor, record_start)
            raise
        self._end += len(header) + _CHECKSUM.size + len(data)
        return JournalEntry(step, timestep, sigma, record_start)

    def clear(self) -> None:
        """Forget all steps: they are in the run's arrays now."""
        os.ftruncate(self._descriptor, 0)
        os.fdatasync(self._descriptor)
        self._end = 0

    def remove(self) -> None:
        """Delete the file, at the end of the recording."""
        self.path.unlink()

    def close(self) -> None:
        """Let go of file and lock; what is in the journal stays there."""
        if not self._closed:
            self._closed = True
            os.close(self._descriptor)
            self._lock.release()


def read_journal(path: Path | UPath) -> tuple[list[JournalEntry], bool]:
    """The whole records of a journal, in order, and whether there are damaged ones too; what a crash cut off at the end
    is no damage. Without a journal there are no records."""
    entries: list[JournalEntry] = []
    damaged = False
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return entries, damaged
    with file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        while (start := file.tell()) < size:
            record = _read_record(file)
            if record is not None:
                entries.append(record[0])
                continue
            following = _next_record(file, start, size)
            if following is None:
                break
            damaged = True
            file.seek(following)
    return entries, damaged


def steps_after(entries: Sequence[JournalEntry], stored: Sequence[int]) -> list[JournalEntry]:
    """The entries that are not among the `stored` steps: a crash may come after steps moved and before the journal was
    emptied. The steps of a run grow."""
    last = stored[-1] if len(stored) else -1
    return [entry for entry in entries if entry.step > last]


def read_values(path: Path | UPath, entry: JournalEntry, shape: tuple[int, ...]) -> Float32 | None:
    """The values of one record, float32 of `shape`; None when the writer has moved them to the run's arrays since."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    with file:
        file.seek(entry.start)
        record = _read_record(file)
    if record is None or record[0].step != entry.step:
        return None
    return np.frombuffer(record[1], "<f4").astype(np.float32, copy=False).reshape(shape)


def is_being_written(path: Path | UPath) -> bool:
    """Whether a living process holds the journal at `path`; behind a URL that is not known, and False."""
    if not isinstance(path, Path):
        return False
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _next_record(file: IO[bytes], start: int, size: int) -> int | None:
    """Where, after the damaged record at `start`, the next one begins, or its own end when it is all there; None when
    the file just ends in mid-record."""
    file.seek(start)
    header = file.read(_HEADER.size + _CHECKSUM.size)
    if _is_header(header):
        end = start + len(header) + int(_HEADER.unpack_from(header)[4])
        return end if end <= size else None
    file.seek(start + 1)
    rest = file.read()
    place = rest.find(_MAGIC)
    while place >= 0:
        if _is_header(rest[place : place + _HEADER.size + _CHECKSUM.size]):
            return start + 1 + place
        place = rest.find(_MAGIC, place + 1)
    return None


def _is_header(data: bytes) -> bool:
    if len(data) < _HEADER.size + _CHECKSUM.size or not data.startswith(_MAGIC):
        return False
    checksum: int = _CHECKSUM.unpack_from(data, _HEADER.size)[0]
    return checksum == zlib.crc32(data[: _HEADER.size])


def _read_record(file: IO[bytes]) -> tuple[JournalEntry, bytes] | None:
    """The record that begins where `file` stands, or None when there is no whole one."""
    start = file.tell()
    header = file.read(_HEADER.size + _CHECKSUM.size)
    if not _is_header(header):
        return None
    _, step, timestep, sigma, size, checksum = _HEADER.unpack_from(header)
    values = file.read(size)
    if len(values) != size or zlib.crc32(values) != checksum:
        return None
    return JournalEntry(step, timestep, sigma, start), values
