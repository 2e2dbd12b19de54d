"""The predictive codec for sampling trajectories: a bounded error in a fraction of half precision's bytes.

A sampler's latents move smoothly, so a step is nearly a linear combination of the few before it. Each step is predicted
from the *decoded* steps before it (closed loop: errors do not add up) with least-squares weights a channel, the
residual is quantized to bins of twice the promised error, and the integers are entropy-coded by pcodec. Steps fall into
groups that open on their own. What the promise cannot hold for in bins (values that are not finite, or huge next to the
bound) is kept exactly.

Axes: S steps, C channels, N values of a channel.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, standalone

from halfstep.errors import InputError, StoreError
from halfstep.machine import cores

Float32 = npt.NDArray[np.float32]
Fidelity = Literal["fp16", "bf16"]
T = TypeVar("T")

GROUP = 16
TAPS = 3

_MAGIC = b"HSTC"
_VERSION = 1
_HEADER = struct.Struct("<4sBBHfI")  # magic, version, dimensions, group, bin width, CRC-32 of shape and header
_GROUP_HEADER = struct.Struct("<II")  # bytes and CRC-32 of what follows
_STEP_HEADER = struct.Struct("<BBHII")  # kind, taps, sets of weights, exceptions, bytes of the entropy-coded values
_EXACT, _BINS16, _BINS32 = range(3)

# Bins are narrower than twice the bound by this much, so that float32 rounding does not push values over it.
_SLACK = 1 - 2**-10
_UNEVEN = 0.95  # residuals of a bin or less are not spread evenly over it: up to 4% more error on smooth trajectories
_LARGEST_BIN = 2**23  # bin numbers up to here are exact in float32
_MOST_EXCEPTIONS = 0.02  # of a step; beyond, keeping all of it exactly is smaller
_FITTED_VALUES = 256  # of a channel are enough to fit a handful of weights
_FEWEST_VALUES = 256  # with fewer in a channel, weights of its own cost more than they save
_PARALLEL_VALUES = 1 << 17  # of a step
_BLOCK = 1 << 16  # values that stay in the cache
_BINS_CONFIG = ChunkConfig(compression_level=8, mode_spec=ModeSpec.classic(), delta_spec=DeltaSpec.no_op())
_EXACT_CONFIG = ChunkConfig(compression_level=8)


def encode_trajectory(
    latents: Float32, *, max_error: float | None = None, fidelity: Fidelity | None = "fp16", group: int = GROUP
) -> bytes:
    """Compress float32 `latents` [S, ...]; with three axes or more the second is taken for channels.

    The promise: no finite value differs by more than `max_error` after decoding, and all others are the same bit for
    bit. Without `max_error`, `fidelity` chooses the bound whose root-mean-square error is at most that of casting
    `latents` to fp16 or bf16; `fidelity=None` keeps everything exactly. `group` steps form one group. Raises InputError
    for another type, no values, or a bound that is negative or not finite.
    """
    if latents.dtype != np.float32 or latents.ndim < 1 or latents.size == 0:
        raise InputError(f"trajectory: got {latents.dtype} {list(latents.shape)}; expected float32 [steps, ...]")
    if not 1 <= group < 2**16:
        raise InputError(f"group: got {group}; expected 1 to 65535 steps")
    width, bound = _bin_width(latents, max_error, fidelity)
    shape = struct.pack(f"<{latents.ndim}I", *latents.shape)
    header = (_MAGIC, _VERSION, latents.ndim, group, width)
    steps = np.ascontiguousarray(latents).reshape(len(latents), *_channels(latents.shape))
    with _pool(steps[0]) as pool, _pool(steps[0]) as coders:
        parts = [steps[i : i + group] for i in range(0, len(steps), group)]
        groups = list(pool.map(lambda part: _encode_group(part, width, bound, coders), parts))
    return b"".join([_HEADER.pack(*header, _header_checksum(header, shape)), shape, *groups])


def decode_trajectory(blob: bytes) -> Float32:
    """The trajectory that `encode_trajectory` was given, within its bound. Raises StoreError when `blob` is damaged."""
    if len(blob) < _HEADER.size:
        raise _damaged("it is shorter than its header")
    *header, checksum = _HEADER.unpack_from(blob)
    magic, version, dimensions, group, width = header
    if magic != _MAGIC or version != _VERSION:
        raise _damaged(f"it begins with {magic!r} version {version}, not with {_MAGIC!r} version {_VERSION}")
    end = _HEADER.size + 4 * dimensions
    raw_shape = blob[_HEADER.size : end]
    if len(raw_shape) != 4 * dimensions or _header_checksum(header, raw_shape) != checksum:
        raise _damaged("its header does not match its checksum")
    shape = struct.unpack(f"<{dimensions}I", raw_shape)
    groups = list(_split_groups(memoryview(blob)[end:], -(-shape[0] // group)))
    steps = np.empty((shape[0], *_channels(shape)), np.float32)
    with _pool(steps[0]) as pool, _pool(steps[0]) as coders:
        parts = [steps[i : i + group] for i in range(0, len(steps), group)]
        list(pool.map(lambda data, part: _decode_group(data, part, width, coders), groups, parts))
    return steps.reshape(shape)


@dataclass(frozen=True)
class _Step:
    """One coded step: its kind, weights [sets, taps + 1] (the last is the offset), entropy-coded values, exceptions."""

    kind: int
    weights: Float32
    values: bytes
    places: npt.NDArray[np.uint32]
    exact: npt.NDArray[np.uint32]

    def to_bytes(self) -> bytes:
        sets, columns = self.weights.shape
        header = _STEP_HEADER.pack(self.kind, max(columns - 1, 0), sets, len(self.places), len(self.values))
        return b"".join([header, self.weights.tobytes(), self.places.tobytes(), self.exact.tobytes(), self.values])


_NO_WEIGHTS = np.empty((0, 0), np.float32)
_NO_PLACES = np.empty(0, np.uint32)


def _channels(shape: tuple[int, ...]) -> tuple[int, int]:
    """How a step is seen: [C, N]."""
    values = int(np.prod(shape[1:], dtype=np.int64))
    channels = shape[1] if len(shape) >= 3 else 1
    return (channels, values // channels) if channels and values // channels >= _FEWEST_VALUES else (1, values)


def _bin_width(latents: Float32, max_error: float | None, fidelity: Fidelity | None) -> tuple[float, float]:
    """The width of the bins, a float32 value, and the bound it serves; a width of 0 keeps everything exactly."""
    if max_error is not None:
        if not 0 <= max_error < np.inf:
            raise InputError(f"max_error: got {max_error}; expected a finite number, 0 or more")
        bound = float(max_error)
    elif fidelity is None:
        bound = 0.0
    else:
        # Errors uniform in bins of width w have the root-mean-square w / sqrt(12).
        bound = float(np.sqrt(3) * _rounding_rms(latents, fidelity) * _UNEVEN)
    width = float(np.nextafter(np.float32(min(2 * bound * _SLACK, 1e38)), np.float32(0)))
    # Products of tiny bins would be subnormal, and lose their digits.
    return (width, bound) if width >= 2.0**-100 else (0.0, 0.0)


def _rounding_rms(latents: Float32, fidelity: Fidelity) -> float:
    """Root-mean-square error of casting to a half type, over the values that stay finite in it."""
    if fidelity not in ("fp16", "bf16"):
        raise InputError(f"fidelity: got {fidelity!r}; expected fp16, bf16 or None")
    values = np.ascontiguousarray(latents).reshape(-1)
    total, count = 0.0, 0
    for start in range(0, values.size, _BLOCK):
        block = values[start : start + _BLOCK]
        with np.errstate(over="ignore", invalid="ignore"):
            error = (_rounded(block, fidelity) - block).astype(np.float64)
        if not np.isfinite(error).all():
            error = error[np.isfinite(error)]
        total += float(error @ error)
        count += error.size
    return float(np.sqrt(total / count)) if count else 0.0


def _rounded(values: Float32, fidelity: Fidelity) -> Float32:
    """`values` rounded to the nearest of a half type, ties to even. Bits are cut off as integers because numpy converts
    to float16 one value at a time."""
    drop = 13 if fidelity == "fp16" else 16
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32((1 << drop - 1) - 1) + ((bits >> drop) & 1)) & np.uint32(-(1 << drop) & 0xFFFFFFFF)
    result: Float32 = rounded.view(np.float32)
    if fidelity == "fp16":
        magnitude = np.abs(values)
        subnormal = magnitude < 2.0**-14
        if subnormal.any():
            result[subnormal] = np.rint(values[subnormal] * np.float32(2.0**24)) * np.float32(2.0**-24)
        if not magnitude.max() <= 65504:  # or NaN among them
            result[np.abs(result) > 65504] = np.inf
    return result


def _encode_group(steps: Float32, width: float, bound: float, pool: Executor) -> bytes:
    """`steps` [S, C, N] as one group. Entropy coding runs in the pool, beside the prediction of the next step."""
    history: list[Float32] = []
    coded: list[Future[_Step]] = []
    for step in steps:
        kind, weights, numbers, decoded = _quantize(step, history, width)
        if kind == _EXACT:
            coded.append(pool.submit(_exact_step, step))
            decoded = step
        else:
            with np.errstate(invalid="ignore", over="ignore"):
                error = np.abs(decoded - step)
            # A float32 difference is right to 2^-24 of itself, so what passes here keeps the bound. NaN does not pass.
            limit = np.float32(bound * (1 - 2**-20))
            places = _NO_PLACES if error.max() <= limit else np.flatnonzero(~(error <= limit)).astype(np.uint32)
            if len(places) > _MOST_EXCEPTIONS * step.size:
                coded.append(pool.submit(_exact_step, step))
                decoded = step
            else:
                exact = step.reshape(-1)[places]
                decoded.reshape(-1)[places] = exact
                coded.append(pool.submit(_binned_step, kind, weights, numbers, places, exact.view(np.uint32)))
        history = [*history, _finite(decoded)][-TAPS:]
    body = b"".join(future.result().to_bytes() for future in coded)
    return _GROUP_HEADER.pack(len(body), zlib.crc32(body)) + body


def _quantize(step: Float32, history: list[Float32], width: float) -> tuple[int, Float32, npt.NDArray[Any], Float32]:
    """Kind, weights, bin numbers and decoded values of a step, predicted from `history` where that helps."""
    if width == 0:
        return _EXACT, _NO_WEIGHTS, np.empty(0, np.int32), step
    weights = _NO_WEIGHTS
    if history:
        sample = slice(None, None, max(1, step.shape[1] // _FITTED_VALUES))
        some = step[:, sample]
        some_history = [past[:, sample] for past in history]
        fitted = _fit(some, some_history)
        if _bits(some - _predict(some_history, fitted), width) < _bits(some, width):
            weights = fitted
    prediction = _predict(history, weights)
    with np.errstate(invalid="ignore", over="ignore"):
        bins = step - prediction
        bins *= np.float32(1 / width)
        np.rint(bins, out=bins)
        low, high = float(bins.min()), float(bins.max())
        if not -_LARGEST_BIN <= low <= high <= _LARGEST_BIN:  # NaN is not either
            bins[~(np.abs(bins) <= _LARGEST_BIN)] = 0  # these become exceptions
            low, high = float(bins.min()), float(bins.max())
        decoded = bins * np.float32(width)
        decoded += prediction
    kind, dtype = (_BINS16, np.int16) if max(high, -low) < 2**15 else (_BINS32, np.int32)
    return kind, weights, bins.astype(dtype), decoded


def _bits(values: Float32, width: float) -> float:
    """About how many bits a bin number of `values` takes."""
    with np.errstate(invalid="ignore", over="ignore"):
        magnitude = np.minimum(np.abs(values / np.float32(width)), np.float32(_LARGEST_BIN))
    return float(np.log2(1 + _finite(magnitude)).mean())


def _fit(step: Float32, history: list[Float32]) -> Float32:
    """Least-squares weights [C, taps + 1] of the steps before, and an offset, for each channel."""
    basis = np.stack([*history, np.ones_like(step)], axis=1).astype(np.float64)  # [C, taps + 1, N]
    gram = basis @ basis.transpose(0, 2, 1)
    moment = basis @ _finite(step).astype(np.float64)[:, :, None]
    # A touch of ridge, so that steps which repeat each other leave no direction open.
    ridge = 1e-12 * np.trace(gram, axis1=1, axis2=2)
    gram += ridge[:, None, None] * np.eye(gram.shape[1])
    weights = np.linalg.solve(gram, moment)[:, :, 0]
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = weights.astype(np.float32)
    return np.where(np.isfinite(narrow), narrow, np.float32(0))


def _predict(history: list[Float32], weights: Float32) -> Float32 | np.float32:
    """The same float32 operations in the same order for encoding and decoding."""
    if not weights.size:
        return np.float32(0)
    with np.errstate(over="ignore", invalid="ignore"):
        prediction = weights[:, :1] * history[0]
        for column, past in enumerate(history[1:], start=1):
            prediction += weights[:, column, None] * past
        prediction += weights[:, -1:]
    return _finite(prediction)


def _finite(values: Float32) -> Float32:
    """Without what is not finite: predictions go on from zero there, the values themselves are kept elsewhere."""
    finite = np.isfinite(values)
    return values if finite.all() else np.where(finite, values, np.float32(0))


def _exact_step(step: Float32) -> _Step:
    return _Step(
        _EXACT, _NO_WEIGHTS, standalone.simple_compress(step.reshape(-1), _EXACT_CONFIG), _NO_PLACES, _NO_PLACES
    )


def _binned_step(
    kind: int,
    weights: Float32,
    numbers: npt.NDArray[Any],
    places: npt.NDArray[np.uint32],
    exact: npt.NDArray[np.uint32],
) -> _Step:
    return _Step(kind, weights, standalone.simple_compress(numbers.reshape(-1), _BINS_CONFIG), places, exact)


def _split_groups(data: memoryview, count: int) -> list[memoryview]:
    groups = []
    for _ in range(count):
        if len(data) < _GROUP_HEADER.size:
            raise _damaged("it ends before its last group")
        size, checksum = _GROUP_HEADER.unpack_from(data)
        body, data = data[_GROUP_HEADER.size :][:size], data[_GROUP_HEADER.size + size :]
        if len(body) != size or zlib.crc32(body) != checksum:
            raise _damaged("a group does not match its checksum")
        groups.append(body)
    if len(data):
        raise _damaged(f"{len(data)} bytes follow its last group")
    return groups


def _decode_group(data: memoryview, steps: Float32, width: float, pool: Executor) -> None:
    """Decode one group, whose checksum is right, into `steps` [S, C, N]."""
    parsed = _parse_steps(data, len(steps))
    values = [pool.submit(standalone.simple_decompress, step.values) for step in parsed]
    history: list[Float32] = []
    for target, step, future in zip(steps, parsed, values, strict=True):
        numbers: Any = future.result()
        if numbers.size != target.size:
            raise _damaged(f"a step has {numbers.size} values instead of {target.size}")
        if step.kind == _EXACT:
            target[:] = numbers.reshape(target.shape)
        else:
            prediction = _predict(history, step.weights)
            np.multiply(numbers.reshape(target.shape).astype(np.float32), np.float32(width), out=target)
            target += prediction
            target.reshape(-1)[step.places] = step.exact.view(np.float32)
        history = [*history, _finite(target)][-TAPS:]


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
        raise _damaged(f"a step cannot be read ({error})") from error
    return steps


def _header_checksum(header: Any, shape: bytes) -> int:
    return zlib.crc32(shape, zlib.crc32(repr(tuple(header)).encode()))


class _AtOnce(Executor):
    """Runs what is submitted where it is submitted."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        done: Future[T] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


def _pool(step: Float32) -> Executor:
    """A thread a core; none for small steps, whose operations are so short that threads only wait for each other."""
    return ThreadPoolExecutor(cores(), "codec") if step.size >= _PARALLEL_VALUES else _AtOnce()


def _damaged(what: str) -> StoreError:
    return StoreError(f"trajectory blob: damaged, {what}; read another copy")
