"""Pictures between arrays and tensors, and how much two differ."""

from __future__ import annotations

import numpy as np
import torch

from halfstep.data.base import Array


def to_pixels(picture: Array) -> torch.Tensor:
    """uint8 [H, W, 3] to [1, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1


def psnr(a: Array, b: Array) -> float:
    """Peak signal-to-noise ratio of 8-bit pictures: 10 log10(255^2 / mean squared difference), in dB."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)
