"""Run: one recorded sampling run, whatever kept it. The steps are read when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


class Latents:
    """The latents of a run: `latents[k]` is the k-th stored step, float32 [C, (T,) H, W]; a slice is [n, C, (T,) H, W].

    Steps in a row cost one decoding of the group they lie in; only the few groups read last are held.
    """

    def __init__(self, count: int, step_shape: tuple[int, ...], read: Callable[[int], Float32]) -> None:
        self._count, self._read = count, read
        self.shape = (count, *step_shape)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Float32]:
        return (self._read(k) for k in range(self._count))

    @overload
    def __getitem__(self, place: int) -> Float32: ...
    @overload
    def __getitem__(self, place: slice) -> Float32: ...
    def __getitem__(self, place: int | slice) -> Float32:
        if isinstance(place, slice):
            steps = [self._read(k) for k in range(self._count)[place]]
            return np.stack(steps) if steps else np.empty((0, *self.shape[1:]), np.float32)
        return self._read(range(self._count)[place])


_MANTISSA = {"fp32": 23, "fp16": 10, "bf16": 7}  # bits
_SMALLEST = {"fp32": 0.0, "fp16": 2.0**-24, "bf16": 0.0}  # step between the numbers nearest to zero, where it matters


@dataclass(frozen=True)
class Rounding:
    """How far the stored values of a run may be off those that its sampler would have had without rounding:
    root-mean-square, `relative` to the power of two at or below each value, and `absolute`, latent."""

    relative: float
    absolute: float

    @classmethod
    def of(cls, casts: Mapping[str, float], bound: float = 0.0) -> Rounding:
        """Of values that were cast to these types, each error so many times that of casting (errors of evenly spread
        values are evenly spread: Bennett 1948, doi:10.1002/j.1538-7305.1948.tb01340.x), and are within `bound`."""
        relative = math.hypot(*(times * 2.0 ** -_MANTISSA[name] for name, times in casts.items()))
        absolute = math.hypot(*(times * _SMALLEST[name] for name, times in casts.items()), 2 * bound)
        return cls(relative / math.sqrt(12), absolute / math.sqrt(12))

    def rms(self, state: Float32) -> float:
        """Root-mean-square error of the values of a state, latent."""
        powers = (state.reshape(-1).view(np.uint32) & np.uint32(0x7F800000)).view(np.float32)
        return math.hypot(self.relative * math.sqrt(float(np.square(powers, dtype=np.float64).mean())), self.absolute)


FP32 = Rounding.of({"fp32": 1.0})


@dataclass(frozen=True)
class Run:
    """A sampling run.

    steps:      [n] the sampler's numbers of the stored steps.
    sigmas:     [n] the noise level of each stored state, in the sampler's own unit; NaN where it is not known.
    timesteps:  [n] the scheduler's timestep of that noise level.
    latents:    the states, read when asked for.
    attributes: everything else that was noted (guidance, model, policy, ...).
    problems:   lines for people: what is missing, damaged, stale or not finished.
    rounding:   how far the values of the states may be off.
    """

    key: str
    steps: npt.NDArray[np.int64]
    timesteps: Float64
    sigmas: Float64
    latents: Latents
    prompt: str | None
    seed: int | None
    attributes: dict[str, Any]
    problems: tuple[str, ...]
    rounding: Rounding = FP32

    def __len__(self) -> int:
        return len(self.steps)
