"""Latents that every storage type holds exactly, those of a smooth way, and golden files."""

from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden"
SHAPE = (4, 2, 16, 16)


def latents(frames: int, seed: int = 0, shape: tuple[int, ...] = (2, 3, 4)) -> np.ndarray:
    """Latents that fp16 holds exactly."""
    return np.random.default_rng(seed).integers(-512, 512, (frames, *shape)).astype(np.float32) / 64


def walk(steps: int = 21, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Latents of a smooth way: float32 [steps, C, T, H, W]."""
    rng = np.random.default_rng(seed)
    noise, clean = rng.standard_normal((2, *shape))
    t = np.linspace(0, 1, steps).reshape(-1, *[1] * len(shape))
    return ((1 - t) * noise + t * clean + 0.1 * np.sin(3 * t) * noise * clean).astype(np.float32)
