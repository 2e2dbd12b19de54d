"""Frames of livestream by Euler steps, against a case whose answer is known, and walks of them."""

import math
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from halfstep.errors import InputError
from halfstep.models import LiveStream
from halfstep.precision import PrecisionPolicy, prepare
from halfstep.sampling import MemoryRecorder, Prediction, drive, noise_levels, rollout, sample_livestream
from halfstep.sampling.noise import draw
from tests.models.test_livestream import filled
from tests.sampling.test_cdit import generators

SIZES: dict[str, Any] = {"hidden_size": 16, "depth": 2, "num_heads": 4, "in_channels": 4}


def asked(network: LiveStream, count: int = 3) -> Prediction:
    generator = torch.Generator().manual_seed(7)
    context = 0.5 * torch.randn(count, network.context_size, *network.latent_shape, generator=generator)
    return Prediction(network, context, torch.randn(count, 3, generator=generator), torch.full((count,), 1 / 128))


def model(**changes: Any) -> LiveStream:
    torch.manual_seed(0)
    return filled(LiveStream((6, 8), 2, **SIZES, **changes)).eval()


@pytest.mark.parametrize("sigma_data", [0.5, 1.5])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 400])
def test_a_gaussian_is_followed_as_its_closed_form_says(steps: int, sigma_data: float) -> None:
    """A new network returns zero, which makes it the exact denoiser of Gaussian data of deviation sigma_data: each
    Euler step is then a factor, and infinitely many are the root of a ratio of variances."""
    network = LiveStream((6, 8), 2, **SIZES, sigma_data=sigma_data).eval()
    sigmas = noise_levels(steps, sigma_data)
    sample = drive(sample_livestream(asked(network), steps=steps, generators=generators(3)))
    x = sigmas[0] * draw(network.latent_shape, generators(3)).double()
    for before, after in pairwise(sigmas):
        slope = (x - sigma_data**2 / (sigma_data**2 + before**2) * x) / before
        x = x + (after - before) * slope
    torch.testing.assert_close(sample.double(), x, rtol=1e-4, atol=1e-6)
    if steps == 400:
        noise = draw(network.latent_shape, generators(3))
        exact = sigma_data / math.sqrt(sigma_data**2 + sigmas[0] ** 2) * sigmas[0]
        torch.testing.assert_close(sample, exact * noise, rtol=0.02, atol=1e-4)


def test_noise_levels_are_those_of_the_schedule() -> None:
    """Equation 5 of Karras et al. 2022, whose last level gives way to none."""
    for steps in (1, 3, 8):
        i = np.arange(steps + 1)
        expected = (5 ** (1 / 7) + i / steps * (2e-3 ** (1 / 7) - 5 ** (1 / 7))) ** 7
        found = noise_levels(steps)
        np.testing.assert_allclose(found[:-1], expected[:-1])
        assert found[0] == pytest.approx(5)
        assert (found[-1], expected[-1]) == (0, pytest.approx(2e-3))
    np.testing.assert_allclose(noise_levels(3, 1.0), 2 * np.array(noise_levels(3)))


def test_each_state_is_yielded_in_fp32() -> None:
    network = prepare(model(), PrecisionPolicy.parse("bf16-true"))
    recorders = [MemoryRecorder() for _ in range(3)]
    sample = drive(sample_livestream(asked(network), steps=4, generators=generators(3)), recorders)  # type: ignore[arg-type]
    steps = recorders[1].steps
    assert [step.sigma for step in steps] == noise_levels(4)
    assert [step.index for step in steps] == [0, 1, 2, 3, 4]
    assert {step.latent.dtype for step in steps} == {torch.float32}
    assert torch.equal(steps[-1].latent, sample[1])


def test_a_sample_depends_on_its_own_generator_alone() -> None:
    network = model()
    whole = asked(network)
    together = drive(sample_livestream(whole, generators=generators(3)))
    assert torch.equal(drive(sample_livestream(whole, generators=generators(3))), together)
    one = Prediction(network, whole.context[1:2], whole.actions[1:2], whole.rel_t[1:2])
    alone = drive(sample_livestream(one, generators=[torch.Generator().manual_seed(1)]))
    torch.testing.assert_close(alone[0], together[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(drive(sample_livestream(whole, generators=generators(3, seed=9))), together, atol=1e-2)


def test_half_is_near_fp32() -> None:
    network = model()
    exact = drive(sample_livestream(asked(network), steps=8, generators=generators(3)))
    prepare(network, PrecisionPolicy.parse("bf16-true"))
    half = drive(sample_livestream(asked(network), steps=8, generators=generators(3)))
    assert (half - exact).norm() < 0.03 * exact.norm()  # a call's 0.02, see tests/models, and those that it leads to


def test_a_walk_feeds_on_itself() -> None:
    network = model()
    first = asked(network)
    actions = torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(2))
    frames = rollout(network, first.context, actions, 1 / 128, partial(sample_livestream, generators=generators(3)))
    drawn, context = generators(3), first.context
    for number in range(3):
        wanted = Prediction(network, context, actions[:, number], first.rel_t)
        frame = drive(sample_livestream(wanted, generators=drawn))
        assert torch.equal(frame, frames[:, number])
        context = torch.cat([context[:, 1:], frame.unsqueeze(1)], dim=1)


def test_what_is_called_may_be_the_model_in_another_precision() -> None:
    network, half = model(), prepare(model(), PrecisionPolicy.parse("bf16-true"))
    whole = asked(network)
    other = Prediction(network, whole.context, whole.actions, whole.rel_t, network=half)
    expected = drive(sample_livestream(asked(half), generators=generators(3)))  # type: ignore[arg-type]
    assert torch.equal(drive(sample_livestream(other, generators=generators(3))), expected)


def test_mistakes_are_named() -> None:
    network = model()
    for steps in (0, 1001):
        with pytest.raises(InputError, match=f"steps: got {steps}; expected 1 to 1000"):
            drive(sample_livestream(asked(network), steps=steps, generators=generators(3)))
    with pytest.raises(InputError, match="generators: got 2 for 3 samples"):
        drive(sample_livestream(asked(network), generators=generators(2)))
