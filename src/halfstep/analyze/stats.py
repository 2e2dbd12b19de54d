"""Whether groups of runs differ: tests whose answers a reviewer can follow, and "not enough runs" where there is none.

Every p-value comes with its correction over all tests of the analysis (Holm 1979; Benjamini and Hochberg 1995), every
difference with its size and an interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import stats

from halfstep.store.run import Float64

ALPHA = 0.05
RESAMPLES = 9999
CONFIDENCE = 0.95
_BOOTSTRAPS = 9999
_SEED = 0  # the same data gives the same document

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class GroupTest:
    """One comparison of two groups.

    n: runs in each. paired: by seed. p_permutation: two-sided, of Welch's t (Janssen 1997; paired: of the mean
    difference), exact where all arrangements can be listed; p_welch: of the t distribution (paired: the paired t); None
    when there are not enough runs. p_holm, p_bh: the larger of the two corrected over all tests of the analysis.
    not_enough: why no verdict can be had. difference: mean of `b` minus mean of `a`; hedges_g: that in pooled standard
    deviations, corrected for small samples (Hedges 1981), with its bootstrap interval.
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

    @property
    def p(self) -> float | None:
        """The p-value that counts: the larger of the permutation test's, which needs no distribution, and Welch's,
        which minds that groups of unequal size have unequal spread."""
        if self.p_permutation is None:
            return None
        return max(self.p_permutation, self.p_welch or 0.0)

    @property
    def verdict(self) -> str:
        """different, no difference shown, or not enough runs."""
        if self.not_enough is not None or self.p_holm is None:
            return "not enough runs"
        return "different" if self.p_holm < ALPHA else "no difference shown"


def smallest_p(n_a: int, n_b: int, *, paired: bool) -> float:
    """The smallest two-sided p-value that any data could give a permutation test of this size."""
    return min(1.0, 2 / 2**n_a) if paired else min(1.0, 2 / math.comb(n_a + n_b, n_a))


def too_few(n_a: int, n_b: int, *, paired: bool) -> str | None:
    """Why a test is not worth making, or None."""
    p = smallest_p(n_a, n_b, paired=paired)
    if min(n_a, n_b) >= 2 and p < ALPHA:
        return None
    need = "6 pairs" if paired else "4 runs a group"
    got = f"{n_a} pairs" if paired else f"{n_a} and {n_b} runs"
    return f"not enough runs: got {got}, the smallest p possible is {p:.2g}; {need} are the least"


def compare(
    metric: str,
    a: str,
    b: str,
    values_a: Sequence[float],
    values_b: Sequence[float],
    *,
    paired: bool,
    resamples: int = RESAMPLES,
) -> GroupTest:
    """Compare a metric of two groups; `paired` values stand in the order of their shared seeds. Values that are not
    finite are to be left out before. `resamples` permutations are drawn when there are more than can be listed."""
    x, y = np.asarray(values_a, float), np.asarray(values_b, float)
    test = GroupTest(
        metric,
        a,
        b,
        len(x),
        len(y),
        paired,
        float(x.mean()) if len(x) else None,
        float(y.mean()) if len(y) else None,
        float(y.mean() - x.mean()) if len(x) and len(y) else None,
    )
    reason = too_few(len(x), len(y), paired=paired)
    if reason is not None:
        return replace(test, not_enough=reason)
    # Around zero, so that rounding does not tell arrangements apart that are the same.
    center = (x.mean() + y.mean()) / 2
    result = stats.permutation_test(
        (y - x,) if paired else (x - center, y - center),
        np.mean if paired else _welch_t,
        permutation_type="samples" if paired else "independent",
        vectorized=True,
        n_resamples=resamples,
        rng=np.random.default_rng(_SEED),
    )
    constant = np.ptp(y - x) == 0 if paired else np.ptp(x) == 0 and np.ptp(y) == 0
    welch = None
    if not constant:  # else its variance is zero
        welch = float((stats.ttest_rel(x, y) if paired else stats.ttest_ind(x, y, equal_var=False)).pvalue)
    g = hedges_g(x, y, paired=paired)
    return replace(
        test,
        hedges_g=g,
        interval=None if g is None else _bootstrap_interval(x, y, paired=paired),
        p_welch=welch,
        p_permutation=max(float(result.pvalue), smallest_p(len(x), len(y), paired=paired)),
    )


def resamples_for(tests: int) -> int:
    """Permutations that leave room for a verdict after correction over so many tests: the smallest p-value they can
    give, 2 / (n + 1), is half of what the strictest step of Holm asks for."""
    return max(RESAMPLES, math.ceil(4 * tests / ALPHA))


def _welch_t(x: Float64, y: Float64, axis: int) -> Float64:
    """Welch's t; of groups without spread, infinite where their means differ."""
    difference = y.mean(axis=axis) - x.mean(axis=axis)
    error = np.sqrt(x.var(axis=axis, ddof=1) / x.shape[axis] + y.var(axis=axis, ddof=1) / y.shape[axis])
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(difference == 0, 0.0, difference / error)
    return np.asarray(t)


def hedges_g(x: Float64, y: Float64, *, paired: bool = False) -> float | None:
    """(mean y - mean x) / s, times 1 - 3 / (4 df - 1), with s the pooled standard deviation (paired: of the
    differences, g_z). None when s is zero."""
    g = float(_hedges_g(x[None], y[None], paired=paired)[0])
    return g if math.isfinite(g) else None


def _hedges_g(x: Float64, y: Float64, *, paired: bool) -> Float64:
    """Of each row of x [m, n_a] and y [m, n_b]; NaN where the spread is zero but for rounding."""
    n_a, n_b = x.shape[1], y.shape[1]
    if paired:
        spread, degrees = np.std(y - x, axis=1, ddof=1), n_a - 1
    else:
        degrees = n_a + n_b - 2
        spread = np.sqrt(((n_a - 1) * np.var(x, axis=1, ddof=1) + (n_b - 1) * np.var(y, axis=1, ddof=1)) / degrees)
    mean_x, mean_y = x.mean(axis=1), y.mean(axis=1)
    spread = np.where(spread > 1e-12 * (np.abs(mean_x) + np.abs(mean_y)), spread, np.nan)
    return np.asarray((mean_y - mean_x) / spread * (1 - 3 / (4 * degrees - 1)))


def _bootstrap_interval(x: Float64, y: Float64, *, paired: bool) -> tuple[float, float] | None:
    """Percentile bootstrap of Hedges' g (Efron and Tibshirani 1993, ch. 13), groups resampled on their own, pairs
    together. Resamples without spread (one run many times) do not count; None when those are most."""
    rng = np.random.default_rng(_SEED)
    i = rng.integers(len(x), size=(_BOOTSTRAPS, len(x)))
    j = i if paired else rng.integers(len(y), size=(_BOOTSTRAPS, len(y)))
    values = _hedges_g(x[i], y[j], paired=paired)
    values = values[np.isfinite(values)]
    if len(values) < _BOOTSTRAPS / 2:
        return None
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def correct(tests: Sequence[GroupTest]) -> list[GroupTest]:
    """The tests with p_holm and p_bh over all of them that have a p-value. A test that could not have come below 0.05
    with so few runs, whatever they had shown, says so."""
    tested = [i for i, test in enumerate(tests) if test.p is not None]
    p = np.array([tests[i].p for i in tested], float)
    corrected = list(tests)
    for place, (i, strict, lenient) in enumerate(zip(tested, holm(p), benjamini_hochberg(p), strict=True)):
        test = tests[i]
        reason = None
        if strict >= ALPHA:
            best = p.copy()
            best[place] = smallest_p(test.n_a, test.n_b, paired=test.paired)
            least = holm(best)[place]
            if least >= ALPHA:
                reason = f"not enough runs for {len(tested)} tests: the smallest corrected p possible is {least:.2g}"
        corrected[i] = replace(test, p_holm=float(strict), p_bh=float(lenient), not_enough=reason)
    return corrected


def holm(p: Float64) -> Float64:
    """Holm's step-down correction (Holm 1979, Scand. J. Statist. 6:65): controls the chance of any false finding."""
    order = np.argsort(p)
    stepped = np.maximum.accumulate(np.minimum(1.0, p[order] * np.arange(len(p), 0, -1)))
    corrected = np.empty_like(stepped)
    corrected[order] = stepped
    return corrected


def benjamini_hochberg(p: Float64) -> Float64:
    """Benjamini and Hochberg's correction (1995): controls the share of false findings."""
    return np.asarray(stats.false_discovery_control(p), float) if len(p) else p


@dataclass(frozen=True)
class Separation:
    """How far two groups lie apart at one noise level.

    energy: the energy distance 2 E|X-Y| - E|X-X'| - E|Y-Y'| in the shared axes, latent (Szekely and Rizzo 2013,
    doi:10.1016/j.jspi.2013.03.018). p_permutation: of its permutation test, p_corrected: over the noise levels and all
    pairs of groups; None when there are not enough runs.
    """

    a: str
    b: str
    sigma: float
    energy: float
    p_permutation: float | None
    p_corrected: float | None


def energy_distance(distances: Float64, in_b: Bools, *, paired: bool = False) -> float:
    """Of the groups ~in_b and in_b, from the distances [n, n] between all of their points.

    Terms within a group leave out a point's distance to itself (the unbiased form, which may be below zero); of
    `paired` points, i and i + n/2, the term between the groups leaves out the two of one pair, which began as the same
    noise.
    """
    return float(_energies(distances, in_b[None], paired=paired)[0])


def _energies(distances: Float64, in_b: Bools, *, paired: bool) -> Float64:
    """The energy distance of each labeling [m, n]."""
    b = in_b.astype(float)
    a = 1 - b
    n_a, n_b = a.sum(axis=1), b.sum(axis=1)
    from_a = a @ distances
    between, count = np.einsum("mi,mi->m", from_a, b), n_a * n_b
    if paired:
        half = len(distances) // 2
        between = between - np.diagonal(distances, half).sum()
        count = count - half
    within_a = np.einsum("mi,mi->m", from_a, a) / np.maximum(n_a * (n_a - 1), 1)
    within_b = np.einsum("mi,mi->m", b @ distances, b) / np.maximum(n_b * (n_b - 1), 1)
    return np.asarray(2 * between / np.maximum(count, 1) - within_a - within_b)


def energy_tests(distances: Float64, in_b: Bools, *, paired: bool) -> tuple[Float64, Float64 | None, Float64 | None]:
    """Energy distances at k levels from `distances` [k, n, n], and their p-values: of each level on its own, and
    corrected over the levels; None when there are not enough runs.

    Labels change places freely, or, when the groups share their seeds, within a pair: points i and i + n/2. One-sided:
    only a large distance speaks for a difference. The correction takes the largest standardized distance over the
    levels in each permutation (Westfall and Young 1993), because neighboring levels say nearly the same.
    """
    observed = np.array([energy_distance(level, in_b, paired=paired) for level in distances])
    n, n_b = len(in_b), int(in_b.sum())
    if too_few(n // 2 if paired else n - n_b, n_b, paired=paired) is not None:
        return observed, None, None
    rng = np.random.default_rng(_SEED)
    if paired:
        swapped = rng.random((RESAMPLES, n // 2)) < 0.5
        labels = np.concatenate([swapped, ~swapped], axis=1)
    else:
        labels = rng.permuted(np.tile(in_b, (RESAMPLES, 1)), axis=1)
    permuted = np.stack(
        [_energies(level, labels, paired=paired) for level in distances], axis=1
    )  # [permutations, levels]
    spread = permuted.std(axis=0)
    scale = np.where(spread > 1e-9 * np.abs(permuted).max(axis=0), spread, np.inf)  # all alike: no evidence
    center = permuted.mean(axis=0)
    z, permuted_z = (observed - center) / scale, (permuted - center) / scale
    alone = (permuted_z >= z - 1e-9).sum(axis=0)
    together = (permuted_z.max(axis=1)[:, None] >= z - 1e-9).sum(axis=0)
    return observed, (alone + 1) / (RESAMPLES + 1), (together + 1) / (RESAMPLES + 1)


def correct_over_pairs(pairs: Sequence[Sequence[Separation]]) -> list[Separation]:
    """The levels of all pairs of groups, their p_corrected times the number of pairs that were tested (Bonferroni)."""
    factor = sum(1 for levels in pairs if any(level.p_corrected is not None for level in levels))
    return [
        level if level.p_corrected is None else replace(level, p_corrected=min(1.0, factor * level.p_corrected))
        for levels in pairs
        for level in levels
    ]


def separates_at(levels: Sequence[Separation]) -> float | None:
    """The noise level from which on, to the end of sampling, all levels are significant; None when the last is not.
    `levels` run from noise to data."""
    since = None
    for level in reversed(levels):
        if level.p_corrected is None or level.p_corrected >= ALPHA:
            break
        since = level.sigma
    return since


def dispersion(points: Float64) -> tuple[float, tuple[float, float] | None]:
    """Root-mean-square distance of points [n, p] to their center, latent, unbiased (n - 1), and its jackknife interval
    (Efron and Tibshirani 1993, ch. 11); None with fewer than four points."""
    n = len(points)
    if n < 2:
        return float("nan"), None

    def spread(chosen: Float64) -> float:
        return math.sqrt(float(np.square(chosen - chosen.mean(axis=0)).sum()) / (len(chosen) - 1))

    value = spread(points)
    if n < 4:
        return value, None
    left_out = np.array([spread(np.delete(points, i, axis=0)) for i in range(n)])
    error = math.sqrt((n - 1) / n * float(np.square(left_out - left_out.mean()).sum()))
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * error
    return value, (max(0.0, value - half), value + half)


def distances_to_center(points: Float64) -> Float64:
    """Distance of each of points [n, p] to their center, times sqrt(n / (n - 1)) because the center leans to each of
    them: what a test of equal dispersion compares (Anderson 2006, doi:10.1111/j.1541-0420.2005.00440.x)."""
    n = len(points)
    lengths = np.sqrt(np.square(points - points.mean(axis=0)).sum(axis=1))
    return np.asarray(lengths * math.sqrt(n / (n - 1))) if n > 1 else np.full(n, np.nan)
