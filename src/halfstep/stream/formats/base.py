"""What the message formats share: which key of a message is what, the shapes and types that are understood, and the
limits that hold before anything is read. Nothing here trusts a message."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from halfstep.errors import InputError
from halfstep.stream.events import Array, Message, MessageError

LARGEST_BYTES = 2 << 30

# Types that data may have on the wire, in either byte order.
DATA_TYPES = frozenset({"uint8", "uint16", "uint32", "int8", "int16", "int32", "float16", "float32", "float64"})

# What the libraries raise when a message is damaged.
_DAMAGE = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    OverflowError,
    MemoryError,
    EOFError,
    struct.error,
)

_NAMES = ("data", "timestamp", "photon_wavelength", "photon_energy", "original_shape")


@dataclass(frozen=True)
class Fields:
    """Which key, or path, of a message holds what: the first of each tuple that is there. The names that are set here
    are those of lclstreamer now and earlier. `others` are further (name, key) pairs to carry as facts. `required` are
    names that a message must have. `shape`, (H, W) or (C, H, W), is that of an image where messages do not tell it
    (simplon). `largest_bytes` is the most that a message may declare to hold once decompressed."""

    data: tuple[str, ...] = ("detector_data", "data/data", "data")
    timestamp: tuple[str, ...] = ("timestamp", "data/timestamp")
    photon_wavelength: tuple[str, ...] = (
        "photon_wavelength",
        "wavelength",
        "data/photon_wavelength",
        "data/wavelength",
    )
    photon_energy: tuple[str, ...] = ("photon_energy", "data/photon_energy")
    original_shape: tuple[str, ...] = ("detector_data_original_shape", "data_original_shape")
    others: tuple[tuple[str, str], ...] = ()
    required: frozenset[str] = frozenset({"data"})
    shape: tuple[int, ...] | None = None
    largest_bytes: int = LARGEST_BYTES

    @classmethod
    def of(
        cls,
        fields: Mapping[str, str],
        required: Iterable[str] = (),
        shape: Sequence[int] | None = None,
        largest_bytes: int = LARGEST_BYTES,
    ) -> Fields:
        """From a user's `fields`, our name -> their key. `detector_data` is another name of `data`; names that are not
        ours become `others`. The key of `original_shape` follows that of `data`, as producers name it, unless it is
        given. Raises `InputError` for a key that is not a text and for a shape that is none."""
        if broken := [name for name, key in fields.items() if not isinstance(key, str) or not key.strip("/")]:
            raise InputError(
                f"fields.{broken[0]}: {fields[broken[0]]!r} is not a key of a message; give a name or path"
            )
        if shape is not None and (len(shape) not in (2, 3) or min(shape) < 1):
            raise InputError(f"shape: {list(shape)!r} is not that of an image; give [H, W] or [C, H, W]")
        ours = {("data" if name == "detector_data" else name): key for name, key in fields.items()}
        if "data" in ours:
            ours.setdefault("original_shape", f"{ours['data']}_original_shape")
        known = {name: (ours.pop(name),) for name in _NAMES if name in ours}
        return replace(
            cls(),
            **known,
            others=tuple(ours.items()),
            required=frozenset({"data", *("data" if name == "detector_data" else name for name in required)}),
            shape=None if shape is None else tuple(shape),
            largest_bytes=largest_bytes,
        )

    def after(self, message: Message) -> Fields:
        """These fields with the shape that a start has told, where it did."""
        shape = str(message.facts.get("shape", "")).split("x") if message.starts else []
        sizes = tuple(int(size) for size in shape if size.isascii() and size.isdecimal() and len(size) < 10)
        return replace(self, shape=sizes) if len(sizes) == len(shape) in (2, 3) and min(sizes) > 0 else self

    def keys(self) -> dict[str, tuple[str, ...]]:
        """Name -> the keys that it may be under."""
        return {name: getattr(self, name) for name in _NAMES} | {name: (key,) for name, key in self.others}


@contextmanager
def refusing(where: str) -> Iterator[None]:
    """What goes wrong within becomes a `MessageError` of one line that begins with `where`."""
    try:
        yield
    except MessageError as error:
        raise MessageError(f"{where}: {_line(str(error))}") from error
    except _DAMAGE as error:
        raise MessageError(f"{where}: damaged, {type(error).__name__}: {_line(str(error))}") from error


def _line(text: str) -> str:
    line = "".join(character if character.isprintable() else "?" for character in " ".join(text.split()))
    return line if len(line) <= 400 else line[:400] + "..."


def shown(text: object) -> str:
    """Something a message says, short and quoted, for an error."""
    quoted = repr(text)
    return quoted if len(quoted) <= 80 else quoted[:80] + "..."


class Viewed(io.RawIOBase):
    """A message as a file to read, without a copy. One `read` gives `most` bytes at most: a larger one is refused."""

    def __init__(self, view: memoryview, most: int) -> None:
        super().__init__()
        self._view, self._most, self._at = view, most, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._view)}[whence]
        if at < 0:
            raise OSError(f"no byte {at}")
        self._at = at
        return at

    def read(self, size: int = -1) -> bytes:
        rest = max(len(self._view) - self._at, 0)
        size = rest if size < 0 else min(size, rest)
        if size > self._most:
            raise MessageError(f"a directory of {size} bytes, more than {self._most}; send fewer arrays in a message")
        self._at += size
        return bytes(self._view[self._at - size : self._at])

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        part = self._view[self._at : self._at + len(buffer)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)


def view_of(message: bytes | memoryview) -> memoryview:
    """The bytes of a message, without a copy."""
    view = memoryview(message).cast("B")
    if not len(view):
        raise MessageError("it is empty")
    return view


def sized(what: str, shape: Sequence[int], itemsize: int, most: int) -> int:
    """The bytes of an array of this shape. Raises `MessageError` for a size of 0 and beyond `most` bytes."""
    if any(type(size) is not int or size < 1 for size in shape):  # True is an int too
        raise MessageError(f"{what}: shape {shown(tuple(shape))}, expected sizes of 1 and more")
    if (size := math.prod(shape) * itemsize) > most:
        raise MessageError(
            f"{what}: declares {size} bytes of shape {shown(tuple(shape))}, more than the limit of {most}; "
            "raise largest_bytes if that is meant"
        )
    return size


def plain(what: str, dtype: np.dtype[Any]) -> None:
    """Raises `MessageError` for all types but numbers of up to 8 bytes and fixed text."""
    if dtype.hasobject:
        raise MessageError(f"{what}: type {shown(dtype.str)} holds Python objects, a pickle; send plain numbers")
    if dtype.kind not in "uifUS" or not dtype.itemsize or (dtype.kind in "uif" and dtype.itemsize > 8):
        raise MessageError(f"{what}: type {shown(str(dtype))}, expected plain numbers of up to 64 bits, or texts")


def data_type(what: str, dtype: np.dtype[Any]) -> None:
    """Raises `MessageError` for a type that data may not have."""
    if dtype.newbyteorder("=").name not in DATA_TYPES:
        raise MessageError(f"{what}: type {shown(str(dtype))}, expected one of {', '.join(sorted(DATA_TYPES))}")


def native(array: Array) -> Array:
    """`array` in this machine's byte order and C order: a view where it is so already."""
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
