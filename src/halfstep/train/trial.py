"""A training step in two policies, for `auto`."""

from __future__ import annotations

import torch

from halfstep.models import About
from halfstep.precision import Trial, network_trial
from halfstep.precision.trial import LARGE_BYTES
from halfstep.train.config import TrainConfig
from halfstep.train.data import TrainingData


def step_trial(
    config: TrainConfig, about: About, data: TrainingData, device: torch.device, processes: int = 1
) -> Trial | None:
    """Of forward and backward pass of a micro-batch in a new network like the run's; None of one that is large."""
    with torch.device("meta"):
        network = about.build()
    if sum(parameter.nbytes for parameter in network.parameters()) > LARGE_BYTES:
        return None
    with torch.random.fork_rng(devices=[]):
        network = about.build()
    samples = data.items_per_step // (config.gradient_accumulation_steps * processes) * data.goals
    return network_trial(network, about.family.example(network), max(1, samples), device, train=True)
