"""When groups of runs separate: the energy distance at each noise level, and its permutation test."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from halfstep.analyze.permutation import FEWEST, MOST_WORK, arrangements, is_exact
from halfstep.analyze.stats import ALPHA, RESAMPLES, too_few
from halfstep.store.run import Float64

_AT_ONCE = 1 << 22  # distances that are gathered at once

ALL = "all groups"


@dataclass(frozen=True)
class Separation:
    """How far two groups lie apart at one noise level; of more than two at once, `a` is "all groups" and `b` None.

    energy: the energy distance 2 E|X-Y| - E|X-X'| - E|Y-Y'| in the shared axes, latent (Szekely and Rizzo 2013,
    doi:10.1016/j.jspi.2013.03.018), of all groups its mean over the pairs. p_permutation: of the test of the distances
    within groups (Rizzo and Szekely 2010, doi:10.1214/09-AOAS245), p_corrected: over the noise levels and all pairs of
    groups; None when there are not enough runs. least: the smallest p that so many runs can give.
    """

    a: str
    b: str | None
    sigma: float
    energy: float
    p_permutation: float | None
    p_corrected: float | None
    least: float = 0.0


def energy_distance(distances: Float64, sizes: Sequence[int], *, paired: bool = False) -> float:
    """Mean energy distance of two groups, from the distances [n, n] between all points, group by group.

    Terms within a group leave out a point's distance to itself (the unbiased form, which may be below zero); of
    `paired` groups, the term between two leaves out those of one seed, which began as the same noise.
    """
    starts = np.cumsum([0, *sizes[:-1]])
    sums = np.add.reduceat(np.add.reduceat(distances, starts, axis=0), starts, axis=1)
    within = [sums[g, g] / max(size * (size - 1), 1) for g, size in enumerate(sizes)]
    found = []
    for a, b in itertools.combinations(range(len(sizes)), 2):
        between, count = sums[a, b], sizes[a] * sizes[b]
        if paired:
            same = slice(starts[a], starts[a] + sizes[a]), slice(starts[b], starts[b] + sizes[b])
            between, count = between - np.trace(distances[same]), count - sizes[a]
        found.append(2 * between / max(count, 1) - within[a] - within[b])
    return float(np.mean(found))


def energy_tests(
    distances: Float64, sizes: Sequence[int], *, paired: bool
) -> tuple[Float64, Float64 | None, Float64 | None]:
    """Energy distances at k levels from `distances` [k, n, n], and their p-values: of each level on its own, and
    corrected over the levels; None when there are not enough runs.

    Runs change places freely, or, when the groups share their seeds, within a seed. One-sided: only groups that lie
    apart speak for a difference. The correction takes the smallest standardized distance within groups over the levels
    in each arrangement (Westfall and Young 1993), because neighboring levels say nearly the same.
    """
    observed = np.array([energy_distance(level, sizes, paired=paired) for level in distances])
    if too_few(sizes, paired=paired) is not None:
        return observed, None, None
    stacked = np.ascontiguousarray(distances.transpose(1, 2, 0))  # the levels of two points side by side
    starts = np.cumsum([0, *sizes[:-1]])
    corners = [np.triu_indices(size, 1) for size in sizes]
    first, second = (
        np.concatenate([corner[side] + start for corner, start in zip(corners, starts, strict=True)]) for side in (0, 1)
    )
    weights = np.concatenate([np.full(len(corner[0]), 1 / size) for corner, size in zip(corners, sizes, strict=True)])
    work = len(first) * len(distances)
    resamples = max(FEWEST, min(RESAMPLES, MOST_WORK // max(work, 1)))
    within = np.concatenate(
        [
            np.einsum("p,mpk->mk", weights, stacked[places[:, first], places[:, second]])
            for places in arrangements(sizes, paired, resamples, max(1, _AT_ONCE // max(work, 1)))
        ]
    )
    given = np.einsum("p,pk->k", weights, stacked[first, second])
    spread = within.std(axis=0)
    scale = np.where(spread > 1e-9 * np.abs(within).max(axis=0), spread, np.inf)  # all alike: no evidence
    z, permuted_z = (given - within.mean(axis=0)) / scale, (within - within.mean(axis=0)) / scale
    drawn = not is_exact(sizes, paired, resamples)
    alone = ((permuted_z <= z + 1e-9).sum(axis=0) + drawn) / (len(within) + drawn)
    together = ((permuted_z.min(axis=1)[:, None] <= z + 1e-9).sum(axis=0) + drawn) / (len(within) + drawn)
    return observed, alone, together


def correct_over_pairs(pairs: Sequence[Sequence[Separation]]) -> list[Separation]:
    """The levels of all pairs of groups, their p_corrected times the number of pairs that were tested (Bonferroni);
    None where so few runs could not have come below 0.05 then."""
    factor = sum(1 for levels in pairs if any(level.p_corrected is not None for level in levels))
    return [_times(level, factor) for levels in pairs for level in levels]


def _times(level: Separation, factor: int) -> Separation:
    if level.p_corrected is None:
        return level
    hopeless = factor * level.least >= ALPHA
    return replace(level, p_corrected=None if hopeless else min(1.0, factor * level.p_corrected))


def separates_at(levels: Sequence[Separation]) -> float | None:
    """The noise level from which on, to the end of sampling, all levels are significant; None when the last is not.
    `levels` run from noise to data."""
    since = None
    for level in reversed(levels):
        if level.p_corrected is None or level.p_corrected >= ALPHA:
            break
        since = level.sigma
    return since
