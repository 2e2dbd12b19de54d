"""What a sampler yields, and the one driver that lets recorders and progress follow it.

Axes: N samples, C channels, T frames, H W latents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from halfstep.errors import InputError
from halfstep.progress import SILENT, Progress
from halfstep.sampling.recorder import Recorder, Step


@dataclass(frozen=True)
class SamplerState:
    """The states of a batch of samples, `latents` [N, C, (T,) H, W] in fp32, at noise level `sigma` and `timestep`, in
    the sampler's units. `index` 0 is where the sampler begins. `moved`: the samples that are other than in the state
    before; None for all."""

    index: int
    timestep: float
    sigma: float
    latents: torch.Tensor
    moved: tuple[int, ...] | None = None

    @property
    def movers(self) -> Sequence[int]:
        """The numbers of the samples that moved."""
        return range(len(self.latents)) if self.moved is None else self.moved


def drive(
    states: Iterable[SamplerState], recorders: Sequence[Recorder] = (), progress: Progress = SILENT
) -> torch.Tensor:
    """Take a sampler to its end and return its last latents [N, C, (T,) H, W].

    `recorders`, one a sample, get the states of their sample as it moves; `progress` hears of each step of each sample.
    Raises InputError when recorders are not N, or the sampler yields nothing.
    """
    latents: torch.Tensor | None = None
    for state in states:
        latents = state.latents
        if recorders and len(recorders) != len(latents):
            raise InputError(f"recorders: got {len(recorders)} for {len(latents)} samples; give one each")
        if recorders:
            for number in state.movers:
                recorders[number].record(Step(state.index, state.timestep, state.sigma, latents[number]))
        if state.index > 0:
            progress.advance(len(latents))
    if latents is None:
        raise InputError("drive: the sampler has no states; expected at least the one it begins with")
    return latents
