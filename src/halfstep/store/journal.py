"""The journal of a run that is being recorded: steps that are durable before their group is full and encoded.

One append-only file; a record is a header and the step's float32 values, both under CRC-32. What a crash cut off at the
end is not a record. The file is locked as long as its writer lives.
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from halfstep.store.commit import FileLock
from halfstep.store.run import Float32

NAME = "journal"

_HEADER = struct.Struct("<4sqqddQI")  # magic, position, step, timestep, sigma, bytes of values, CRC-32 of the values
_CHECKSUM = struct.Struct("<I")  # of the header
_MAGIC = b"HSJ1"


@dataclass(frozen=True)
class JournalEntry:
    """One step in a journal: its place in the run, its labels, and where its record begins in the file."""

    position: int
    step: int
    timestep: float
    sigma: float
    start: int


class Journal:
    """The journal at `path`, opened by the one who writes it. Raises BlockingIOError when someone else does."""

    def __init__(self, path: Path) -> None:
        self._lock = FileLock(path)
        if not self._lock.try_exclusive():
            self._lock.release()
            raise BlockingIOError(f"{path}: is being written by another process")
        self.path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        self._end = os.fstat(self._descriptor).st_size

    def append(self, position: int, step: int, timestep: float, sigma: float, values: Float32) -> JournalEntry:
        """Write one step; when this returns, it survives a crash. A write that fails leaves the journal as it was."""
        data = np.ascontiguousarray(values, "<f4").reshape(-1).view(np.uint8).data
        header = _HEADER.pack(_MAGIC, position, step, timestep, sigma, len(data), zlib.crc32(data))
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
        return JournalEntry(position, step, timestep, sigma, record_start)

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
        os.close(self._descriptor)
        self._lock.release()


def read_journal(path: Path) -> list[JournalEntry]:
    """The whole records of a journal, in order; none when there is no journal."""
    entries: list[JournalEntry] = []
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return entries
    with file:
        while (record := _read_record(file)) is not None:
            entries.append(record[0])
    return entries


def read_values(path: Path, entry: JournalEntry, shape: tuple[int, ...]) -> Float32 | None:
    """The values of one record, float32 of `shape`; None when the writer has moved them to the run's arrays since."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    with file:
        file.seek(entry.start)
        record = _read_record(file)
    if record is None or record[0] != entry:
        return None
    return np.frombuffer(record[1], "<f4").astype(np.float32, copy=False).reshape(shape)


def is_being_written(path: Path) -> bool:
    """Whether a living process holds the journal at `path`."""
    if not path.exists():
        return False
    lock = FileLock(path)
    free = lock.try_exclusive()
    lock.release()
    return not free


def _read_record(file: IO[bytes]) -> tuple[JournalEntry, bytes] | None:
    """The record that begins where `file` stands, or None when there is no whole one."""
    start = file.tell()
    header = file.read(_HEADER.size + _CHECKSUM.size)
    if len(header) < _HEADER.size + _CHECKSUM.size:
        return None
    magic, position, step, timestep, sigma, size, checksum = _HEADER.unpack_from(header)
    if magic != _MAGIC or _CHECKSUM.unpack_from(header, _HEADER.size)[0] != zlib.crc32(header[: _HEADER.size]):
        return None
    values = file.read(size)
    if len(values) != size or zlib.crc32(values) != checksum:
        return None
    return JournalEntry(position, step, timestep, sigma, start), values
