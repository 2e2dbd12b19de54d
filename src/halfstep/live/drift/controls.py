"""What each test must reject: a test that lets these pass says nothing about a precision.

Axes: W walks, L frames that are looked at, Q features.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from halfstep.live.drift.course import Course
from halfstep.live.drift.free_running import FEATURES, Float, Looked, features
from halfstep.live.frames import Network
from halfstep.precision import Target, simulate
from halfstep.precision.arithmetic import Rounded, moves_values

GAINS = (1.003, 1.01, 1.03, 1.1, 1.3)
_BITS = 3  # behind the leading one, as in the fp8 type e4m3
_TUNED_ON = 2  # walks, which is the fewest there are
_EVERY = 5  # frames


@contextmanager
def fp8_like(network: nn.Module) -> Iterator[Network]:
    """The network with the rounding noise of fp8: as in bf16, but the result of every operation keeps three bits."""
    with simulate(copy.deepcopy(network), "bf16-true", Target("bf16"), observer=_FewBits()) as run:
        yield run


class _FewBits:
    """Rounds what operations give. See `halfstep.precision.arithmetic.Observer`."""

    mixed = None

    def __call__(self, func: Any, given: Sequence[Any], results: Sequence[Rounded]) -> Sequence[torch.Tensor]:
        if moves_values(func):
            return [result.held for result in results]
        return [rounded(result.held, _BITS) for result in results]


def rounded(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Values, fp32, with so many binary digits behind the leading one; to the nearest, and to the even one of two."""
    dropped = 23 - bits
    held = values.contiguous().view(torch.int32)
    kept = held + (1 << (dropped - 1)) - 1 + ((held >> dropped) & 1)
    return (kept & -(1 << dropped)).view(torch.float32)


def frozen(exact: Float, looked: Looked) -> Float:
    """The features [W, L, Q] of walks as in fp32 that stand still in the last stretch."""
    still = exact.copy()
    start = still.shape[1] - looked.stretch
    still[:, start:] = still[:, start : start + 1]
    still[:, start:, FEATURES.index("motion")] = 0
    return still


def gains_to_try(course: Course, exact: Network, path: torch.Tensor, allowed: Float, frames: int) -> tuple[float, ...]:
    """GAINS on every frame, from the smallest on by which fp32 changes a feature by more than is `allowed` [Q] in
    `frames` frames of two walks; the largest where none does. Of the frames that the test looks at, every fifth is.
    `path` [W, N + 1, C, h, w]: the walks of fp32."""
    walks = list(range(_TUNED_ON))
    rows, gains = walks * len(GAINS), np.repeat(GAINS, len(walks))
    moved = course.walk(exact, frames, walks=rows, gain=torch.tensor(gains, dtype=path.dtype, device=path.device))
    stretch = Looked.of(frames).stretch
    numbers = [*range(1, stretch + 1, _EVERY), *range(frames - stretch + 1, frames + 1, _EVERY)]
    looked = Looked(tuple(numbers), len(numbers) // 2)
    there, before = (looked.change(features(course.subject, one, numbers)) for one in (moved, path[walks]))
    changes = there.reshape(len(GAINS), len(walks), -1) - before
    past = ~(np.abs(changes.mean(axis=1)) <= allowed).all(axis=1)  # what is not finite is
    return GAINS[int(past.argmax()) if past.any() else -1 :]


def perturbed(start: torch.Tensor) -> dict[str, torch.Tensor]:
    """Contexts [W, K, C, h, w], fp32, that differ by almost nothing: by one unit in the last place, up or down, and by
    noise of 1e-6, twice."""
    infinite = torch.full_like(start, float("inf"))
    noise = torch.randn(2, *start.shape, generator=torch.Generator().manual_seed(0)).to(start.device) * 1e-6
    return {
        "one ulp up": torch.nextafter(start, infinite),
        "one ulp down": torch.nextafter(start, -infinite),
        "noise of 1e-6": start + noise[0],
        "other noise of 1e-6": start + noise[1],
    }
