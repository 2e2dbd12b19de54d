"""Is something small enough? Intervals and tests whose burden of proof is on sameness."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

Float = npt.NDArray[np.float64]
Verdict = Literal["non-inferior", "inferior", "inconclusive"]

ALPHA = 0.05
_RESAMPLES = 9999
_SEED = 0  # the same numbers give the same verdict


def ratio_bounds(parts: Float, wholes: Float) -> tuple[float, float, float]:
    """sqrt(sum parts / sum wholes) over walks, [W] each, with its lower and its upper bound, each at 95%: a percentile
    bootstrap of walks (Efron and Tibshirani 1993, ch. 13)."""
    chosen = np.random.default_rng(_SEED).integers(len(parts), size=(_RESAMPLES, len(parts)))
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = np.sqrt(parts[chosen].sum(axis=1) / wholes[chosen].sum(axis=1))
        value = np.sqrt(parts.sum() / wholes.sum())
    low, high = np.quantile(drawn, [ALPHA, 1 - ALPHA])
    return float(value), float(low), float(high)


def p_within(differences: Float, margin: float) -> float:
    """The p-value of "the mean of differences [W] lies outside of -margin to margin": two one-sided t tests, the larger
    p of which counts (Schuirmann 1987, doi:10.1007/BF01068419). Small: it is shown to lie within."""
    return _tail(margin - abs(float(differences.mean())), differences)


def p_beyond(differences: Float, margin: float) -> float:
    """The p-value of "the mean of differences [W] lies within". Small: it is shown to lie outside, on either side."""
    return min(1.0, 2 * _tail(abs(float(differences.mean())) - margin, differences))


def _tail(distance: float, differences: Float) -> float:
    """The chance of a mean so far on that side of a margin, if it were on it."""
    error = float(differences.std(ddof=1)) / math.sqrt(len(differences))
    if error == 0:
        return 0.0 if distance > 0 else 1.0
    return float(stats.t.sf(distance / error, len(differences) - 1))
