"""What blobs of all versions have: how they begin, their checksums, and the threads that entropy-code them."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, TypeVar

from halfstep.errors import StoreError
from halfstep.machine import cores

T = TypeVar("T")

MAGIC = b"HSTC"
_START = struct.Struct("<4sB")
_PARALLEL_VALUES = 1 << 17  # of a state


def version(blob: bytes) -> int:
    """The version of the format of `blob`, 1 or 2. Raises StoreError when it is no blob."""
    if len(blob) < _START.size:
        raise damaged("it is shorter than its header")
    magic, found = _START.unpack_from(blob)
    if magic != MAGIC or found not in (1, 2):
        raise damaged(f"it begins with {magic!r} version {found}, not with {MAGIC!r} version 1 or 2")
    return int(found)


def header_checksum(fields: Iterable[Any], shape: bytes) -> int:
    return zlib.crc32(shape, zlib.crc32(repr(tuple(fields)).encode()))


def damaged(what: str) -> StoreError:
    return StoreError(f"trajectory blob: damaged, {what}; read another copy")


def coders(values: int) -> Executor:
    """Threads for states of so many values: one a core, none for small ones, whose operations are so short that threads
    only wait for each other."""
    return ThreadPoolExecutor(cores(), "codec") if values >= _PARALLEL_VALUES else _AtOnce()


class _AtOnce(Executor):
    """Runs what is submitted where it is submitted."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        done: Future[T] = Future()
        done.set_result(fn(*args, **kwargs))
        return done
