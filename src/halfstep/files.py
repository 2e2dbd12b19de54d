"""Durable files: what a reader sees is whole, what was written survives a crash, and one writer knows of another."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit
from urllib.request import url2pathname

from upath import UPath

from halfstep.errors import BusyError, FileError, InputError, some

_CHUNK_BYTES = 1 << 20


@contextmanager
def file_errors(path: Path | str) -> Iterator[None]:
    """Turn an operating-system error into one line, a FileError that says which file it was and what to do."""
    try:
        yield
    except FileError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = "what was complete before is kept; free some space and run the same command again"
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            advice = "check its owner and mount, or name another place"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP):
            advice = "name another place"
        else:
            advice = "what was complete before is kept"
        what = str(error) if error.errno is None else os.strerror(error.errno)  # numpy's say it in words alone
        raise FileError(f"{error.filename or path}: {what}; {advice}") from error


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


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file to, which takes the place of `path` at once when the block ends well: a
    reader sees the old file or the new one. After an error the old one is left as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with file_errors(path):
        try:
            yield temporary
            fsync_path(temporary)
            rename_durably(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_durably(path: Path, data: bytes) -> None:
    """Create or replace a file at once."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` to fill, which gets that name when the block ends well: `path` is there whole or not at
    all. It may be there before when it is empty."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with file_errors(path):
        shutil.rmtree(temporary, ignore_errors=True)  # of an older process with this one's number
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for inner in [*temporary.rglob("*"), temporary]:
                fsync_path(inner)
            rename_durably(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def is_unfinished(path: Path) -> bool:
    """Whether `path` is what `replacing` or `new_folder` left where the process was killed."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def place(text: str | Path) -> Path | str:
    """A place that a user named: a folder or file as a path, also where it is a `file://` URL; another URL as it is."""
    if isinstance(text, str) and "://" in text:
        return Path(url2pathname(urlsplit(text).path)) if text.startswith("file://") else text
    return Path(text)


def located(text: str | Path | UPath) -> Path | UPath:
    """The same as something that is read like a path, also behind a URL. Raises InputError for an unknown scheme."""
    found = place(text) if isinstance(text, (str, Path)) else text
    if not isinstance(found, str):
        return found
    try:
        path = UPath(found, use_listings_cache=False)  # what others write meanwhile is to be seen
        _ = path.fs  # made here, where what is not installed can be named
    except (ValueError, ImportError) as error:
        raise InputError(f"{found}: cannot be opened ({error}); local folders and what fsspec reads can be") from error
    return path


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


def claim(folder: Path, what: str, marks: tuple[str, ...] = ()) -> bool:
    """Whether `folder` is ours already: it holds one of `marks`, the files that tell a `what`. False when it is not
    there or empty, and may be written to. Hidden files, such as locks, do not count, but where there are no marks: such
    a folder is put in place as a whole.

    Raises InputError, and touches nothing, when it is a file or a link to nothing, lies within a file, or holds
    something else.
    """
    with file_errors(folder):
        for path in (folder, *folder.parents):
            if path.is_symlink() and not path.exists():
                raise InputError(f"{path}: is a link to nothing; name a folder for the {what}")
            if path.is_file():
                raise InputError(f"{path}: is a file; name a folder for the {what}")
        if not folder.exists():
            return False
        if any((folder / mark).exists() for mark in marks):
            return True
        foreign = sorted(path.name for path in folder.iterdir() if not (marks and path.name.startswith(".")))
    if foreign:
        other = f" and is no {what}; name a new or empty folder" if marks else f"; name a new folder for the {what}"
        raise InputError(f"{folder}: holds {some(foreign, 2)}{other}")
    return False


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

    Raises BusyError when another process holds it. A folder that may be somebody else's is to be claimed before.
    """
    with file_errors(folder):
        created = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / lock_name)
    try:
        if not lock.try_exclusive():
            raise BusyError(
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
