"""Samplers yield, the driver follows."""

from collections.abc import Iterator

import pytest
import torch

from halfstep.errors import InputError
from halfstep.progress import Progress
from halfstep.sampling import MemoryRecorder, SamplerState, drive, sample_eqm
from halfstep.sampling.eqm import GuidedField
from tests.support.golden_eqm import X, Y, golden_model


def halving(x: torch.Tensor, steps: int) -> Iterator[SamplerState]:
    """The second sample stops after the first step."""
    yield SamplerState(0, 9.0, 1.0, x)
    for k in range(1, steps + 1):
        x = torch.stack([x[0] / 2, x[1] / 2 if k == 1 else x[1]])
        yield SamplerState(k, 9.0 - k, 0.5**k, x, None if k == 1 else (0,))


def test_recorders_and_progress_follow() -> None:
    class Counting(Progress):
        units = 0

        def advance(self, units: int = 1, *, written: int = 0) -> None:
            self.units += units

    progress, recorders = Counting(), [MemoryRecorder(), MemoryRecorder()]
    last = drive(halving(torch.ones(2, 1, 2, 2), 3), recorders, progress)
    assert last[:, 0, 0, 0].tolist() == [0.125, 0.5]
    assert [[step.index for step in recorder.steps] for recorder in recorders] == [[0, 1, 2, 3], [0, 1]]
    assert [(s.timestep, s.sigma, float(s.latent.mean())) for s in recorders[0].steps] == [
        (9.0, 1.0, 1.0), (8.0, 0.5, 0.5), (7.0, 0.25, 0.25), (6.0, 0.125, 0.125)
    ]  # fmt: skip
    assert progress.units == 6
    with pytest.raises(InputError, match="recorders: got 1 for 2 samples"):
        drive(halving(torch.ones(2, 1, 2, 2), 3), [MemoryRecorder()])
    with pytest.raises(InputError, match="has no states"):
        drive(iter(()))


def test_a_sampler_that_is_left_leaves_nothing() -> None:
    """The grad mode of the caller is its own, between the states and after them."""
    states = sample_eqm(GuidedField(golden_model(), Y), X, updates=3, step_size=0.01)
    first = next(states)
    assert torch.is_grad_enabled()
    second = next(states)
    assert torch.is_grad_enabled()
    assert torch.equal(first.latents, X)
    assert not second.latents.requires_grad
    del states
    assert torch.is_grad_enabled()
