"""The noise that a seed stands for, as PyTorch draws it on a CPU: sampling starts from it, and it need not be stored.

Every operation is one that IEEE 754 rounds alike everywhere, so that all machines make the same values. They come
within a few units in the last place of PyTorch's, which the codec corrects where its promise asks for it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from halfstep.store.predictive.prediction import Float32, Float64

_FORMAT = struct.Struct("<QIf")
_TOGETHER = 16  # values that PyTorch makes of as many uniform ones
_MOST_STATES = 1 << 12  # drawn before this one: all of them are drawn again
_AT_ONCE = 1 << 13  # values that stay in the cache
_ENOUGH = 1e-2  # of a state, that is left of it without its noise: then it is that noise
# Series whose rest is below 1e-10: the results are float32.
_LOG_TERMS = [1 / k for k in range(1, 14, 2)]
_SINE = [(-1) ** k / math.factorial(2 * k + 1) for k in range(6)]
_COSINE = [(-1) ** k / math.factorial(2 * k) for k in range(7)]
_HALF_PI = (float.fromhex("0x1.921fb544p+0"), float.fromhex("0x1.0b4611a626331p-34"))  # pi / 2 in two parts
_LOG_2 = float.fromhex("0x1.62e42fefa39efp-1")


@dataclass(frozen=True)
class Noise:
    """`scale` times what `torch.randn`, float32, gives a CPU generator of this `seed` after `index` states of the same
    size."""

    seed: int
    index: int = 0
    scale: float = 1.0

    @classmethod
    def of(cls, attributes: Mapping[str, Any]) -> Noise | None:
        """What the attributes of a run say of its first state: `noise_seed` or `seed`, and `noise_index`."""
        seed, index = attributes.get("noise_seed", attributes.get("seed")), attributes.get("noise_index", 0)
        if not (isinstance(seed, int) and isinstance(index, int) and 0 <= seed < 2**64 and 0 <= index < _MOST_STATES):
            return None
        return cls(seed, index)

    def fitted(self, state: Float32) -> Noise | None:
        """This noise with the scale that `state` has it in; None when the state is something else."""
        if state.size % _TOGETHER:
            return None
        flat, some = state.reshape(-1), slice(0, 4096)
        for part in (some, slice(None)):  # most of what is no such noise is known by its first values
            values = flat[part].astype(np.float64)
            noise = self._drawn(len(values), flat.size).astype(np.float64)
            # Sums and no products of BLAS, which would take threads.
            scale = np.float32((noise * values).sum() / np.square(noise).sum())
            if not np.square(values - scale * noise).sum() <= _ENOUGH**2 * np.square(values).sum() or scale == 0:
                return None
        return Noise(self.seed, self.index, float(scale))

    def state(self, shape: tuple[int, ...]) -> Float32:
        """float32 of `shape`, whose size is a multiple of 16."""
        return (self._drawn(math.prod(shape), math.prod(shape)) * np.float32(self.scale)).reshape(shape)

    def _drawn(self, count: int, size: int) -> Float32:
        """The first `count` values of a state of `size`."""
        generator = np.random.MT19937()
        generator._legacy_seeding(self.seed & 0xFFFFFFFF)  # as Matsumoto's reference code seeds it
        for _ in range(self.index):
            generator.random_raw(size, output=False)
        uniform = (generator.random_raw(count) & 0xFFFFFF).astype(np.float32) * np.float32(2.0**-24)
        values = np.empty(count, np.float32)
        for start in range(0, count, _AT_ONCE):
            part = slice(start, min(start + _AT_ONCE, count))
            first, second = np.moveaxis(uniform[part].reshape(-1, 2, _TOGETHER // 2), 1, 0)
            radius = np.sqrt(np.float32(-2) * _log(1 - first))
            cosine, sine = _turn(np.float32(2 * math.pi) * second)
            values[part] = np.stack([radius * cosine, radius * sine], axis=1).reshape(-1)
        return values

    def to_bytes(self) -> bytes:
        return _FORMAT.pack(self.seed, self.index, self.scale)

    @classmethod
    def from_bytes(cls, data: memoryview, at: int) -> tuple[Noise, int]:
        """The noise that is written at a place, and the place behind it. Raises struct.error when there is none."""
        return cls(*_FORMAT.unpack_from(data, at)), at + _FORMAT.size


def _log(x: Float32) -> Float32:
    """Of float32 above 0 and up to 1, by the series of the inverse hyperbolic tangent."""
    mantissa, exponent = np.frexp(x.astype(np.float64))
    small = mantissa < math.sqrt(0.5)
    mantissa, exponent = np.where(small, 2 * mantissa, mantissa), exponent - small
    s = (mantissa - 1) / (mantissa + 1)
    return np.asarray(2 * s * _polynomial(_LOG_TERMS, s * s) + exponent * _LOG_2, np.float32)


def _turn(angle: Float32) -> tuple[Float32, Float32]:
    """Cosine and sine of float32 from 0 to 2 pi."""
    wide = angle.astype(np.float64)
    quarter = np.rint(wide * (2 / math.pi))
    rest = (wide - quarter * _HALF_PI[0]) - quarter * _HALF_PI[1]
    square = rest * rest
    sine, cosine = rest * _polynomial(_SINE, square), _polynomial(_COSINE, square)
    turns = quarter.astype(np.int8) & 3
    odd = (turns & 1).astype(bool)
    signs = np.array([[1, -1, -1, 1], [1, 1, -1, -1]], np.float32)[:, turns]
    return (
        np.where(odd, sine, cosine).astype(np.float32) * signs[0],
        np.where(odd, cosine, sine).astype(np.float32) * signs[1],
    )


def _polynomial(coefficients: list[float], x: Float64) -> Float64:
    result = np.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result *= x
        result += coefficient
    return result
