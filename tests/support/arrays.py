"""Latents that every storage type holds exactly, and a golden run."""

from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden"


def latents(frames: int, seed: int = 0, shape: tuple[int, ...] = (2, 3, 4)) -> np.ndarray:
    """Latents that fp16 holds exactly."""
    return np.random.default_rng(seed).integers(-512, 512, (frames, *shape)).astype(np.float32) / 64
