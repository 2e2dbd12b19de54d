"""Permutation tests of many quantities at once: each arrangement of the runs serves all of them.

Runs lie group by group; groups that share their seeds (paired) have the same number of runs, in the same order of
seeds. Axes: n runs, q quantities, k groups, m arrangements.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from halfstep.store.run import Float64

_SEED = 0  # the same data gives the same document
_AT_ONCE = 1 << 21  # values that are arranged at once
MOST_WORK = 1 << 32  # values that are arranged in all, where their number grows with the square of the runs'
FEWEST = 999  # arrangements, however much work they are

Places = npt.NDArray[np.intp]


def smallest_p(sizes: Sequence[int], *, paired: bool) -> float:
    """The smallest p-value that any data could give a test of groups of these sizes: the share of the arrangements
    that only call the groups by other names."""
    if paired:
        return min(1.0, math.exp((1 - sizes[0]) * math.lgamma(len(sizes) + 1)))
    names = sum(math.lgamma(count + 1) for count in Counter(sizes).values())
    all_of_them = math.lgamma(sum(sizes) + 1) - sum(math.lgamma(size + 1) for size in sizes)
    return min(1.0, math.exp(names - all_of_them))


def permutation_p(values: Float64, sizes: Sequence[int], *, paired: bool, resamples: int) -> Float64:
    """p-values [q] of `values` [n, q]: how often an arrangement of the runs tells the groups apart as well as theirs.

    Unpaired, runs change places freely and the statistic is Welch's F, which minds unequal spread (Welch 1951,
    doi:10.1093/biomet/38.3-4.330; Janssen 1997); paired, they change places within a seed, and it is the spread of the
    groups' means. Two groups with at most `resamples` arrangements are tried in all of them; else so many are drawn
    from a fixed seed, and the p-value counts the given one among them.
    """
    statistic = _spread_of_means if paired else welch_f
    centered = _scaled(values - values.mean(axis=0))
    observed = statistic(centered[None], sizes)[0]

    def arranged(places: Places) -> Float64:
        return statistic(centered[places], sizes)

    return _share_as_good(observed, arranged, sizes, paired, resamples, values.size)


def pair_p(values: Float64, sizes: Sequence[int], *, paired: bool, resamples: int) -> Float64:
    """p-values [pairs, q] of two groups each, of the more than two in `values` [n, q], by |t| (Welch's, or of pairs).

    What changes places, among all groups, is what is left of the values without the groups' means (ter Braak 1992,
    doi:10.1007/978-3-642-48850-4_10): two groups alone have few arrangements, and all pairs need small p-values.
    """
    scaled = _scaled(values - values.mean(axis=0))
    groups = np.repeat(np.arange(len(sizes)), sizes)
    means = np.array([scaled[groups == g].mean(axis=0) for g in range(len(sizes))])
    left = scaled - means[groups]
    if paired:
        left -= np.tile(left.reshape(len(sizes), sizes[0], -1).mean(axis=0), (len(sizes), 1))
    left *= np.sqrt(np.array(sizes) / (np.array(sizes) - 1))[groups][:, None]
    work = values.size * (len(sizes) if paired else 1)

    def arranged(places: Places) -> Float64:
        return _pair_t(left[places], sizes, paired)

    return _share_as_good(_pair_t(scaled[None], sizes, paired)[0], arranged, sizes, paired, resamples, work)


def spread_permutation_p(products: Float64, sizes: Sequence[int], *, paired: bool, resamples: int) -> float:
    """As permutation_p, of the distances of points to the center of their group, given the inner products [n, n] of the
    points.

    What changes places is the points, and each arrangement has centers of its own: distances to a center that was
    fitted to the same few points vary together, and tests that arrange the distances find too much.
    """
    statistic = _repeated_f if paired else welch_f

    def arranged(places: Places) -> Float64:
        distances = _to_centers(products, places, sizes)
        return statistic(distances - distances.mean(axis=1, keepdims=True), sizes)

    observed = arranged(np.arange(len(products))[None])[0]
    return float(_share_as_good(observed, arranged, sizes, paired, *_affordable(sizes, resamples))[0])


def spread_pair_p(products: Float64, sizes: Sequence[int], *, paired: bool, resamples: int) -> Float64:
    """As pair_p, of the same distances: [pairs]."""

    def arranged(places: Places) -> Float64:
        return _pair_t(_to_centers(products, places, sizes), sizes, paired)

    observed = arranged(np.arange(len(products))[None])[0]
    chances = _share_as_good(observed, arranged, sizes, paired, *_affordable(sizes, resamples))
    return np.asarray(chances[:, 0])


def _share_as_good(
    observed: Float64,
    arranged: Callable[[Places], Float64],
    sizes: Sequence[int],
    paired: bool,
    resamples: int,
    work: int,
) -> Float64:
    """The share of arrangements whose statistic is at least the `observed`, of that shape. `work`: values that one
    arrangement takes."""
    as_good, made = np.zeros(observed.shape), 0
    least = observed * (1 - 1e-9)  # rounding tells no arrangements apart
    for places in arrangements(sizes, paired, resamples, max(1, _AT_ONCE // work)):
        as_good += (arranged(places) >= least).sum(axis=0)
        made += len(places)
    drawn = not is_exact(sizes, paired, resamples)
    return np.asarray(np.maximum((as_good + drawn) / (made + drawn), smallest_p(sizes, paired=paired)))


def _affordable(sizes: Sequence[int], resamples: int) -> tuple[int, int]:
    """How many arrangements of points' distances are drawn, and the values that each takes."""
    work = sum(size**2 for size in sizes)
    return max(FEWEST, min(resamples, MOST_WORK // work)), work


def _scaled(values: Float64) -> Float64:
    """Columns whose largest part is one."""
    largest = np.abs(values).max(axis=0)
    return np.asarray(np.divide(values, largest, out=np.zeros_like(values), where=largest > 0))


def _pair_t(values: Float64, sizes: Sequence[int], paired: bool) -> Float64:
    """|t| of each two groups [m, pairs, q] of `values` [m, n, q]."""
    pairs = np.array(list(itertools.combinations(range(len(sizes)), 2)))
    if paired:
        by_group = values.reshape(len(values), len(sizes), sizes[0], -1)
        difference = by_group[:, pairs[:, 1]] - by_group[:, pairs[:, 0]]
        mean, error = difference.mean(axis=2), difference.var(axis=2, ddof=1) / sizes[0]
    else:
        means, variances = _moments(values, sizes)
        errors = variances / np.array(sizes)[:, None]
        mean, error = means[:, pairs[:, 1]] - means[:, pairs[:, 0]], errors[:, pairs[:, 1]] + errors[:, pairs[:, 0]]
    least = 1e-12 * np.square(values).mean(axis=1)[:, None] + 1e-300
    return np.asarray(np.abs(mean) / np.sqrt(np.maximum(error, least)))


def _moments(values: Float64, sizes: Sequence[int]) -> tuple[Float64, Float64]:
    """Means and variances [m, k, q] of the groups of `values` [m, n, q]."""
    counts = np.array(sizes, float)[:, None]
    starts = np.cumsum([0, *sizes[:-1]])
    means = np.add.reduceat(values, starts, axis=1) / counts
    squares = np.add.reduceat(np.square(values), starts, axis=1) - counts * np.square(means)
    return means, np.maximum(squares, 0.0) / (counts - 1)


def _repeated_f(values: Float64, sizes: Sequence[int]) -> Float64:
    """F of repeated measures [m, q] of `values` [m, n, q], but for its degrees of freedom."""
    by_group = values.reshape(len(values), len(sizes), sizes[0], -1)
    groups = by_group.mean(axis=2, keepdims=True) - by_group.mean(axis=(1, 2), keepdims=True)
    left = by_group - by_group.mean(axis=1, keepdims=True) - groups
    least = 1e-12 * np.square(values).sum(axis=1) + 1e-300
    between = sizes[0] * np.square(groups).sum(axis=(1, 2))
    return np.asarray(between / np.maximum(np.square(left).sum(axis=(1, 2)), least))


def _to_centers(products: Float64, places: Places, sizes: Sequence[int]) -> Float64:
    """Distances [m, n, 1] of the points at `places` [m, n] to the center of those in their group."""
    ends = np.cumsum(sizes)
    found = []
    for size, end in zip(sizes, ends, strict=True):
        there = places[:, end - size : end]
        within = products[there[:, :, None], there[:, None, :]]
        own = np.einsum("mii->mi", within)
        squares = own - 2 * within.mean(axis=2) + within.mean(axis=(1, 2))[:, None]
        found.append(np.sqrt(np.maximum(squares, 0.0)))
    return np.concatenate(found, axis=1)[:, :, None]


def welch_f(values: Float64, sizes: Sequence[int]) -> Float64:
    """Welch's F [m, q] of `values` [m, n, q]; of two groups, the square of Welch's t."""
    counts = np.array(sizes, float)[:, None]
    means, variances = _moments(values, sizes)
    # Groups without spread get one far below that of all, so that every arrangement has a finite F.
    least = 1e-12 * np.square(values).sum(axis=1, keepdims=True) + 1e-300
    weights = counts / np.maximum(variances, least)
    together = weights.sum(axis=1, keepdims=True)
    center = (weights * means).sum(axis=1, keepdims=True) / together
    between = (weights * np.square(means - center)).sum(axis=1) / (len(sizes) - 1)
    unequal = (np.square(1 - weights / together) / (counts - 1)).sum(axis=1)
    return np.asarray(between / (1 + 2 * (len(sizes) - 2) / (len(sizes) ** 2 - 1) * unequal))


def _spread_of_means(values: Float64, sizes: Sequence[int]) -> Float64:
    """Sum of squares [m, q] between the means of the groups. What is within seeds does not change, so that it orders
    arrangements as the F of repeated measures does."""
    means = values.reshape(len(values), len(sizes), sizes[0], -1).mean(axis=2)
    return np.asarray(np.square(means - means.mean(axis=1, keepdims=True)).sum(axis=1))


def is_exact(sizes: Sequence[int], paired: bool, resamples: int) -> bool:
    """Whether all arrangements are tried."""
    if len(sizes) > 2:
        return False
    return (2 ** sizes[0] if paired else math.comb(sum(sizes), sizes[0])) <= resamples


def arrangements(sizes: Sequence[int], paired: bool, resamples: int, rows: int) -> Iterator[Places]:
    """Which run stands in each place [up to `rows`, n], over and over."""
    few = is_exact(sizes, paired, resamples)
    total, first = sum(sizes), sizes[0]
    if few and not paired:
        chosen = itertools.combinations(range(total), first)
        while group := list(itertools.islice(chosen, rows)):
            in_first = np.zeros((len(group), total), bool)
            np.put_along_axis(in_first, np.array(group), True, axis=1)
            yield np.argsort(~in_first, axis=1, kind="stable")
        return
    rng = np.random.default_rng(_SEED)
    count = 2**first if few else resamples
    for start in range(0, count, rows):
        made = min(rows, count - start)
        if few:
            swapped = (np.arange(start, start + made)[:, None] >> np.arange(first)) & 1
            yield _within_seeds(np.stack([swapped, 1 - swapped], axis=1))
        elif paired:
            groups = np.broadcast_to(np.arange(len(sizes))[None, :, None], (made, len(sizes), first))
            yield _within_seeds(rng.permuted(groups, axis=1))
        else:
            yield rng.permuted(np.tile(np.arange(total), (made, 1)), axis=1)


def _within_seeds(groups: npt.NDArray[np.int_]) -> Places:
    """Places [m, n] from the group [m, k, seeds] whose run of a seed stands there."""
    seeds = groups.shape[2]
    return np.asarray(groups * seeds + np.arange(seeds), np.intp).reshape(len(groups), -1)
