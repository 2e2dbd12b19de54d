"""Corrections of p-values for the number of tests."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]


def holm(p: Float64) -> Float64:
    """Holm's step-down correction (Holm 1979, Scand. J. Statist. 6:65): controls the chance of any false finding."""
    order = np.argsort(p)
    stepped = np.maximum.accumulate(np.minimum(1.0, p[order] * np.arange(len(p), 0, -1)))
    corrected = np.empty_like(stepped)
    corrected[order] = stepped
    return corrected
