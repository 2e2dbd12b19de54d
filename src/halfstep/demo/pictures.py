"""How much two pictures differ."""

from __future__ import annotations

import numpy as np

from halfstep.data.base import Array


def psnr(a: Array, b: Array) -> float:
    """Peak signal-to-noise ratio of 8-bit pictures: 10 log10(255^2 / mean squared difference), in dB."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)
