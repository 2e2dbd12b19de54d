"""CBOR (RFC 8949) as detectors send it: numbers, texts, byte strings, arrays, maps and tags. Byte strings are views of
the message and no tag is acted on, so that reading costs no more than the message is long: cbor2 copies the pixels, and
makes dates, patterns and shared objects of what it is sent."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from halfstep.stream.events import Fact, MessageError
from halfstep.stream.formats.arrays import fact
from halfstep.stream.formats.base import shown

_MOST_ITEMS = 100_000
_MOST_DEPTH = 32
_FLOATS = {25: struct.Struct(">e"), 26: struct.Struct(">f"), 27: struct.Struct(">d")}
_SIMPLE = {20: False, 21: True, 22: None, 23: None}
_BREAK = object()


@dataclass(frozen=True)
class Tag:
    """A value with the number that says what it means."""

    number: int
    value: Any


def read_map(message: memoryview) -> dict[str, Any]:
    """The map that `message` is, of texts -> int, float, str, bool, None, memoryview, list, dict or `Tag`. Raises
    `MessageError`."""
    reader = _Reader(message)
    content = reader.item(0)
    if reader.at != len(message):
        raise MessageError(f"{len(message) - reader.at} bytes follow its CBOR map")
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise MessageError("its CBOR is not a map of named values")
    return content


def facts_of(content: Mapping[str, Any], without: Sequence[str]) -> dict[str, Fact]:
    """The numbers and short texts of a map by their names, but for `without`. A pair of whole numbers is the ratio of
    the two, a date is its text."""
    facts: dict[str, Fact] = {}
    for name, value in content.items():
        if isinstance(value, Tag) and value.number == 0:
            value = value.value
        if isinstance(value, list) and len(value) == 2 and all(type(part) is int for part in value) and value[1]:
            value = value[0] / value[1]
        if name not in without and (plain := fact(value)) is not None:
            facts[name] = plain
    return facts


def name_of(content: Mapping[str, Any], keys: Sequence[str]) -> str:
    """The name of a run: the first of `keys` that has one, a text or a number. Raises `MessageError`."""
    for key in keys:
        if isinstance(value := content.get(key), str | int) and (name := fact(value)) not in (None, ""):
            return str(name)
    raise MessageError(f"none of {', '.join(keys)} says which run it is of")


class _Reader:
    def __init__(self, message: memoryview) -> None:
        self._message, self.at, self._items = message, 0, 0

    def item(self, depth: int) -> Any:
        self._items += 1
        if depth > _MOST_DEPTH or self._items > _MOST_ITEMS:
            raise MessageError(f"its CBOR is nested beyond {_MOST_DEPTH} deep, or has more than {_MOST_ITEMS} items")
        first = self._take(1)[0]
        major, info = first >> 5, first & 31
        if major == 7:
            return self._simple(info)
        size = self._argument(info) if info != 31 else None
        if major in (0, 1, 6) and size is None:
            raise MessageError(f"byte {self.at - 1} is no CBOR")
        if major == 0:
            return size
        if major == 1:
            return -1 - size  # type: ignore[operator]
        if major in (2, 3):
            raw = self._take(size) if size is not None else self._pieces(major, depth)
            return raw if major == 2 else str(raw, "utf-8")
        if major == 4:
            return self._array(size, depth)
        if major == 5:
            return self._map(size, depth)
        return Tag(size, self._value(depth))  # type: ignore[arg-type]

    def _take(self, size: int) -> memoryview:
        taken = self._message[self.at : self.at + size]
        if len(taken) != size:
            raise MessageError(
                f"its CBOR ends within a value, {size - len(taken)} bytes short: it is cut short or damaged"
            )
        self.at += size
        return taken

    def _argument(self, info: int) -> int:
        if info < 24:
            return info
        if info > 27:
            raise MessageError(f"byte {self.at - 1} is no CBOR")
        return int.from_bytes(self._take(1 << info - 24), "big")

    def _simple(self, info: int) -> Any:
        if info in _SIMPLE:
            return _SIMPLE[info]
        if info in _FLOATS:
            return _FLOATS[info].unpack(self._take(_FLOATS[info].size))[0]
        if info == 31:
            return _BREAK
        raise MessageError(f"byte {self.at - 1} is no CBOR that detectors send")

    def _value(self, depth: int) -> Any:
        value = self.item(depth + 1)
        if value is _BREAK:
            raise MessageError(f"byte {self.at - 1} ends something that has not begun")
        return value

    def _pieces(self, major: int, depth: int) -> memoryview:
        joined, pieces = bytearray(), 0  # joined at once: a view of each piece would take hundreds of times its bytes
        while (first := self._take(1)[0]) != 0xFF:
            pieces += 1
            if first >> 5 != major or first & 31 == 31 or pieces > _MOST_ITEMS:
                raise MessageError(f"byte {self.at - 1} is no piece of a string")
            joined += self._take(self._argument(first & 31))
        return memoryview(bytes(joined))

    def _array(self, size: int | None, depth: int) -> list[Any]:
        if size is None:
            return list(iter(lambda: self.item(depth + 1), _BREAK))
        self._room(size)
        return [self._value(depth) for _ in range(size)]

    def _map(self, size: int | None, depth: int) -> dict[Any, Any]:
        if size is not None:
            self._room(size)
        content: dict[Any, Any] = {}
        while size is None or len(content) < size:
            key = self.item(depth + 1)
            if key is _BREAK and size is None:
                break
            if not isinstance(key, str | int) or key in content:
                raise MessageError(f"the key {shown(key)} of a map is there twice, or is neither text nor number")
            content[key] = self._value(depth)
        return content

    def _room(self, size: int) -> None:
        if size > len(self._message) - self.at:
            raise MessageError(f"its CBOR declares {size} values, more than the bytes that are left")
