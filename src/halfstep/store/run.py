"""Run: one recorded sampling run, whatever kept it. The steps are read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


@dataclass(frozen=True)
class Run:
    """A sampling run.

    steps:      [n] the sampler's numbers of the stored steps.
    sigmas:     [n] the noise level of each stored state, in the sampler's own unit; NaN where it is not known.
    timesteps:  [n] the scheduler's timestep of that noise level.
    latents:    the states, read when asked for.
    attributes: everything else that was noted (guidance, model, policy, ...).
    problems:   lines for people: what is missing, damaged, stale or not finished.
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

    def __len__(self) -> int:
        return len(self.steps)
