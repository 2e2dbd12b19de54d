"""Blobs of version 1, which are read and no longer written: each state is predicted from the three before it, and each
group opens on its own.

Axes: S steps, C channels, N values of a channel.
"""

from __future__ import annotations

import struct
import zlib
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pcodec import standalone

from halfstep.store.predictive.framing import coders, damaged, header_checksum
from halfstep.store.predictive.prediction import Float32

_TAPS = 3
_HEADER = struct.Struct("<4sBBHfI")  # magic, version, dimensions, group, bin width, CRC-32 of shape and header
_GROUP_HEADER = struct.Struct("<II")  # bytes and CRC-32 of what follows
_STEP_HEADER = struct.Struct("<BBHII")  # kind, taps, sets of weights, exceptions, bytes of the entropy-coded values
_EXACT = 0
_FEWEST_VALUES = 256  # of a channel that has weights of its own


@dataclass(frozen=True)
class _Step:
    """One coded step: its kind, weights [sets, taps + 1] (the last is the offset), entropy-coded values, exceptions."""

    kind: int
    weights: Float32
    values: bytes
    places: npt.NDArray[np.uint32]
    exact: npt.NDArray[np.uint32]


def shape_of(blob: bytes) -> tuple[int, ...]:
    """The shape [S, ...] of the trajectory in a blob. Raises StoreError when its header is damaged."""
    return _header(blob)[0]


def decode_trajectory(blob: bytes) -> Float32:
    """The trajectory [S, ...] in a blob of version 1. Raises StoreError when it is damaged."""
    shape, group, width, rest = _header(blob)
    groups = list(_split_groups(rest, -(-shape[0] // group)))
    steps = np.empty((shape[0], *_channels(shape)), np.float32)
    with coders(steps[0].size) as pool, coders(steps[0].size) as inner:
        parts = [steps[i : i + group] for i in range(0, len(steps), group)]
        list(pool.map(lambda data, part: _decode_group(data, part, width, inner), groups, parts))
    return steps.reshape(shape)


def _header(blob: bytes) -> tuple[tuple[int, ...], int, float, memoryview]:
    if len(blob) < _HEADER.size:
        raise damaged("it is shorter than its header")
    *header, checksum = _HEADER.unpack_from(blob)
    _, _, dimensions, group, width = header
    end = _HEADER.size + 4 * dimensions
    raw_shape = blob[_HEADER.size : end]
    if len(raw_shape) != 4 * dimensions or header_checksum(header, raw_shape) != checksum:
        raise damaged("its header does not match its checksum")
    return struct.unpack(f"<{dimensions}I", raw_shape), group, width, memoryview(blob)[end:]


def _channels(shape: tuple[int, ...]) -> tuple[int, int]:
    """How a step is seen: [C, N]."""
    values = int(np.prod(shape[1:], dtype=np.int64))
    channels = shape[1] if len(shape) >= 3 else 1
    return (channels, values // channels) if channels and values // channels >= _FEWEST_VALUES else (1, values)


def _split_groups(data: memoryview, count: int) -> list[memoryview]:
    groups = []
    for _ in range(count):
        if len(data) < _GROUP_HEADER.size:
            raise damaged("it ends before its last group")
        size, checksum = _GROUP_HEADER.unpack_from(data)
        body, data = data[_GROUP_HEADER.size :][:size], data[_GROUP_HEADER.size + size :]
        if len(body) != size or zlib.crc32(body) != checksum:
            raise damaged("a group does not match its checksum")
        groups.append(body)
    if len(data):
        raise damaged(f"{len(data)} bytes follow its last group")
    return groups


def _decode_group(data: memoryview, steps: Float32, width: float, pool: Executor) -> None:
    """Decode one group, whose checksum is right, into `steps` [S, C, N]."""
    parsed = _parse_steps(data, len(steps))
    values = [pool.submit(standalone.simple_decompress, step.values) for step in parsed]
    history: list[Float32] = []
    for target, step, future in zip(steps, parsed, values, strict=True):
        numbers = future.result()
        if numbers.size != target.size:
            raise damaged(f"a step has {numbers.size} values instead of {target.size}")
        if step.kind == _EXACT:
            target[:] = numbers.reshape(target.shape)
        else:
            prediction = _predict(history, step.weights)
            np.multiply(numbers.reshape(target.shape).astype(np.float32), np.float32(width), out=target)
            target += prediction
            target.reshape(-1)[step.places] = step.exact.view(np.float32)
        history = [*history, _finite(target)][-_TAPS:]


def _predict(history: list[Float32], weights: Float32) -> Float32 | np.float32:
    if not weights.size:
        return np.float32(0)
    with np.errstate(over="ignore", invalid="ignore"):
        prediction = weights[:, :1] * history[0]
        for column, past in enumerate(history[1:], start=1):
            prediction += weights[:, column, None] * past
        prediction += weights[:, -1:]
    return _finite(prediction)


def _finite(values: Float32) -> Float32:
    finite = np.isfinite(values)
    return values if finite.all() else np.where(finite, values, np.float32(0))


def _parse_steps(data: memoryview, count: int) -> list[_Step]:
    steps, at = [], 0
    try:
        for _ in range(count):
            kind, taps, sets, exceptions, size = _STEP_HEADER.unpack_from(data, at)
            at += _STEP_HEADER.size
            columns = taps + 1 if sets else 0
            weights = np.frombuffer(data, np.float32, sets * columns, at).reshape(sets, columns)
            at += weights.nbytes
            places = np.frombuffer(data, np.uint32, exceptions, at)
            exact = np.frombuffer(data, np.uint32, exceptions, at + places.nbytes)
            at += 2 * places.nbytes
            steps.append(_Step(kind, weights, bytes(data[at : at + size]), places, exact))
            at += size
    except (struct.error, ValueError) as error:
        raise damaged(f"a step cannot be read ({error})") from error
    return steps
