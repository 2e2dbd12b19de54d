"""Durable files: what a reader sees is whole, what was committed survives a crash, and one writer knows of another."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from halfstep.errors import StoreBusyError, StoreError

_CHUNK_BYTES = 1 << 20


@contextmanager
def store_errors(path: Path | str) -> Iterator[None]:
    """Turn an operating-system error into one line that says what happened to the store and what to do."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = "what was committed is intact; free some space and run the same command again"
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            advice = "the store must be writable; check its owner and mount, or choose another folder"
        else:
            advice = "what was committed is intact"
        raise StoreError(f"{error.filename or path}: {os.strerror(error.errno or 0)}; {advice}") from error


def fsync_path(path: Path) -> None:
    """Make a file's bytes, or a folder's list of names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename_durably(source: Path, target: Path) -> None:
    """Move a file that is already synced to its final name; afterwards the name survives a crash."""
    source.rename(target)
    fsync_path(target.parent)


def write_durably(path: Path, data: bytes) -> None:
    """Create or replace a file at once: a reader sees the old bytes or the new ones."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        rename_durably(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_all(file: IO[bytes], data: bytes | memoryview) -> None:
    """Write all of `data` to an unbuffered file, which may take it in pieces."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def copy_bytes(source: IO[bytes], target: IO[bytes]) -> None:
    """Append all of `source` to `target` without holding it in memory."""
    while chunk := source.read(_CHUNK_BYTES):
        target.write(chunk)


class FileLock:
    """An advisory lock on a file (flock), held until `release` or the end of the process, however it ends."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self.path = path

    def try_exclusive(self) -> bool:
        """Take the lock alone; False when anyone else holds it."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def share(self) -> None:
        """Hold the lock together with others, waiting for an exclusive holder to finish."""
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def release(self) -> None:
        os.close(self._descriptor)


@contextmanager
def alone(folder: Path, lock_name: str = ".lock") -> Iterator[FileLock]:
    """Hold a folder, so that no other process writes there within the block. One that is new is made, and is gone again
    when nothing was written.

    Raises StoreBusyError when another process holds it.
    """
    with store_errors(folder):
        created = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / lock_name)
    try:
        if not lock.try_exclusive():
            raise StoreBusyError(
                f"{folder}: is being written by another process; wait for it to end, then run the same command again"
            )
        try:
            yield lock
        finally:
            if created and folder.exists() and list(folder.iterdir()) == [lock.path]:
                lock.path.unlink()
                folder.rmdir()
    finally:
        lock.release()
