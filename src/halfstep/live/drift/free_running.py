"""Long walks of a model on its own frames: do they change in another way than in fp32?

Axes: W walks, N frames of a walk behind its start, L frames that are looked at, Q features, C channels, h w latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from halfstep.live.drift.course import Subject
from halfstep.live.drift.equivalence import ALPHA, Verdict, p_beyond, p_within
from halfstep.statistics import holm

FEATURES = ("mean", "spread", "saturation", "detail", "motion")
_STRETCH = 50  # frames at either end
_BETWEEN = 32  # frames apart, which are looked at for the plot alone
_OF_LEVEL, _OF_SPREAD = 0.05, 0.25

Float = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Looked:
    """The numbers of the frames that are decoded, the first `stretch` and the last ones among them."""

    numbers: tuple[int, ...]
    stretch: int

    @classmethod
    def of(cls, frames: int) -> Looked:
        stretch = min(_STRETCH, frames // 2)
        between = range(stretch + _BETWEEN, frames - stretch, _BETWEEN)
        return cls((*range(1, stretch + 1), *between, *range(frames - stretch + 1, frames + 1)), stretch)

    def ends(self, features: Float) -> tuple[Float, Float]:
        """Means [W, Q] over the first and over the last stretch of features [W, L, Q]."""
        return features[:, : self.stretch].mean(axis=1), features[:, -self.stretch :].mean(axis=1)

    def change(self, features: Float) -> Float:
        """From the first stretch to the last, [W, Q]."""
        first, last = self.ends(features)
        return last - first


@dataclass(frozen=True)
class FeatureTest:
    """The change of a feature from the first stretch to the last, minus that in fp32, mean over walks, and how far from
    zero it may be. p_within, p_beyond: that it is not within the margin, and that it is, corrected over the features
    (Holm): the small one tells."""

    feature: str
    change: float
    margin: float
    p_within: float
    p_beyond: float


def features(subject: Subject, path: torch.Tensor, numbers: Sequence[int]) -> Float:
    """[W, L, Q] of the frames `numbers` of walks [W, N + 1, C, h, w], of pixels from 0 to 1.

    mean and spread (standard deviation) of all values; saturation: the mean of the largest minus the smallest channel;
    detail: rms difference of neighboring pixels; motion: rms difference from the frame before.
    """
    found, held, before = [], -1, torch.empty(0)
    for number in numbers:
        earlier = before if held == number - 1 else _shown(subject, path[:, number - 1])
        before, held = _shown(subject, path[:, number]), number
        found.append(_features(before, earlier))
    return np.stack(found, axis=1)


def _shown(subject: Subject, latents: torch.Tensor) -> torch.Tensor:
    return ((subject.pixels(latents).float() + 1) / 2).clamp(0, 1)


def _features(now: torch.Tensor, before: torch.Tensor) -> Float:
    flat = now.flatten(1)
    across, down = now.diff(dim=-1).flatten(1), now.diff(dim=-2).flatten(1)
    values = [
        flat.mean(dim=1),
        flat.std(dim=1),
        (now.amax(dim=1) - now.amin(dim=1)).flatten(1).mean(dim=1),
        torch.cat([across, down], dim=1).square().mean(dim=1).sqrt(),
        (now - before).flatten(1).square().mean(dim=1).sqrt(),
    ]
    return np.asarray(torch.stack(values, dim=1).double().cpu().numpy())


def margins(exact: Float, looked: Looked) -> Float:
    """[Q]: how much another change than that of fp32, whose features [W, L, Q] are `exact`, is too much: 5% of the
    feature's level, or a quarter of its standard deviation between walks where that is more, both over the first and
    the last stretch."""
    first, last = looked.ends(exact)
    levels = (first + last) / 2
    return np.asarray(np.maximum(_OF_LEVEL * np.abs(levels.mean(axis=0)), _OF_SPREAD * levels.std(axis=0, ddof=1)))


def compare(variant: Float, exact: Float, looked: Looked) -> tuple[FeatureTest, ...]:
    """The features [W, L, Q] of a variant beside those of fp32, paired by walk."""
    allowed = margins(exact, looked)
    changes = looked.change(variant) - looked.change(exact)
    within = holm(np.array([p_within(one, margin) for one, margin in zip(changes.T, allowed, strict=True)]))
    beyond = holm(np.array([p_beyond(one, margin) for one, margin in zip(changes.T, allowed, strict=True)]))
    rows = zip(FEATURES, changes.mean(axis=0), allowed, within, beyond, strict=True)
    return tuple(FeatureTest(name, *map(float, values)) for name, *values in rows)


def judge(tests: Sequence[FeatureTest]) -> Verdict:
    """Inferior where a feature is shown to be beyond its margin, non-inferior where all are shown to be within."""
    if any(test.p_beyond < ALPHA for test in tests):
        return "inferior"
    return "non-inferior" if all(test.p_within < ALPHA for test in tests) else "inconclusive"


def frames_until_apart(path: torch.Tensor, exact: torch.Tensor) -> tuple[int | None, ...]:
    """For each walk [W, N + 1, C, h, w] the first frame that is farther from that of fp32 than fp32's frames are from
    the ones before them, root mean square in latents; None where that is none of them."""
    frames = path.shape[1]
    motion = exact.diff(dim=1)[:, 1:]  # the first is from a true frame, which may be another kind of picture
    limit = motion.double().square().flatten(1).mean(dim=1)
    distance = (path - exact[:, :frames]).double().square().flatten(2).mean(dim=2)
    apart = (~(distance <= limit[:, None])).cpu().numpy()  # what is not finite is apart
    return tuple(int(far.argmax()) if far.any() else None for far in apart)


def first_not_finite(path: torch.Tensor) -> int | None:
    """The first frame that is not finite in one of the walks."""
    broken = ~torch.isfinite(path).flatten(2).all(dim=2).all(dim=0)
    return int(broken.int().argmax()) if bool(broken.any()) else None
