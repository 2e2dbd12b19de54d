"""Planning by the cross-entropy method (Rubinstein 1999), as navigation world models do it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float64]

_SMALLEST = 0.1  # of the first deviation: the search does not end before its rounds do


def cross_entropy_method(
    cost: Callable[[Float], Float],
    mean: Float,
    deviation: Float,
    *,
    candidates: int,
    elites: int,
    iterations: int,
    generator: np.random.Generator,
) -> Float:
    """The cheapest point seen. In each round `candidates` are drawn from a Gaussian with `mean` and `deviation`
    (of any shape, alike), the mean itself among them; the best `elites` give the next one. `cost` takes all candidates
    of a round at once, [n, *shape], and returns [n]."""
    floor = _SMALLEST * deviation
    best, least = mean, np.inf
    for _ in range(iterations):
        drawn = mean + deviation * generator.standard_normal((candidates, *mean.shape))
        drawn[0] = mean
        costs = cost(drawn)
        order = np.argsort(costs, kind="stable")[:elites]
        if costs[order[0]] < least:
            best, least = drawn[order[0]], float(costs[order[0]])
        mean, deviation = drawn[order].mean(axis=0), np.maximum(drawn[order].std(axis=0), floor)
    return best
