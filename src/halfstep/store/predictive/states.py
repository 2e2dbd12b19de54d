"""One state as a record: weights of its prediction, and entropy-coded integers that lead from there to its values.

Channels in bins: the residual is rounded to whole bins; what bins cannot hold (values that are not finite, or huge next
to them) is kept beside them. Exact channels: the integers count floating-point numbers, from the prediction rounded to
the type to the value itself. A state of fp16 or bf16 numbers is exact in its own type, which is far smaller.

Axes: C channels, N values of a channel.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, standalone

from halfstep.store.predictive.noise import Noise
from halfstep.store.predictive.order import Place
from halfstep.store.predictive.prediction import (
    Block,
    Float32,
    Float64,
    Weights,
    best_weights,
    blocks,
    finite,
    predict,
    tap_weights,
)
from halfstep.store.predictive.promise import ErrorBudget

Integers = npt.NDArray[np.signedinteger[Any]]

# Number type, taps, flags, sets of weights, exceptions, bytes of the entropy-coded integers, widest bin.
_HEADER = struct.Struct("<BBHHIIf")
_FP32, _FP16, _BF16 = range(3)
_PER_CHANNEL = 1  # flag: widths of channels follow
_FROM_NOISE = 2  # flag: the noise that it is predicted from follows

_SLACK = 1 - 2**-10  # of a bin: float32 rounding must not push values over its edge
_LARGEST_BIN = 2**23  # bin numbers up to here are exact in float32
_NARROWEST = 2.0**-100  # products of narrower bins would be subnormal, and lose their digits
_WIDEST = 1e38
_MOST_EXCEPTIONS = 0.02  # of a channel; beyond, an exact channel is smaller
_AIM = 0.98  # of what a channel may be off, where it was too far off
_TRIALS = 4
_EXACT = 255  # instead of a channel's narrowing
_SIXTEENTHS = np.array([2.0 ** (-k / 16) for k in range(16)]).round(12)  # the same on every machine
_CONFIG = ChunkConfig(compression_level=8, mode_spec=ModeSpec.classic(), delta_spec=DeltaSpec.no_op())

_NO_PLACES = np.empty(0, np.uint32)


@dataclass(frozen=True)
class Coded:
    """A coded state. `narrowing` [C]: by how many sixteenths of an octave a channel's bins
    are narrower than the `widest`, 255 for an exact channel; None when all are as wide. `places` and `exact`: values
    beside the bins, and their bits. `noise`: what it is predicted from, instead of other states."""

    kind: int
    weights: Weights
    widest: float
    narrowing: npt.NDArray[np.uint8] | None
    places: npt.NDArray[np.uint32]
    exact: npt.NDArray[np.uint32]
    integers: Integers
    noise: Noise | None = None

    def to_bytes(self) -> bytes:
        """The record. The integers are entropy-coded here, which lets other threads run."""
        values = standalone.simple_compress(self.integers.reshape(-1), _CONFIG)
        sets, columns = self.weights.shape
        narrowing = b"" if self.narrowing is None else self.narrowing.tobytes()
        noise = b"" if self.noise is None else self.noise.to_bytes()
        flags = (_PER_CHANNEL if narrowing else 0) | (_FROM_NOISE if noise else 0)
        header = _HEADER.pack(self.kind, max(columns - 1, 0), flags, sets, len(self.places), len(values), self.widest)
        parts = [header, noise, self.weights.tobytes(), narrowing, self.places.tobytes(), self.exact.tobytes(), values]
        return b"".join(parts)

    @classmethod
    def from_bytes(cls, data: memoryview, channels: int) -> Coded:
        """What a record holds. Raises struct.error, ValueError or RuntimeError when it is none."""
        kind, taps, flags, sets, exceptions, size, widest = _HEADER.unpack_from(data)
        at, noise = _HEADER.size, None
        if flags & _FROM_NOISE:
            noise, at = Noise.from_bytes(data, at)
        columns = taps + 1 if sets else 0
        weights = np.frombuffer(data, "<f2", sets * columns, at).reshape(sets, columns)
        at += weights.nbytes
        narrowing = np.frombuffer(data, np.uint8, channels, at) if flags & _PER_CHANNEL else None
        at += 0 if narrowing is None else channels
        places = np.frombuffer(data, "<u4", exceptions, at)
        exact = np.frombuffer(data, "<u4", exceptions, at + places.nbytes)
        at += 2 * places.nbytes
        if len(data) - at != size or (sets and channels % sets):
            raise ValueError(f"{len(data) - at} bytes of integers instead of {size}")
        integers: Integers = standalone.simple_decompress(bytes(data[at:]))
        return cls(kind, weights, widest, narrowing, places, exact, integers, noise)

    def decode(self, history: Sequence[Float32], place: Place, out: Float32) -> None:
        """Write the state [C, N] into `out`. Raises ValueError when record and state do not belong together."""
        if self.integers.size != out.size or (self.weights.size and self.weights.shape[1] != len(history) + 1):
            raise ValueError(f"{self.integers.size} integers for {out.size} values")
        integers, number = self.integers.reshape(out.shape), _NUMBERS[self.kind]
        predict_block = _prediction(history, self.weights, place, out.shape)
        widths, is_exact = _widths(self.widest, self.narrowing, len(out))
        for block in blocks(out.shape):
            prediction, rows = predict_block(block), block[0]
            if self.kind != _FP32 or is_exact[rows].all():
                out[block] = number.values(number.count(prediction) + integers[block].astype(number.dtype))
                continue
            _out_of_bins(integers[block], prediction, widths[rows], out[block])
            if is_exact[rows].any():
                some = np.flatnonzero(is_exact[rows])
                counted = number.count(prediction[some]) + integers[block][some].astype(number.dtype)
                out[block][some] = number.values(counted)
        out.reshape(-1)[self.places] = self.exact.view(np.float32)


def encode_state(
    state: Float32,
    history: Sequence[Float32],
    place: Place,
    budget: ErrorBudget,
    number: int,
    noise: Noise | None = None,
) -> tuple[Coded, Float32]:
    """Code `state` [C, N], number `number` of the `budget`; also what it will be decoded to. `noise`: what the only
    state of `history` was drawn as."""
    kind = _born(state)
    widths = _wanted_widths(budget, number, len(state)) if kind == _FP32 else np.zeros(len(state))
    if not widths.any():
        budget.spend(widths)
        size = float(np.abs(finite(state)).mean(dtype=np.float64))
        steps = np.full(len(state), max(_NUMBERS[kind].spacing * size, _NARROWEST))
        weights = best_weights(state, history, place.basis, steps)
        integers = _differences(_NUMBERS[kind], state, _prediction(history, weights, place, state.shape))
        narrowing = np.full(len(state), _EXACT, np.uint8) if kind == _FP32 else None
        return Coded(
            kind, weights, 0.0, narrowing, _NO_PLACES, _NO_PLACES, _short(integers), noise if weights.size else None
        ), state
    weights = best_weights(state, history, place.basis, widths)
    bins = _Bins(state, _prediction(history, weights, place, state.shape), widths)
    bins.settle(partial(budget.allows, number))
    budget.spend(bins.squares)
    return replace(bins.coded(weights), noise=noise if weights.size else None), bins.decoded


class _Bins:
    """A state on its way into bins of the `wanted` widths [C]; a width of 0 makes a channel exact."""

    def __init__(self, state: Float32, prediction: Callable[[Block], Float32], wanted: Float64) -> None:
        self._state, self._prediction, self._wanted = state, prediction, wanted
        self._widest = float(np.nextafter(np.float32(wanted.max()), np.float32(0)))
        self._bins = np.empty_like(state)
        self._reach = 0.0  # the largest number of a bin
        self._exceptions: dict[int, list[npt.NDArray[np.intp]]] = {}  # places in a channel that bins cannot hold
        self.decoded = np.empty_like(state)
        self.squares = np.zeros(len(state))  # mean square error of each channel

    def settle(self, allows: Callable[[Float64], Float64]) -> None:
        """Fill the bins. `allows` says by how much channels must be narrowed [C] for mean square errors [C], 1 for not
        at all. When that does not help, or too much does not fit in its bins, a channel is exact."""
        rows = None
        for trial in range(_TRIALS):
            self._fill(rows)
            crowded = np.zeros(len(self._state), bool)
            for row, places in self._exceptions.items():
                crowded[row] = sum(map(len, places)) > _MOST_EXCEPTIONS * self._state.shape[1]
            narrower = allows(self.squares)
            again = (narrower < 1) & (self._wanted > 0)
            if not (again | crowded).any():
                return
            self._wanted[again] *= narrower[again] * _AIM if trial + 2 < _TRIALS else 0.0
            self._wanted[crowded] = 0.0
            rows = np.flatnonzero(again | crowded)

    def coded(self, weights: Weights) -> Coded:
        """What was settled, with the `weights` of the prediction."""
        narrowing = _narrowing(self._widest, self._wanted)
        integers: Integers = self._bins.astype(np.int16 if self._reach < 2**15 else np.int32)
        exact_rows = np.flatnonzero(self._wanted <= 0)
        if exact_rows.size:
            integers = integers.astype(np.int32)
            for block in blocks(self._state.shape, exact_rows):
                integers[block] = _NUMBERS[_FP32].count(self._state[block])
                integers[block] -= _NUMBERS[_FP32].count(self._prediction(block))
            integers = _short(integers)
        values = self._state.shape[1]
        found = [np.sort(np.concatenate(places)) + row * values for row, places in sorted(self._exceptions.items())]
        places = np.concatenate(found).astype(np.uint32) if found else _NO_PLACES
        exact = self._state.reshape(-1)[places].view(np.uint32)
        return Coded(_FP32, weights, self._widest, narrowing, places, exact, integers)

    def _fill(self, rows: npt.NDArray[np.intp] | None) -> None:
        """Put these channels, or all, into bins of the wanted widths."""
        narrowing = _narrowing(self._widest, self._wanted)
        widths, is_exact = _widths(self._widest, narrowing, len(self._state))
        self._wanted[is_exact] = 0.0  # narrower than can be told
        limits = widths * np.float32(0.5 / _SLACK * (1 - 2**-20))
        for row in range(len(self._state)) if rows is None else rows:
            self._exceptions.pop(row, None)
            self.squares[row] = 0.0
        inverse = 1 / widths
        for block in blocks(self._state.shape, rows):
            channels, values, bins, decoded = block[0], self._state[block], self._bins[block], self.decoded[block]
            prediction = self._prediction(block)
            np.subtract(values, prediction, out=bins)
            bins *= inverse[channels]
            np.rint(bins, out=bins)
            low, high = float(bins.min()), float(bins.max())
            if not -_LARGEST_BIN <= low <= high <= _LARGEST_BIN:  # NaN is not either
                bins[~(np.abs(bins) <= _LARGEST_BIN)] = 0  # these become exceptions
                low, high = float(bins.min()), float(bins.max())
            self._reach = max(self._reach, high, -low)
            _out_of_bins(bins, prediction, widths[channels], decoded)
            error = decoded - values
            self.squares[channels] += np.einsum("cn,cn->c", error, error) / self._state.shape[1]
            np.abs(error, out=error)
            if not (error.max(axis=1) <= limits[channels, 0]).all():  # NaN is not
                self._except(block, error, limits[channels])
        for row in self._exceptions:  # their errors were no errors
            error = finite(self.decoded[row] - self._state[row]).astype(np.float64)
            self.squares[row] = float((error**2).mean())
        for row in np.flatnonzero(self._wanted <= 0):
            self._bins[row], self.decoded[row], self.squares[row] = 0, self._state[row], 0.0
            self._exceptions.pop(int(row), None)

    def _except(self, block: Block, error: Float32, limits: Float32) -> None:
        """Note which values of a block their bins do not hold; they are kept exactly."""
        for number in np.flatnonzero(~(error.max(axis=1) <= limits[:, 0])):
            places = np.flatnonzero(~(error[number] <= limits[number]))
            self.decoded[block][number, places] = self._state[block][number, places]
            self._exceptions.setdefault(block[0].start + int(number), []).append(places + block[1].start)


@dataclass(frozen=True)
class _Number:
    """A type of floating-point numbers: how they are counted from the smallest to the largest."""

    dtype: type[np.signedinteger[Any]]
    spacing: float
    count: Callable[[Float32], Integers]
    values: Callable[[Integers], Float32]


def _fold(bits: Integers) -> Integers:
    """Sign and magnitude to one line of integers, and back."""
    last = 8 * bits.itemsize - 1
    folded: Integers = bits ^ ((bits >> last) & np.array(2**last - 1, bits.dtype))
    return folded


def _to_fp16(values: Float32) -> Integers:
    return values.astype(np.float16).view(np.int16)


def _to_bf16(values: Float32) -> Integers:
    bits = np.ascontiguousarray(values).view(np.uint32)
    half: Integers = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view(np.int16)
    return half


def _from_bf16(bits: Integers) -> Float32:
    return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


_NUMBERS = {
    _FP32: _Number(
        np.int32,
        2.0**-24,
        lambda values: _fold(np.ascontiguousarray(values).view(np.int32)),
        lambda counts: _fold(counts).view(np.float32),
    ),
    _FP16: _Number(
        np.int16,
        2.0**-11,
        lambda values: _fold(_to_fp16(values)),
        lambda counts: _fold(counts).view(np.float16).astype(np.float32),
    ),
    _BF16: _Number(
        np.int16,
        2.0**-8,
        lambda values: _fold(_to_bf16(values)),
        lambda counts: _from_bf16(_fold(counts)),
    ),
}


def _born(state: Float32) -> int:
    """The smallest type that holds every value of `state` bit for bit."""
    used = int(np.bitwise_or.reduce(state.view(np.uint32), axis=None))
    if not used & 0xFFFF:
        return _BF16
    if not used & 0x1FFF:
        back = state.astype(np.float16).astype(np.float32)
        if np.array_equal(back.view(np.uint32), state.view(np.uint32)):
            return _FP16
    return _FP32


def _differences(number: _Number, state: Float32, prediction: Callable[[Block], Float32]) -> Integers:
    """From the prediction to the state, in numbers of the type; around the ends of the integers where it must be."""
    differences = np.empty(state.shape, number.dtype)
    for block in blocks(state.shape):
        np.subtract(number.count(state[block]), number.count(prediction(block)), out=differences[block])
    return differences


def _prediction(
    history: Sequence[Float32], weights: Weights, place: Place, shape: tuple[int, ...]
) -> Callable[[Block], Float32]:
    """What gives the prediction of a block of a state of `shape`; zeros without weights."""
    if not weights.size:
        zeros = np.zeros(shape, np.float32)
        return lambda block: zeros[block]
    taps = tap_weights(weights, place.basis, shape[0])
    return lambda block: predict(history, taps, block)


def _wanted_widths(budget: ErrorBudget, number: int, channels: int) -> Float64:
    """The widths [C] of bins that serve the promise; 0 where only exactness does."""
    if budget.promise.max_error is not None:
        widths = np.full(channels, 2 * budget.promise.max_error * _SLACK)
    elif (errors := budget.errors(number)) is None:
        widths = np.zeros(channels)
    else:
        widths = np.sqrt(12) * errors  # errors are uniform within a bin
    widths = np.minimum(widths, _WIDEST)
    return np.where(widths >= _NARROWEST, widths, 0.0)


def _narrowing(widest: float, wanted: Float64) -> npt.NDArray[np.uint8] | None:
    """By how many sixteenths of an octave the bins of each channel are narrower than the widest; None when none are."""
    sixteenths = np.ceil(16 * np.log2(widest / wanted) - 1e-3)
    if not sixteenths.any():
        return None
    return np.minimum(np.maximum(sixteenths, 0), _EXACT).astype(np.uint8)


def _widths(
    widest: float, narrowing: npt.NDArray[np.uint8] | None, channels: int
) -> tuple[Float32, npt.NDArray[np.bool_]]:
    """The widths [C, 1] of bins, 1 for exact channels, and which those are [C]."""
    if narrowing is None:
        return np.full((channels, 1), widest, np.float32), np.zeros(channels, bool)
    is_exact = narrowing == _EXACT
    widths = np.ldexp(widest * _SIXTEENTHS[narrowing % 16], -(narrowing // 16).astype(np.int64))
    return np.where(is_exact, 1.0, widths).astype(np.float32)[:, None], is_exact


def _out_of_bins(bins: npt.NDArray[Any], prediction: Float32, widths: Float32, out: Float32) -> None:
    """The same float32 operations for encoding and decoding."""
    np.multiply(bins.astype(np.float32, copy=False), widths, out=out)
    out += prediction


def _short(integers: Integers) -> Integers:
    """In 16 bits where they fit."""
    low, high = int(integers.min()), int(integers.max())
    return integers.astype(np.int16) if -(2**15) <= low <= high < 2**15 else integers
