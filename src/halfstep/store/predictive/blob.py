"""encode_trajectory and decode_trajectory: a trajectory as bytes, in groups of states that are coded together.

    header    magic, version, dimensions, axis of channels, states, CRC-32; shape of a state
    a group   states, bytes, errors, CRC-32; bytes of each record; records

A group refers to the last states of the group before, and to nothing else.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import numpy as np

from halfstep.errors import InputError
from halfstep.store.predictive import version1
from halfstep.store.predictive.framing import MAGIC, coders, damaged, header_checksum, version
from halfstep.store.predictive.noise import Noise
from halfstep.store.predictive.order import TAIL, Place, after_one, coding_order, needed
from halfstep.store.predictive.prediction import Float32, finite
from halfstep.store.predictive.promise import ErrorBudget, Promise
from halfstep.store.predictive.states import Coded, encode_state

GROUP = 16

_VERSION = 2
_HEADER = struct.Struct("<4sBBBII")  # magic, version, dimensions of a state, axis of channels, states, CRC-32
# States, bytes of what follows, and errors as in Accuracy; then their CRC-32.
_GROUP_HEADER = struct.Struct("<IIfff")
_CHECKSUM = struct.Struct("<I")
_NO_AXIS = 255
_FEWEST_VALUES = 256  # with fewer in a channel, neither weights nor errors of its own mean anything


@np.errstate(all="ignore")  # what overflows is looked for at the end
def encode_trajectory(
    latents: Float32,
    promise: Promise | None = None,
    *,
    group: int = GROUP,
    channel_axis: int = 0,
    after: bytes = b"",
    noise: Noise | None = None,
) -> bytes:
    """Compress float32 `latents` [S, ...] in groups of `group` states, for `promise`, by default fp16's error.

    Whatever the promise, values that are not finite and states whose values are all numbers of fp16 or bf16 come back
    bit for bit. `channel_axis` is that of a state; channels count as such from 256 values on. `after`: a blob of the
    states before these; the result holds those too. `noise`: what the first state may be, at any scale; where it is,
    hardly a byte of it is stored. Raises InputError for another type, no values, or states that do not fit.
    """
    if latents.dtype != np.float32 or latents.ndim < 1 or latents.size == 0:
        raise InputError(f"trajectory: got {latents.dtype} {list(latents.shape)}; expected float32 [steps, ...]")
    if not 1 <= group < 2**16:
        raise InputError(f"group: got {group}; expected 1 to 65535 steps")
    layout = _Layout.of(latents.shape[1:], channel_axis)
    groups: list[bytes] = []
    counts: list[int] = []
    tail: list[Float32] = []
    if after:
        blob = _Blob.parse(after)
        if blob.layout != layout:
            raise InputError(f"trajectory: got states of {layout.shape} after states of {blob.layout.shape}")
        groups, counts = [bytes(part) for part in blob.groups], blob.counts
        last = range(blob.states - min(TAIL, counts[-1]), blob.states)
        tail = [finite(state) for state in _decode(blob, last).values()]
    with coders(layout.values) as pool:
        for start in range(0, len(latents), group):
            states = layout.to_channels(latents[start : start + group])
            first = None if groups or noise is None else noise.fitted(latents[0])
            drawn = None if first is None else layout.to_channels(first.state(layout.shape)[None])[0]
            data, tail = _encode_group(states, tail, promise or Promise(), pool, first, drawn)
            groups.append(data)
            counts = [*counts, len(states)]
    return layout.header(sum(counts)) + b"".join(groups)


def decode_trajectory(blob: bytes) -> Float32:
    """The trajectory [S, ...] that `encode_trajectory` was given, within its promise. Raises StoreError when `blob` is
    damaged."""
    if version(blob) == 1:
        return version1.decode_trajectory(blob)
    parsed = _Blob.parse(blob)
    decoded = np.empty((parsed.states, *parsed.layout.channels), np.float32)
    _decode(parsed, range(parsed.states), out=decoded)
    return parsed.layout.from_channels(decoded)


def decode_states(blob: bytes, wanted: Sequence[int]) -> Float32:
    """The `wanted` states alone, [len(wanted), ...]; only those that they were predicted from are decoded beside them.
    Raises StoreError when their part of `blob` is damaged, IndexError for states that it does not hold."""
    states = count_states(blob)
    if wanted and not 0 <= min(wanted) <= max(wanted) < states:
        raise IndexError(f"states {min(wanted)} to {max(wanted)} of {states}")
    if version(blob) == 1:
        return version1.decode_trajectory(blob)[list(wanted)]
    parsed = _Blob.intact(blob)
    if wanted and max(wanted) >= parsed.states:
        raise damaged(f"{parsed.states} of its {states} states are intact")
    decoded = _decode(parsed, wanted)
    result = np.empty((len(wanted), *parsed.layout.channels), np.float32)
    for place, state in enumerate(wanted):
        result[place] = decoded[state]
    return parsed.layout.from_channels(result)


def count_states(blob: bytes) -> int:
    """How many states a blob holds. Raises StoreError when its header is damaged."""
    return version1.shape_of(blob)[0] if version(blob) == 1 else _Layout.parse(blob)[1]


def first_groups(blob: bytes, states: int | None = None) -> bytes:
    """A blob of the first groups, up to a number of `states`, or up to the first damaged one; b"" when there are none.
    Raises StoreError when its header is damaged, or the states are not there or do not end a group."""
    parsed = _Blob.intact(blob)
    ends = np.cumsum([0, *parsed.counts]).tolist()
    states = ends[-1] if states is None else states
    if states not in ends:
        raise damaged(f"{states} of its states are no whole groups, {ends[-1]} are intact")
    groups = parsed.groups[: ends.index(states)]
    return parsed.layout.header(states) + b"".join(groups) if groups else b""


@dataclass(frozen=True)
class Accuracy:
    """Errors against those of casting to the promised half type, as shares: over all states, of the worst state, and of
    the worst channel of a state. NaN where no half type was promised."""

    all: float
    state: float
    channel: float

    @classmethod
    def of(cls, blobs: Sequence[bytes]) -> Accuracy:
        """Of the states of several blobs, the groups weighed by their states. Raises StoreError when one is damaged."""
        parsed = [_Blob.parse(blob) for blob in blobs]
        parts = [part for blob in parsed for part in blob.accuracies]
        counts = [count for blob in parsed for count in blob.counts]
        squares = sum(part.all**2 * count for part, count in zip(parts, counts, strict=True))
        return cls(
            math.sqrt(squares / sum(counts)), max(part.state for part in parts), max(part.channel for part in parts)
        )


@dataclass(frozen=True)
class _Layout:
    """The shape of a state, and which of its axes are its channels; None: it has no channels."""

    shape: tuple[int, ...]
    axis: int | None

    @classmethod
    def of(cls, shape: tuple[int, ...], axis: int) -> _Layout:
        values = int(np.prod(shape, dtype=np.int64))
        if len(shape) < 2 or values // shape[axis] < _FEWEST_VALUES:
            return cls(shape, None)
        return cls(shape, axis % len(shape))

    @classmethod
    def parse(cls, blob: bytes) -> tuple[_Layout, int]:
        """The layout that a blob of version 2 begins with, and how many states follow."""
        if version(blob) != _VERSION:
            raise damaged("it is of version 1, to which nothing can be added")
        if len(blob) < _HEADER.size:
            raise damaged("it is shorter than its header")
        *header, checksum = _HEADER.unpack_from(blob)
        _, _, dimensions, axis, states = header
        raw_shape = blob[_HEADER.size :][: 4 * dimensions]
        if len(raw_shape) != 4 * dimensions or header_checksum(header, raw_shape) != checksum:
            raise damaged("its header does not match its checksum")
        shape = struct.unpack(f"<{dimensions}I", raw_shape)
        return cls(shape, None if axis == _NO_AXIS else axis), states

    def header(self, states: int) -> bytes:
        fields = (MAGIC, _VERSION, len(self.shape), _NO_AXIS if self.axis is None else self.axis, states)
        raw_shape = struct.pack(f"<{len(self.shape)}I", *self.shape)
        return _HEADER.pack(*fields, header_checksum(fields, raw_shape)) + raw_shape

    @property
    def size(self) -> int:
        return _HEADER.size + 4 * len(self.shape)

    @property
    def channels(self) -> tuple[int, int]:
        """How a state is seen: [C, N]."""
        channels = 1 if self.axis is None else self.shape[self.axis]
        return channels, self.values // channels

    @property
    def values(self) -> int:
        """Of a state."""
        return int(np.prod(self.shape, dtype=np.int64))

    def to_channels(self, states: Float32) -> Float32:
        """[S, ...] as [S, C, N], contiguous."""
        if self.axis is not None:
            states = np.moveaxis(states, self.axis + 1, 1)
        return np.ascontiguousarray(states).reshape(len(states), *self.channels)

    def from_channels(self, states: Float32) -> Float32:
        """[S, C, N] as [S, ...]."""
        if self.axis is None:
            return states.reshape(len(states), *self.shape)
        rest = [size for axis, size in enumerate(self.shape) if axis != self.axis]
        moved = states.reshape(len(states), self.shape[self.axis], *rest)
        return np.ascontiguousarray(np.moveaxis(moved, 1, self.axis + 1))


@dataclass(frozen=True)
class _Blob:
    """A blob whose checksums are right. `groups` are its groups as they are, with their headers."""

    layout: _Layout
    counts: list[int]
    groups: list[memoryview]
    accuracies: list[Accuracy]

    @property
    def states(self) -> int:
        return sum(self.counts)

    @classmethod
    def parse(cls, blob: bytes) -> _Blob:
        """All of a blob."""
        parsed, states = cls.intact(blob), _Layout.parse(blob)[1]
        size = parsed.layout.size + sum(map(len, parsed.groups))
        if parsed.states != states or size != len(blob):
            raise damaged(f"{parsed.states} of its {states} states are intact, in {size} of its {len(blob)} bytes")
        return parsed

    @classmethod
    def intact(cls, blob: bytes) -> _Blob:
        """The groups of a blob up to the first damaged one."""
        layout, _ = _Layout.parse(blob)
        found = list(_split(blob, layout))
        return cls(layout, [count for count, _, _ in found], [part for _, part, _ in found], [a for _, _, a in found])

    def records(self, group: int) -> list[memoryview]:
        """The records of a group, in the order of coding."""
        body, count = self.groups[group][_GROUP_HEADER.size + _CHECKSUM.size :], self.counts[group]
        ends = np.cumsum(np.frombuffer(body, "<u4", count), dtype=np.int64) + 4 * count
        return [body[start:end] for start, end in zip([4 * count, *ends[:-1]], ends, strict=True)]


def _split(blob: bytes, layout: _Layout) -> Iterator[tuple[int, memoryview, Accuracy]]:
    """States, bytes and errors of each group, up to the first one that does not match its checksum."""
    rest, head = memoryview(blob)[layout.size :], _GROUP_HEADER.size + _CHECKSUM.size
    while len(rest) >= head:
        count, size, *errors = _GROUP_HEADER.unpack_from(rest)
        part, rest = rest[: head + size], rest[head + size :]
        (checksum,) = _CHECKSUM.unpack_from(part, _GROUP_HEADER.size)
        if (
            not count
            or len(part) != head + size
            or _group_checksum(part[: _GROUP_HEADER.size], part[head:]) != checksum
        ):
            return
        yield count, part, Accuracy(*errors)


def _group_checksum(header: bytes | memoryview, body: bytes | memoryview) -> int:
    return zlib.crc32(body, zlib.crc32(header))


def _encode_group(
    states: Float32,
    tail: list[Float32],
    promise: Promise,
    pool: Executor,
    noise: Noise | None = None,
    drawn: Float32 | None = None,
) -> tuple[bytes, list[Float32]]:
    """`states` [S, C, N] as one group, and its own last states as they will be decoded. The first of all comes from
    `noise`, `drawn` [C, N], where that is given. Entropy coding runs in the pool, beside the prediction of the next
    state."""
    order = coding_order(len(states), len(tail))
    budget = ErrorBudget(states[[place.number for place in order]], promise)
    known = dict(zip(range(-len(tail), 0), tail, strict=True))
    pending: list[Future[bytes]] = []
    for number, place in enumerate(order):
        history, of_first = [known[tap] for tap in place.taps], None
        if number == 0 and drawn is not None:
            place, history, of_first = after_one(place.number), [drawn], noise
        coded, decoded = encode_state(states[place.number], history, place, budget, number, of_first)
        pending.append(pool.submit(Coded.to_bytes, coded))
        known[place.number] = finite(decoded)
    records = [future.result() for future in pending]
    body = b"".join([struct.pack(f"<{len(records)}I", *map(len, records)), *records])
    header = _GROUP_HEADER.pack(len(states), len(body), *budget.accuracy)
    checksum = _CHECKSUM.pack(_group_checksum(header, body))
    return header + checksum + body, [known[place] for place in range(max(0, len(states) - TAIL), len(states))]


def _decode(blob: _Blob, wanted: Iterable[int], out: Float32 | None = None) -> dict[int, Float32]:
    """The wanted states [C, N], decoded into `out` [S, C, N] where it is given, by their numbers in the order of
    `wanted`."""
    wanted = list(wanted)
    decoded: dict[int, Float32] = {}
    known: dict[int, Future[Float32]] = {}  # without what is not finite
    start, before = 0, 0
    with coders(blob.layout.values) as pool:
        for group, part in enumerate(needed(blob.counts, wanted)):
            records = blob.records(group)
            for place, record in zip(coding_order(blob.counts[group], before), records, strict=True):
                number = start + place.number
                if place.number in part:
                    target = np.empty(blob.layout.channels, np.float32) if out is None else out[number]
                    taps = [known[start + tap] for tap in place.taps]
                    decoded[number] = target
                    known[number] = pool.submit(_decode_state, record, taps, place, target, blob.layout)
            start, before = start + blob.counts[group], blob.counts[group]
        for future in known.values():
            future.result()
    return {state: decoded[state] for state in wanted}


@np.errstate(all="ignore")
def _decode_state(
    data: memoryview, taps: list[Future[Float32]], place: Place, target: Float32, layout: _Layout
) -> Float32:
    """Decode a record into `target` [C, N] once its `taps` are there. Threads take up states in the order of coding, so
    none waits for one that nobody works on."""
    try:
        coded = Coded.from_bytes(data, len(target))
        history = [tap.result() for tap in taps] if coded.weights.size else []
        if coded.noise is not None:
            place, history = after_one(place.number), [layout.to_channels(coded.noise.state(layout.shape)[None])[0]]
        coded.decode(history, place, target)
    except (struct.error, ValueError, IndexError, RuntimeError) as error:
        raise damaged(f"a state cannot be read ({error})") from error
    return finite(target)
