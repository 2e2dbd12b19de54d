"""Whether groups of runs differ: tests whose answers a reviewer can follow, and "not enough runs" where there is none.

Every p-value comes with its correction (Holm 1979; Benjamini and Hochberg 1995), every difference with its size and an
interval. Two groups: one test a quantity, corrected over all of them. More groups: first one test of all groups a
quantity; where that finds a difference, the pairs, corrected over the pairs and for the choice of these quantities
(Benjamini and Bogomolov 2014, doi:10.1111/rssb.12028).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from scipy import stats

from halfstep.analyze.permutation import (
    pair_p,
    permutation_p,
    smallest_p,
    spread_pair_p,
    spread_permutation_p,
)
from halfstep.statistics import holm
from halfstep.store.run import Float64

ALPHA = 0.05
RESAMPLES = 9999
CONFIDENCE = 0.95
SEED = 0  # the same data gives the same document
_BOOTSTRAPS = 9999

Correction = Callable[[Float64], Float64]


@dataclass(frozen=True)
class Columns:
    """Quantities of the runs of some groups that are compared. values: [n, q], group by group, finite, in the order of
    `names`; paired: the groups have the same seeds in the same order. resolutions: [q] how much a difference of two
    means may owe to the rounding of what was stored. products: by name of a quantity that is a distance to the group's
    center, the inner products [n, n] of the points."""

    names: tuple[str, ...]
    values: Float64
    sizes: tuple[int, ...]
    paired: bool
    resolutions: Float64
    products: Mapping[str, Float64] = field(default_factory=dict)

    def permutation_p(self, resamples: int) -> Float64:
        """p-values [q] of the permutation tests of all groups."""
        chances = permutation_p(self.values, self.sizes, paired=self.paired, resamples=resamples)
        for k, products in self._spreads():
            chances[k] = spread_permutation_p(products, self.sizes, paired=self.paired, resamples=resamples)
        return chances

    def pair_p(self, resamples: int) -> Float64:
        """p-values [pairs, q] of the permutation tests of two groups each, of more."""
        chances = pair_p(self.values, self.sizes, paired=self.paired, resamples=resamples)
        for k, products in self._spreads():
            chances[:, k] = spread_pair_p(products, self.sizes, paired=self.paired, resamples=resamples)
        return chances

    def _spreads(self) -> list[tuple[int, Float64]]:
        return [(k, self.products[name]) for k, name in enumerate(self.names) if name in self.products]


@dataclass(frozen=True)
class GroupTest:
    """One comparison of two groups.

    n: runs in each. paired: by seed. p_permutation: two-sided, of Welch's t (Janssen 1997; paired: of the mean
    difference), exact where all arrangements can be listed, beside other groups as in `permutation.pair_p`; p_welch: of
    the t distribution (paired: the paired t); None when there are not enough runs. p_holm, p_bh: the larger of the two,
    corrected. least: the smallest p that so many runs can give. not_enough: why no verdict can be had. difference: mean
    of `b` minus mean of `a`; resolution: what of it the rounding of what was stored could have made alone. hedges_g:
    the difference in pooled standard deviations, corrected for small samples (Hedges 1981), with its bootstrap
    interval.
    """

    metric: str
    a: str
    b: str
    n_a: int
    n_b: int
    paired: bool
    mean_a: float | None
    mean_b: float | None
    difference: float | None
    hedges_g: float | None = None
    interval: tuple[float, float] | None = None
    p_welch: float | None = None
    p_permutation: float | None = None
    p_holm: float | None = None
    p_bh: float | None = None
    not_enough: str | None = None
    resolution: float = 0.0
    least: float = 0.0

    @property
    def p(self) -> float | None:
        """The p-value that counts: the larger of the permutation test's, which needs no distribution, and Welch's,
        which minds that groups of unequal size have unequal spread."""
        return _larger(self.p_permutation, self.p_welch)

    @property
    def verdict(self) -> str:
        """different, no difference shown, not resolved, or not enough runs."""
        return _verdict(self, self.difference)


@dataclass(frozen=True)
class OmnibusTest:
    """One comparison of all groups, of which there are more than two.

    sizes: runs in each group. paired: by seed, which all groups share. explained: share of the variance of the runs
    (paired: within seeds) that lies between the groups, eta squared. largest_difference: between the means of two
    groups. p_permutation: of Welch's F, paired of the spread of the means; p_welch: of the F distribution, None when
    paired. p_holm, p_bh: the larger of the two, corrected over the quantities.
    """

    metric: str
    sizes: tuple[int, ...]
    paired: bool
    explained: float | None = None
    largest_difference: float | None = None
    p_welch: float | None = None
    p_permutation: float | None = None
    p_holm: float | None = None
    p_bh: float | None = None
    not_enough: str | None = None
    resolution: float = 0.0

    @property
    def p(self) -> float | None:
        """The p-value that counts, as of GroupTest."""
        return _larger(self.p_permutation, self.p_welch)

    @property
    def least(self) -> float:
        """The smallest p-value that so many runs can give."""
        return smallest_p(self.sizes, paired=self.paired)

    @property
    def verdict(self) -> str:
        """different, no difference shown, not resolved, or not enough runs."""
        return _verdict(self, self.largest_difference)


Test = TypeVar("Test", GroupTest, OmnibusTest)


def _larger(permutation: float | None, welch: float | None) -> float | None:
    return None if permutation is None else max(permutation, welch or 0.0)


def _verdict(test: GroupTest | OmnibusTest, difference: float | None) -> str:
    if difference is None or test.not_enough is not None or test.p_holm is None:
        return "not enough runs"
    if 0 < abs(difference) <= test.resolution:
        return "not resolved"
    return "different" if test.p_holm < ALPHA else "no difference shown"


def too_few(sizes: Sequence[int], *, paired: bool) -> str | None:
    """Why a test is not worth making, or None."""
    p = smallest_p(sizes, paired=paired)
    if min(sizes) >= 2 and p < ALPHA:
        return None
    if min(sizes) == 0:
        return "not enough runs: it has no value in the runs of a group"
    need = "6 pairs" if paired else "4 runs a group"
    if len(sizes) > 2:
        need = "2 runs a group"
        got = f"groups of {min(sizes)} to {max(sizes)} runs" if min(sizes) < max(sizes) else f"groups of {sizes[0]} run"
    else:
        got = f"{sizes[0]} pairs" if paired else f"{sizes[0]} and {sizes[1]} runs"
    return f"not enough runs: got {got}, the smallest p possible is {p:.2g}; {need} are enough"


def compare_two(a: str, b: str, columns: Columns, *, resamples: int = RESAMPLES) -> list[GroupTest]:
    """Compare each of `columns` in groups `a` and `b`. `resamples` permutations are drawn when there are more than can
    be listed."""
    reason = too_few(columns.sizes, paired=columns.paired)
    tests = _described(a, b, columns, reason)
    if reason is not None:
        return tests
    least = smallest_p(columns.sizes, paired=columns.paired)
    chances = columns.permutation_p(resamples)
    return [
        replace(test, p_permutation=float(chance), least=least) for test, chance in zip(tests, chances, strict=True)
    ]


def compare_pairs(groups: Sequence[str], columns: Columns, *, resamples: int = RESAMPLES) -> list[GroupTest]:
    """Compare each of `columns` in each two of the `groups`, of which there are more than two."""
    chances = columns.pair_p(resamples)
    parts = np.split(columns.values, np.cumsum(columns.sizes)[:-1])
    least = smallest_p(columns.sizes, paired=columns.paired)
    tests = []
    for pair, (i, j) in enumerate(itertools.combinations(range(len(groups)), 2)):
        sizes = columns.sizes[i], columns.sizes[j]
        two = replace(columns, values=np.concatenate([parts[i], parts[j]]), sizes=sizes)
        tests += [
            replace(test, p_permutation=float(chance), least=least)
            for test, chance in zip(_described(groups[i], groups[j], two, None), chances[pair], strict=True)
        ]
    return tests


def _described(a: str, b: str, columns: Columns, reason: str | None) -> list[GroupTest]:
    """The tests of two groups but for their permutations: means, and without a `reason` not to test them effects."""
    n_a, n_b = columns.sizes
    x, y = columns.values[:n_a], columns.values[n_a:]
    tests = []
    for name, resolution, of_a, of_b in zip(columns.names, columns.resolutions, x.T, y.T, strict=True):
        mean_a, mean_b = (float(column.mean()) if len(column) else None for column in (of_a, of_b))
        difference = None if mean_a is None or mean_b is None else mean_b - mean_a
        tests.append(
            GroupTest(
                name, a, b, n_a, n_b, columns.paired, mean_a, mean_b, difference,
                not_enough=reason, resolution=float(resolution),
            )
        )  # fmt: skip
    if reason is not None:
        return tests
    effects = _hedges_g(x[None], y[None], paired=columns.paired)[0]
    intervals = _bootstrap_intervals(x, y, paired=columns.paired)
    return [
        replace(
            test,
            hedges_g=float(effects[k]) if math.isfinite(effects[k]) else None,
            interval=intervals[k] if math.isfinite(effects[k]) else None,
            p_welch=_welch(x[:, k], y[:, k], paired=columns.paired),
        )
        for k, test in enumerate(tests)
    ]


def _welch(x: Float64, y: Float64, *, paired: bool) -> float | None:
    """p of the t distribution; None without more spread than rounding has, which it divides by."""
    least = 1e-9 * max(float(np.abs(x).max()), float(np.abs(y).max()))
    if np.ptp(y - x) <= least if paired else max(np.ptp(x), np.ptp(y)) <= least:
        return None
    return float((stats.ttest_rel(x, y) if paired else stats.ttest_ind(x, y, equal_var=False)).pvalue)


def compare_all(columns: Columns, *, resamples: int = RESAMPLES) -> list[OmnibusTest]:
    """Compare each of `columns` over all groups, of which there are more than two."""
    paired, sizes = columns.paired, columns.sizes
    reason = too_few(sizes, paired=paired)
    tests = [
        OmnibusTest(name, sizes, paired, not_enough=reason, resolution=float(resolution))
        for name, resolution in zip(columns.names, columns.resolutions, strict=True)
    ]
    if reason is not None:
        return tests
    chances = columns.permutation_p(resamples)
    groups = np.split(columns.values, np.cumsum(sizes)[:-1])
    means = np.array([group.mean(axis=0) for group in groups])  # [k, q]
    values = columns.values
    if paired:
        by_seed = values.reshape(len(sizes), sizes[0], -1)
        values = (by_seed - by_seed.mean(axis=0)).reshape(values.shape)
    total = np.square(values - values.mean(axis=0)).sum(axis=0)
    between = np.square(means - columns.values.mean(axis=0)).T @ np.array(sizes, float)
    tested = []
    for k, test in enumerate(tests):
        least = 1e-9 * float(np.abs(columns.values[:, k]).max())
        spread = [bool(np.ptp(group[:, k]) > least) for group in groups]
        of_f = None
        if not paired and all(spread):
            of_f = float(stats.f_oneway(*(group[:, k] for group in groups), equal_var=False).pvalue)
        tested.append(
            replace(
                test,
                explained=float(between[k] / total[k]) if total[k] > 0 else None,
                largest_difference=float(np.ptp(means[:, k])),
                p_welch=of_f,
                p_permutation=float(chances[k]),
            )
        )
    return tested


def resamples_for(tests: float) -> int:
    """Permutations that leave room for a verdict after correction over so many tests: the smallest p-value they can
    give, 1 / (n + 1), is a quarter of what the strictest step of Holm asks for."""
    return max(RESAMPLES, math.ceil(4 * tests / ALPHA))


def _hedges_g(x: Float64, y: Float64, *, paired: bool) -> Float64:
    """(mean y - mean x) / s, times 1 - 3 / (4 df - 1), with s the pooled standard deviation (paired: of the
    differences, g_z): [m, q] of x [m, n_a, q] and y [m, n_b, q]; NaN where the spread is zero but for rounding."""
    n_a, n_b = x.shape[1], y.shape[1]
    if paired:
        spread, degrees = np.std(y - x, axis=1, ddof=1), n_a - 1
    else:
        degrees = n_a + n_b - 2
        spread = np.sqrt(((n_a - 1) * np.var(x, axis=1, ddof=1) + (n_b - 1) * np.var(y, axis=1, ddof=1)) / degrees)
    mean_x, mean_y = x.mean(axis=1), y.mean(axis=1)
    spread = np.where(spread > 1e-12 * (np.abs(mean_x) + np.abs(mean_y)), spread, np.nan)
    return np.asarray((mean_y - mean_x) / spread * (1 - 3 / (4 * degrees - 1)))


def _bootstrap_intervals(x: Float64, y: Float64, *, paired: bool) -> list[tuple[float, float] | None]:
    """Percentile bootstrap of Hedges' g of each column (Efron and Tibshirani 1993, ch. 13), groups resampled on their
    own, pairs together. Resamples without spread (one run many times) do not count; None when those are most."""
    rng = np.random.default_rng(SEED)
    drawn = []
    rows = max(1, (1 << 21) // (x.size + y.size))
    for start in range(0, _BOOTSTRAPS, rows):
        made = min(rows, _BOOTSTRAPS - start)
        i = rng.integers(len(x), size=(made, len(x)))
        j = i if paired else rng.integers(len(y), size=(made, len(y)))
        drawn.append(_hedges_g(x[i], y[j], paired=paired))
    values = np.concatenate(drawn)
    tail = 50 * (1 - CONFIDENCE)
    intervals: list[tuple[float, float] | None] = []
    for column in values.T:
        usable = column[np.isfinite(column)]
        if len(usable) < _BOOTSTRAPS / 2:
            intervals.append(None)
            continue
        low, high = np.percentile(usable, [tail, 100 - tail])
        intervals.append((float(low), float(high)))
    return intervals


def correct(tests: Sequence[Test], *, factor: float = 1.0, at_least: float = 0.0) -> list[Test]:
    """The tests with p_holm and p_bh over all of them that have a p-value, times `factor` and not below `at_least`. A
    test that could not have come below 0.05 with so few runs, whatever they had shown, says so."""
    tested = [i for i, test in enumerate(tests) if test.p is not None]
    p = np.array([tests[i].p for i in tested], float)

    def adjusted(correction: Correction, chances: Float64) -> Float64:
        return np.clip(factor * correction(chances), at_least, 1.0)

    corrected = list(tests)
    for place, i in enumerate(tested):
        strict, lenient = adjusted(holm, p)[place], adjusted(benjamini_hochberg, p)[place]
        test = tests[i]
        reason = None
        if strict >= ALPHA:
            best = p.copy()
            best[place] = test.least
            least = adjusted(holm, best)[place]
            if least >= ALPHA:
                reason = f"not enough runs for {len(tested)} tests: the smallest corrected p possible is {least:.2g}"
        corrected[i] = replace(test, p_holm=float(strict), p_bh=float(lenient), not_enough=reason)
    return corrected


def correct_within(pairs: Mapping[str, Sequence[GroupTest]], omnibus: Sequence[OmnibusTest]) -> list[GroupTest]:
    """Pairs of groups of the quantities whose corrected test of all groups, among `omnibus`, finds a difference:
    corrected over the pairs of a quantity, times the number of all quantities over that of these."""
    tested = sum(test.p is not None for test in omnibus)
    of_all = {test.metric: test.p_holm or 0.0 for test in omnibus}
    factor = tested / max(1, len(pairs))
    return [test for name, tests in pairs.items() for test in correct(tests, factor=factor, at_least=of_all[name])]


def benjamini_hochberg(p: Float64) -> Float64:
    """Benjamini and Hochberg's correction (1995): controls the share of false findings."""
    return np.asarray(stats.false_discovery_control(p), float) if len(p) else p


def dispersion(points: Float64) -> tuple[float, tuple[float, float] | None]:
    """Root-mean-square distance of points [n, p] to their center, latent, unbiased (n - 1), and its jackknife interval
    (Efron and Tibshirani 1993, ch. 11); None with fewer than four points."""
    return dispersion_of(points @ points.T)


def dispersion_of(products: Float64) -> tuple[float, tuple[float, float] | None]:
    """As `dispersion`, of points whose inner products [n, n] are given."""
    n = len(products)
    if n < 2:
        return float("nan"), None
    squares = _squares_to_center(products)
    value = math.sqrt(float(squares.sum()) / (n - 1))
    if n < 4:
        return value, None
    # Leaving out a point takes n / (n - 1) times its square off the sum of squares.
    left_out = np.sqrt(np.maximum(squares.sum() - squares * n / (n - 1), 0.0) / (n - 2))
    error = math.sqrt((n - 1) / n * float(np.square(left_out - left_out.mean()).sum()))
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * error
    return value, (max(0.0, value - half), value + half)


def distances_to_center(products: Float64) -> Float64:
    """Distance of each of n points, whose inner products [n, n] are given, to their center, times sqrt(n / (n - 1))
    because the center leans to each of them: what a test of equal dispersion compares (Anderson 2006,
    doi:10.1111/j.1541-0420.2005.00440.x). NaN for one point."""
    n = len(products)
    if n < 2:
        return np.full(n, np.nan)
    return np.asarray(np.sqrt(_squares_to_center(products) * n / (n - 1)))


def _squares_to_center(products: Float64) -> Float64:
    return np.asarray(np.maximum(np.diag(products) - 2 * products.mean(axis=1) + products.mean(), 0.0))
