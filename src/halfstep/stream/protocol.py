"""The acknowledged protocol, version 1: a producer keeps an event until the engine says that it is on disk.

Over ZeroMQ, DEALER at the producer, ROUTER at the engine. A message has these parts:

1. `halfstep-stream/1`
2. a msgpack map with `kind` and what is listed below
3. the data of an event, in C order and little-endian; nothing for other kinds
4. CRC32C (RFC 3720) of the parts before it, four bytes, big-endian

| kind | from | besides |
|---|---|---|
| `event` | producer | `run`, `source`, `sequence`, `event`, `dtype` (numpy's name), `shape` [C, H, W], `facts` |
| `ask` | producer | `run`, `source`, `asked`: pairs of first and last number that were not acknowledged yet |
| `end` | producer | `run`, `source`, `count`: numbers go from 0 to `count` - 1, and no more will come |
| `state` | engine | `run`, `source`, `engine`, `window`, `committed`, `leased`, `refused`, `ended`, `answers` |

`run` is new each time that a producer begins anew, `source` is the producer's name, and the two together with
`sequence` say which event it is. A producer has at most `window` events under way (8 until it was told). The engine
sends a `state` when events were committed or refused, and in answer to `ask` and `end`. A producer that hears nothing
asks again, about once a second. When all its events are acknowledged or refused it sends `end`, again and again until a
`state` with `ended` comes, or for half a minute: then the engine has left, and has all. What is neither committed nor
leased nor refused in an answer is not there: it is sent again. `answers` is the largest number that was asked for, -1
in a state that answers no `ask`. `refused` has pairs of number and reason: the engine has put the event among its dead
letters. So nothing depends on whether a message, an acknowledgment or the engine itself was lost. Events may be sent
again at any time: the engine knows them by number, also after a restart, from its files.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c
import msgpack
import numpy as np

from halfstep.stream.events import Array, Event, Identity, Message, MessageError

MAGIC = b"halfstep-stream/1"
FIRST_WINDOW = 8

Parts = Sequence[bytes | memoryview]
Ranges = list[tuple[int, int]]

_TYPES = {np.dtype(name).name for name in ("u1", "u2", "u4", "i1", "i2", "i4", "f2", "f4", "f8")}


@dataclass(frozen=True)
class State:
    """What the engine says of a producer's events. Ranges are pairs of first and last."""

    run: str
    source: str
    engine: str
    window: int
    committed: Ranges
    leased: Ranges
    refused: list[tuple[int, str]]
    ended: bool = False
    answers: int = -1


def pack_event(event: Event) -> list[bytes | memoryview]:
    """The parts of an event's message; its data is not copied when it is contiguous and little-endian."""
    data = np.ascontiguousarray(event.data, event.data.dtype.newbyteorder("<"))
    run, source, name, sequence = event.identity
    header = {
        "kind": "event",
        "run": run,
        "source": source,
        "sequence": sequence,
        "event": name,
        "dtype": data.dtype.name,
        "shape": list(data.shape),
        "facts": dict(event.facts),
    }
    return _packed(header, data.reshape(-1).view(np.uint8).data)


def pack_ask(run: str, source: str, asked: Ranges) -> list[bytes | memoryview]:
    return _packed({"kind": "ask", "run": run, "source": source, "asked": asked})


def pack_end(run: str, source: str, count: int) -> list[bytes | memoryview]:
    return _packed({"kind": "end", "run": run, "source": source, "count": count})


def pack_state(state: State) -> list[bytes | memoryview]:
    return _packed({"kind": "state", **vars(state)})


def unpack(parts: Parts) -> Message:
    """What a producer's message says. Raises MessageError when it is damaged or not of this protocol."""
    header = _header(parts)
    kind = header.get("kind")
    run, source = _text(header, "run"), _text(header, "source")
    if kind == "event":
        identity = Identity(run, source, _text(header, "event"), _number(header, "sequence"))
        try:
            event = Event(identity, _data(header, parts[2]), _facts(header))
        except MessageError as error:
            error.identity = identity
            raise
        return Message((event,), run, source)
    if kind == "ask":
        return Message(run=run, source=source, asked=tuple(_ranges(header, "asked")))
    if kind == "end":
        return Message(run=run, source=source, ends=True, expected=_number(header, "count"))
    raise MessageError(f"message: got kind {kind!r}; expected event, ask or end")


def unpack_state(parts: Parts) -> State:
    """What the engine's message says. Raises MessageError when it is damaged or not of this protocol."""
    header = _header(parts)
    if header.get("kind") != "state":
        raise MessageError(f"message: got kind {header.get('kind')!r}; expected state")
    refused = header.get("refused")
    if not isinstance(refused, list):
        raise MessageError(f"message: got refused {refused!r}; expected pairs of number and reason")
    return State(
        _text(header, "run"),
        _text(header, "source"),
        _text(header, "engine"),
        max(1, _number(header, "window")),
        _ranges(header, "committed"),
        _ranges(header, "leased"),
        [(int(number), str(reason)) for number, reason in refused],
        bool(header.get("ended")),
        int(header.get("answers", -1)),
    )


def peek_sender(parts: Parts) -> tuple[str, str] | None:
    """Run and source of a message that may be damaged, to know whom to answer; None when it cannot be told."""
    try:
        header = msgpack.unpackb(parts[1])
        return header["run"], header["source"]
    except (ValueError, TypeError, KeyError, IndexError, msgpack.UnpackException):
        return None


def checksum(parts: Parts) -> int:
    """CRC32C of parts one after the other."""
    total = 0
    for part in parts:
        total = google_crc32c.extend(total, np.frombuffer(part, np.uint8) if isinstance(part, memoryview) else part)
    return total


def _packed(header: Mapping[str, Any], data: bytes | memoryview = b"") -> list[bytes | memoryview]:
    parts: list[bytes | memoryview] = [MAGIC, msgpack.packb(header), data]
    return [*parts, struct.pack(">I", checksum(parts))]


def _header(parts: Parts) -> dict[str, Any]:
    if not parts or bytes(parts[0]) != MAGIC:
        got = bytes(parts[0][:32]) if parts else b""
        raise MessageError(f"message: begins with {got!r}; expected {MAGIC!r} (serialization_format says which it is)")
    if len(parts) != 4 or len(parts[3]) != 4:
        raise MessageError(f"message: got {len(parts)} parts; expected four, the last a checksum")
    if checksum(parts[:3]) != struct.unpack(">I", bytes(parts[3]))[0]:
        raise MessageError("message: its CRC32C is another one; it was damaged on the way")
    try:
        header = msgpack.unpackb(parts[1])
    except (ValueError, msgpack.UnpackException) as error:
        raise MessageError(f"message: its header is no msgpack ({error})") from error
    if not isinstance(header, dict):
        raise MessageError(f"message: its header is {type(header).__name__}; expected a map")
    return header


def _data(header: Mapping[str, Any], data: bytes | memoryview) -> Array:
    name, shape = header.get("dtype"), header.get("shape")
    if name not in _TYPES:
        raise MessageError(f"message: got dtype {name!r}; expected one of {', '.join(sorted(_TYPES))}")
    if not (isinstance(shape, list) and len(shape) == 3 and all(isinstance(n, int) and n > 0 for n in shape)):
        raise MessageError(f"message: got shape {shape!r}; expected [panels, height, width]")
    dtype = np.dtype(name).newbyteorder("<")
    if len(data) != (expected := int(np.prod(shape, dtype=object)) * dtype.itemsize):
        raise MessageError(f"message: got {len(data)} bytes of data; {name} {shape} has {expected}")
    array: Array = np.frombuffer(data, dtype).reshape(shape)
    return array


def _facts(header: Mapping[str, Any]) -> dict[str, int | float | str]:
    facts = header.get("facts")
    if not isinstance(facts, dict) or not all(
        isinstance(name, str) and isinstance(value, (int, float, str)) for name, value in facts.items()
    ):
        raise MessageError("message: its facts are no map of names to numbers and text")
    return facts


def _text(header: Mapping[str, Any], name: str) -> str:
    if not isinstance(value := header.get(name), str):
        raise MessageError(f"message: got {name} {value!r}; expected text")
    return value


def _number(header: Mapping[str, Any], name: str) -> int:
    value = header.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise MessageError(f"message: got {name} {value!r}; expected a whole number from 0")
    return value


def _ranges(header: Mapping[str, Any], name: str) -> Ranges:
    pairs = header.get(name)
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(n, int) for n in pair) and 0 <= pair[0] <= pair[1]
        for pair in pairs
    ):
        raise MessageError(f"message: got {name} {pairs!r}; expected pairs of first and last number")
    return [(first, last) for first, last in pairs]
