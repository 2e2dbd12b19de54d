"""What of a metric the rounding of the stored states could have made alone.

Errors of the states are taken as independent of one another and of the states. They then add their mean square to the
squared length of each state, and its share of one coordinate to each coordinate's variance; a metric is held against
itself without those.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from halfstep.analyze.metrics import METRICS, Path
from halfstep.store.run import Float64

_MARGIN = 2.0  # times the error that is expected


def resolutions(path: Path, metrics: Mapping[str, float], size: int) -> dict[str, float]:
    """By name, how far the `metrics` of `path`, whose states have `size` values, may be off because its states were
    rounded: what changes without twice the errors of the states, and at least the part of the value that these are of
    the states; infinite where nothing is left."""
    squares = np.square(_MARGIN * path.rms_errors)
    without = replace(
        path,
        gram=path.gram - np.diag(squares * size),
        variance=np.maximum(path.variance - squares, 0.0),
        spare=float(squares.mean()),
    )
    lengths = np.diag(path.gram).max()
    part = math.sqrt(float((squares * size).max() / lengths)) if lengths > 0 else 0.0
    found = {}
    for name, value in metrics.items():
        change = abs(value - METRICS[name].compute(without))
        found[name] = max(change, part * abs(value)) if math.isfinite(change) else math.inf
    return found


def spread_resolution(spreads: Float64, errors: Float64) -> float:
    """The same of the distances [n] of points to their center, whose errors have the lengths [n]: of their mean."""
    without = np.sqrt(np.maximum(np.square(spreads) - np.square(_MARGIN * errors), 0.0))
    return float(np.mean(spreads - without))


def of_means(groups: Sequence[Sequence[float]]) -> float:
    """How much of a difference between the means of two of the groups may be due to rounding, given that of each
    run."""
    return max((float(np.mean(group)) for group in groups if len(group)), default=0.0)
