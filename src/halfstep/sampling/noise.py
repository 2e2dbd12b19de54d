"""Noise that belongs to a sample, whatever batch, process or device makes it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def own_generator(*key: int) -> torch.Generator:
    """A generator for what `key` numbers: a seed, a sample, ... On the CPU, so that every device starts from the same
    noise."""
    return torch.Generator().manual_seed(own_seed(*key))


def own_seed(*key: int) -> int:
    """The seed of that generator."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def draw(shape: tuple[int, ...], generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Standard normal noise [N, *shape], fp32, each sample from its own generator."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])
