"""The work of one step, which can be done again: its items, its noise and what it minimizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from halfstep.models.family import Items, Objective
from halfstep.team import Team
from halfstep.train.data import Batch, TrainingData


@dataclass(frozen=True)
class StepWork:
    """What process `team.rank` has to do in any step, in `parts` micro-batches. Noise depends on (seed, step, process)
    alone."""

    data: TrainingData
    objective: Objective
    team: Team
    device: torch.device
    seed: int
    parts: int = 1

    def batches(self, step: int) -> Iterator[Batch]:
        """The items of step `step` and all after it."""
        return self.data.batches(step, self.team, self.device)

    def begin(self, step: int, items: Items) -> list[Items]:
        """Seed torch's generator for the noise of a step, and put its items on the device, in micro-batches that go
        through the network one after the other."""
        torch.manual_seed(self._seed(step))
        moved = [item.to(self.device, non_blocking=True) for item in items]
        return list(zip(*(item.chunk(self.parts) for item in moved), strict=True))

    def losses(self, network: Any, microbatch: Items) -> torch.Tensor:
        """The loss of each sample, fp32."""
        return self.objective(network, self.data.latents(microbatch))

    def _seed(self, step: int) -> int:
        return int(np.random.SeedSequence((self.seed, step, self.team.rank)).generate_state(1, np.uint64)[0] >> 1)
