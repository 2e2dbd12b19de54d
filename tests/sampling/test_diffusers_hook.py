"""record(pipe, store, run=...) on real pipelines with random weights: every state, rightly labelled, none changed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    WanPipeline,
)

from halfstep.errors import InputError
from halfstep.sampling import record
from halfstep.store import TrajectoryFormat, TrajectoryStore

EXACT = TrajectoryFormat(storage="fp32")
OFFSET: dict[str, Any] = {"steps_offset": 1}  # as Stable Diffusion has it


@pytest.fixture(scope="module")
def pipe(small_wan_pipeline: Path) -> Any:
    pipe = WanPipeline.from_pretrained(small_wan_pipeline)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, **options: Any) -> torch.Tensor:
    """Latents after five steps of 32x32 pixels, 5 frames, from seed 7."""
    options = {"num_inference_steps": 5, "prompt": "a red car", "generator": torch.Generator().manual_seed(7)} | options
    return pipe(height=32, width=32, num_frames=5, guidance_scale=5.0, output_type="latent", **options).frames


def test_every_state_is_recorded_and_nothing_changes(pipe: Any, tmp_path: Path) -> None:
    plain = call(pipe)
    with record(pipe, tmp_path / "s", run="a", format=EXACT, prompt="a red car", seed=7) as recording:
        recorded = call(pipe, callback_on_step_end=recording)
    assert torch.equal(plain, recorded)
    assert torch.equal(plain, call(pipe))  # the pipeline is as it was
    run = TrajectoryStore.open(tmp_path / "s")["a"]
    assert (run.problems, run.prompt, run.seed, len(run)) == ((), "a red car", 7, 6)
    noise = torch.randn((1, 16, 2, 4, 4), generator=torch.Generator().manual_seed(7))
    assert np.array_equal(run.latents[0], noise[0].numpy())
    assert np.array_equal(run.latents[-1], plain[0].numpy())
    assert np.array_equal(run.sigmas, pipe.scheduler.sigmas.double().numpy())
    assert np.array_equal(run.timesteps[:-1], pipe.scheduler.timesteps.double().numpy())
    assert (run.sigmas[0] > 0.99, run.sigmas[-1], run.timesteps[-1]) == (True, 0.0, 0.0)


def test_the_labels_belong_to_the_states(pipe: Any, tmp_path: Path) -> None:
    """With Euler and a constant field v, the state at sigma is noise + (sigma - 1) v: only the right labels give it."""
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    constant = WanPipeline(**(pipe.components | {"scheduler": euler}))
    constant.set_progress_bar_config(disable=True)
    field = torch.full((1, 16, 2, 4, 4), 0.5)
    forward = pipe.transformer.forward
    pipe.transformer.forward = lambda **_: (field,)
    try:
        with record(constant, tmp_path / "s", run="a", format=EXACT) as recording:
            call(constant, callback_on_step_end=recording)
    finally:
        pipe.transformer.forward = forward
    run = TrajectoryStore.open(tmp_path / "s")["a"]
    for latent, sigma in zip(run.latents, run.sigmas, strict=True):
        assert np.allclose(latent, run.latents[0] + (sigma - run.sigmas[0]) * 0.5, atol=1e-5)


def test_several_samples_are_several_runs(pipe: Any, tmp_path: Path) -> None:
    with record(pipe, tmp_path / "s", run=["a", "b"], format=EXACT) as recording:
        both = call(pipe, prompt=["a car", "a cat"], callback_on_step_end=recording)
    store = TrajectoryStore.open(tmp_path / "s")
    assert np.array_equal(store["a"].latents[-1], both[0].numpy())
    assert np.array_equal(store["b"].latents[-1], both[1].numpy())
    with (
        pytest.raises(InputError, match=r"samples 2 at once; got 1 names, give run=\[...\] one each"),
        record(pipe, tmp_path / "s", run="c") as recording,
    ):
        call(pipe, prompt=["a car", "a cat"], callback_on_step_end=recording)


def test_sampling_that_stops_early_leaves_an_incomplete_run(pipe: Any, tmp_path: Path) -> None:
    def stop(recording: Any) -> Any:
        def callback(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            pipe._interrupt = i == 1
            return recording(pipe, i, t, tensors)

        return callback

    with record(pipe, tmp_path / "s", run="a", interval=2) as recording:
        call(pipe, callback_on_step_end=stop(recording))
    run = TrajectoryStore.open(tmp_path / "s")["a"]
    assert run.steps.tolist() == [0, 2]
    assert run.problems[0].startswith("incomplete")


def test_mistakes_are_named(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing was sampled"), record(pipe, tmp_path / "s", run="a"):
        pass
    with record(pipe, tmp_path / "s", run="a") as recording:
        call(pipe, callback_on_step_end=recording)
    with pytest.raises(InputError, match="has a run 'a' already"), record(pipe, tmp_path / "s", run="a"):
        pass
    assert "step" not in vars(pipe.scheduler)
    with (
        pytest.raises(InputError, match="the callback was not called; give the pipeline callback_on_step_end"),
        record(pipe, tmp_path / "s", run="b"),
    ):
        call(pipe)
    assert list(TrajectoryStore.open(tmp_path / "s")) == ["a"]
    with (
        pytest.raises(InputError, match="got scheduler step 0 after 6 states; give each call"),
        record(pipe, tmp_path / "s", run="twice") as recording,
    ):
        for _ in range(2):
            call(pipe, callback_on_step_end=recording)
    with (
        pytest.raises(InputError, match="gives its callback no latents"),
        record(pipe, tmp_path / "s", run="c") as recording,
    ):
        call(pipe, callback_on_step_end=recording, callback_on_step_end_tensor_inputs=["prompt_embeds"])


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(**OFFSET),
        PNDMScheduler(skip_prk_steps=True, **OFFSET),
        EulerDiscreteScheduler(**OFFSET),
        HeunDiscreteScheduler(**OFFSET),
    ],
)
def test_variance_preserving_models(small_vae: Path, tmp_path: Path, scheduler: Any) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
        sample_size=16,
    )
    vae = AutoencoderKL.from_pretrained(small_vae)
    pipe = StableDiffusionPipeline(vae, None, None, unet, scheduler, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    with record(pipe, tmp_path / "s", run="a", format=EXACT) as recording:
        samples = pipe(
            prompt_embeds=torch.zeros(1, 4, 8),
            num_inference_steps=6,
            guidance_scale=1.0,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
            callback_on_step_end=recording,
        ).images
    run = TrajectoryStore.open(tmp_path / "s")["a"]
    assert run.problems == ()
    assert len(run) == len(scheduler.timesteps) + 1
    assert np.array_equal(run.latents[-1], samples[0].numpy())
    assert run.sigmas[0] > 5  # the first timesteps of Stable Diffusion are nearly pure noise
    assert run.sigmas[-1] < 0.05
    assert (np.diff(run.sigmas) <= 0).all()
    assert np.array_equal(run.timesteps[:-1], scheduler.timesteps.double().numpy())
