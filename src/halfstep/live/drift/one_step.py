"""One step from true frames: what a precision adds to the model's own error. Drift is what such errors add up to, so
this is the sensitive test.

Axes: W walks, P places, C channels, h w latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from halfstep.live.drift.equivalence import Verdict, ratio_bounds

LIMIT = 0.02


@dataclass(frozen=True)
class OneStep:
    """added: rms(variant - fp32) / rms(fp32 - truth), in latents over all walks and places, with its bounds, each at
    95% over walks; infinite where the variant is not finite."""

    added: float
    low: float
    high: float

    @property
    def verdict(self) -> Verdict:
        if self.high < LIMIT:
            return "non-inferior"
        return "inferior" if self.low >= LIMIT else "inconclusive"


def added_error(made: torch.Tensor, exact: torch.Tensor, real: torch.Tensor) -> OneStep:
    """Of predictions `made` [W, P, C, h, w] beside those in fp32 and the true frames."""
    if not bool(torch.isfinite(made).all()):
        return OneStep(np.inf, np.inf, np.inf)
    return OneStep(*ratio_bounds(_squares(made - exact), _squares(exact - real)))


def _squares(difference: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Their sum for each walk, [W]."""
    squares: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = (
        difference.double().square().flatten(1).sum(dim=1).cpu().numpy()
    )
    return squares
