"""Sampling from CDiT against the reference implementation's numbers, and what a rollout promises."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr

from halfstep.data.navigation import follow, goal_actions, local_steps, to_actions
from halfstep.errors import InputError
from halfstep.models import CDiT
from halfstep.sampling import MemoryRecorder, Prediction, drive, rollout, sample_cdit
from halfstep.sampling.cdit import make_scheduler
from halfstep.sampling.noise import draw
from tests.support.golden_cdit import CONFIG, INPUTS, NUMBERS, golden_model

_, _, Y, CONTEXT, REL_T = INPUTS


def sampled(
    model: CDiT, context: torch.Tensor, y: torch.Tensor, rel_t: torch.Tensor, recorders: Any = (), **options: Any
) -> torch.Tensor:
    return drive(sample_cdit(Prediction(model, context, y, rel_t), **options), recorders)


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + number) for number in range(count)]


def test_ancestral_sampling_is_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reference's noises in place of drawn ones."""
    noises = list(NUMBERS["sample.noises"])
    monkeypatch.setattr("halfstep.sampling.cdit.draw", lambda *_: NUMBERS["in.noise"])
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: noises.pop(0))
    assert make_scheduler("ancestral", 5).timesteps.tolist() == sorted(NUMBERS["sample.timesteps"].tolist())[::-1]
    sample = sampled(golden_model(), CONTEXT, Y, REL_T, steps=5, generators=generators(3))
    torch.testing.assert_close(sample, NUMBERS["sample.out"], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("scheduler", ["ancestral", "ddim", "dpm++"])
def test_a_sample_depends_on_its_own_generator_alone(scheduler: Any) -> None:
    model = golden_model()
    chosen: dict[str, Any] = {"scheduler": scheduler, "steps": 4}
    together = sampled(model, CONTEXT, Y, REL_T, generators=generators(3), **chosen)
    alone = sampled(model, CONTEXT[1:2], Y[1:2], REL_T[1:2], generators=[torch.Generator().manual_seed(1)], **chosen)
    torch.testing.assert_close(alone[0], together[1], rtol=1e-4, atol=1e-4)
    other = sampled(model, CONTEXT, Y, REL_T, generators=generators(3, seed=9), **chosen)
    assert not torch.allclose(other, together, atol=1e-2)


@pytest.mark.parametrize("scheduler", ["ancestral", "ddim", "dpm++"])
def test_the_exact_denoiser_is_followed_home(scheduler: Any) -> None:
    """For a network that knows the frame, every scheduler ends at it, from any noise."""
    frame = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(5))
    bars = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))).float()

    class Knowing(CDiT):
        def forward(self, x: torch.Tensor, t: torch.Tensor, *_: Any) -> torch.Tensor:
            bar = bars[t].reshape(-1, 1, 1, 1)
            return torch.cat([(x - bar.sqrt() * frame) / (1 - bar).sqrt(), -torch.ones_like(x)], dim=1)

    recorders = [MemoryRecorder() for _ in range(3)]
    sample = sampled(
        Knowing(**CONFIG, patch_size=2), CONTEXT, Y, REL_T, scheduler=scheduler, steps=20,
        generators=generators(3), recorders=recorders,
    )  # fmt: skip
    torch.testing.assert_close(sample, frame.expand(3, -1, -1, -1), rtol=1e-2, atol=2e-2)
    steps = recorders[0].steps
    assert [step.index for step in steps] == list(range(21))
    assert steps[0].timestep == 999
    sigmas = [step.sigma for step in steps]
    assert sigmas == sorted(sigmas, reverse=True)
    assert sigmas[-1] == 0
    assert torch.equal(steps[-1].latent, sample[0])


@pytest.mark.parametrize(("scheduler", "steps"), [("ddim", 250), ("ddim", 300), ("ddim", 501), ("ddim", 1000),
                                                  ("dpm++", 25), ("dpm++", 300), ("dpm++", 1000)])  # fmt: skip
def test_a_gaussian_comes_out_as_wide_as_it_is(scheduler: Any, steps: int) -> None:
    """Data of one Gaussian, whose denoiser is known: nothing corrects a state that lost its timestep on the way."""
    width = 0.5
    bars = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))).float()

    class Gaussian(CDiT):
        def forward(self, x: torch.Tensor, t: torch.Tensor, *_: Any) -> torch.Tensor:
            bar = bars[t].reshape(-1, 1, 1, 1)
            return torch.cat([x * (1 - bar).sqrt() / (bar * width**2 + 1 - bar), torch.zeros_like(x)], dim=1)

    sample = sampled(
        Gaussian(**CONFIG, patch_size=2), CONTEXT, Y, REL_T, scheduler=scheduler, steps=steps, generators=generators(3)
    )
    noise = draw(sample.shape[1:], generators(3))
    assert sample.std() / noise.std() == pytest.approx(width, rel=0.03)


def test_a_rollout_feeds_on_itself() -> None:
    model = golden_model()
    actions = torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(2))
    chosen: dict[str, Any] = {"scheduler": "ddim", "steps": 3}
    frames = rollout(model, CONTEXT, actions, 0.01, partial(sample_cdit, generators=generators(3), **chosen))
    drawn, context = generators(3), CONTEXT
    for number in range(3):
        offset = torch.full((3,), 0.01)
        frame = sampled(model, context, actions[:, number], offset, generators=drawn, **chosen)
        assert torch.equal(frame, frames[:, number])
        context = torch.cat([context[:, 1:], frame.unsqueeze(1)], dim=1)


def test_a_circle_is_the_same_step_again_and_again() -> None:
    """Each action is seen from its own pose: on a circle all are equal, though the path turns round."""
    turns = np.linspace(0, 2 * np.pi, 13)
    position = np.stack([np.sin(turns), 1 - np.cos(turns)], axis=1)
    steps = local_steps(position, turns)
    np.testing.assert_allclose(steps, np.broadcast_to(steps[0], steps.shape), atol=1e-9)
    np.testing.assert_allclose(follow(steps)[:, :2], position[1:], atol=1e-9)
    np.testing.assert_allclose(follow(steps)[:, 2], turns[1:], atol=1e-9)
    actions = to_actions(steps, 0.25)
    for number in (0, 5, 11):
        expected = goal_actions(position, turns, number, [number + 1], 0.25)[0]
        np.testing.assert_allclose(actions[number], expected, atol=1e-9)


def test_mistakes_are_named() -> None:
    model = golden_model()
    with pytest.raises(InputError, match="got 'plms'; expected one of ancestral, ddim, dpm"):
        sampled(model, CONTEXT, Y, REL_T, scheduler="plms", generators=generators(3))
    with pytest.raises(InputError, match="steps: got 1; expected 2 to 1000"):  # one would leave all the noise
        sampled(model, CONTEXT, Y, REL_T, steps=1, generators=generators(3))
    with pytest.raises(InputError, match="generators: got 2 for 3 samples"):
        sampled(model, CONTEXT, Y, REL_T, generators=generators(2))
    with pytest.raises(InputError, match="steps: got 1001; expected 2 to 1000"):
        sampled(model, CONTEXT, Y, REL_T, steps=1001, generators=generators(3))


@pytest.mark.parametrize("scheduler", ["ancestral", "ddim", "dpm++"])
def test_the_exact_velocity_is_followed_home(scheduler: Any) -> None:
    """From pure noise, which says nothing of the frame, with finite noise levels all the way."""
    frame = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(5))
    betas = rescale_zero_terminal_snr(torch.linspace(1e-4, 0.02, 1000))
    bars = torch.cumprod(1 - betas, dim=0)

    class Knowing(CDiT):
        def forward(self, x: torch.Tensor, t: torch.Tensor, *_: Any) -> torch.Tensor:
            bar = bars[t].reshape(-1, 1, 1, 1)
            noise = (x - bar.sqrt() * frame) / (1 - bar).sqrt()
            return torch.cat([bar.sqrt() * noise - (1 - bar).sqrt() * frame, -torch.ones_like(x)], dim=1)

    model = Knowing(**CONFIG, patch_size=2, predicted="velocity")
    recorders = [MemoryRecorder() for _ in range(3)]
    sample = sampled(model, CONTEXT, Y, REL_T, recorders, scheduler=scheduler, steps=6, generators=generators(3))
    torch.testing.assert_close(sample, frame.expand(3, -1, -1, -1), rtol=0, atol=0.05)
    assert all(np.isfinite(step.sigma) for step in recorders[0].steps)


def test_guidance_goes_beyond_what_is_predicted_without_the_action() -> None:
    torch.manual_seed(0)
    model = CDiT(**CONFIG, patch_size=2, action_dropout=0.1).eval()
    for name, parameter in model.named_parameters():
        if "adaLN" in name or name.startswith("final_layer"):
            torch.nn.init.normal_(parameter, std=0.05)
    x, t = INPUTS[0], torch.full((3,), 400)
    with torch.no_grad():
        with_action = model(x, t, Y, CONTEXT, REL_T)
        without = model(x, t, Y, CONTEXT, REL_T, torch.zeros(3, dtype=torch.bool))
        guided = Prediction(model, CONTEXT, Y, REL_T, guidance_scale=2.0)(x, 400)
    expected = without[:, :4] + 2 * (with_action[:, :4] - without[:, :4])
    torch.testing.assert_close(guided[:, :4], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(guided[:, 4:], with_action[:, 4:], rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="was trained with every action"):
        drive(sample_cdit(Prediction(golden_model(), CONTEXT, Y, REL_T, guidance_scale=2.0), generators=generators(3)))
