"""record(pipe, store, run=...) on real pipelines with random weights: every state, rightly labeled, none changed."""

import copy
import inspect
import pickle
from collections.abc import Callable
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
    UniPCMultistepScheduler,
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
        pytest.warns(RuntimeWarning, match=r"samples 2 at once; got 1 names, give run=\[...\] one each"),
        record(pipe, tmp_path / "s", run="c") as recording,
    ):
        again = call(pipe, prompt=["a car", "a cat"], callback_on_step_end=recording)
    assert np.array_equal(both, again)
    assert list(store) == ["a", "b"]


def test_each_of_several_runs_has_its_own_prompt_and_seed(pipe: Any, tmp_path: Path) -> None:
    prompts = ["a car", "a cat"]
    with record(pipe, tmp_path / "s", run=["a", "b"], prompt=prompts, seed=7, interval=5) as recording:
        call(pipe, prompt=prompts, callback_on_step_end=recording)
    store = TrajectoryStore.open(tmp_path / "s")
    assert [(run.prompt, run.seed) for run in (store["a"], store["b"])] == [("a car", 7), ("a cat", 7)]
    with pytest.raises(InputError, match="prompt is a list of 2 for 1 runs; expected one each"):
        record(pipe, tmp_path / "s", run="c", prompt=prompts).__enter__()


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
    assert type(pipe.scheduler) is UniPCMultistepScheduler
    with (
        pytest.raises(InputError, match="the callback was not called; give the pipeline callback_on_step_end"),
        record(pipe, tmp_path / "s", run="b"),
    ):
        call(pipe)
    assert list(TrajectoryStore.open(tmp_path / "s")) == ["a"]
    with (
        pytest.warns(RuntimeWarning, match="got scheduler step 0 after 6 states; give each call.*sampling goes on"),
        record(pipe, tmp_path / "s", run="twice") as recording,
    ):
        first, second = (call(pipe, callback_on_step_end=recording) for _ in range(2))
    assert np.array_equal(first, second)
    with (
        pytest.warns(RuntimeWarning, match="gives its callback no latents"),
        record(pipe, tmp_path / "s", run="c") as recording,
    ):
        call(pipe, callback_on_step_end=recording, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert list(TrajectoryStore.open(tmp_path / "s")) == ["a"]


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


class WithSound:
    """The loop of the pipelines that sample a video and its sound together: each through a scheduler, the second a copy
    that is made inside the call. The network is x -> -x."""

    def __init__(self, scheduler: Any, duplicate: Callable[[Any], Any] = copy.deepcopy) -> None:
        self.scheduler, self.duplicate = scheduler, duplicate

    def __call__(self, callback_on_step_end: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        x, sound = (torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
        second = self.duplicate(self.scheduler)
        for scheduler in (self.scheduler, second):
            scheduler.set_timesteps(8)
            scheduler.set_begin_index(0)
        for i, t in enumerate(self.scheduler.timesteps):
            x = self.scheduler.step(-x, t, x, return_dict=False)[0]
            sound = second.step(-sound, t, sound, return_dict=False)[0]
            if callback_on_step_end:
                x = callback_on_step_end(self, i, t, {"latents": x})["latents"]
        return x, sound


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        copy.copy,
        lambda scheduler: pickle.loads(pickle.dumps(scheduler)),
        lambda scheduler: type(scheduler).from_config(scheduler.config),
    ],
)
@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    ],
)
def test_a_pipeline_may_copy_its_scheduler(scheduler: Any, duplicate: Any, tmp_path: Path) -> None:
    pipe = WithSound(scheduler, duplicate)
    plain = pipe()
    with record(pipe, tmp_path / "s", run="a", format=EXACT) as recording:
        recorded = pipe(callback_on_step_end=recording)
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))
    run = TrajectoryStore.open(tmp_path / "s")["a"]
    assert (run.problems, len(run)) == ((), 9)
    assert np.array_equal(run.latents[-1], plain[0][0].numpy())


def test_a_pipeline_that_steps_copies_alone_is_refused(tmp_path: Path) -> None:
    pipe = WithSound(FlowMatchEulerDiscreteScheduler())

    def through_copies(callback_on_step_end: Any = None) -> Any:
        return WithSound(copy.deepcopy(pipe.scheduler))(callback_on_step_end=callback_on_step_end)

    plain = through_copies()
    with (
        pytest.warns(
            RuntimeWarning, match="WithSound does not sample through the step of its own scheduler, but through a"
        ),
        record(pipe, tmp_path / "s", run="a") as recording,
    ):
        sampled = through_copies(recording)
    assert list(TrajectoryStore.open(tmp_path / "s")) == []
    assert all(torch.equal(a, b) for a, b in zip(plain, sampled, strict=True))


def test_a_watched_scheduler_looks_like_itself(tmp_path: Path) -> None:
    scheduler = DDIMScheduler()
    signature = inspect.signature(scheduler.step)
    with pytest.raises(ZeroDivisionError), record(WithSound(scheduler), tmp_path / "s", run="a"):
        assert isinstance(scheduler, DDIMScheduler)
        assert (type(scheduler).__name__, type(scheduler).__module__) == ("DDIMScheduler", DDIMScheduler.__module__)
        assert inspect.signature(scheduler.step) == signature
        assert type(scheduler).from_config(scheduler.config).config == scheduler.config
        assert scheduler.compatibles == DDIMScheduler().compatibles
        scheduler.save_pretrained(tmp_path / "saved")
        copies = [copy.copy(scheduler), copy.deepcopy(scheduler)]
        copies += [pickle.loads(pickle.dumps(scheduler, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
        assert {type(each) for each in copies} == {DDIMScheduler}
        raise ZeroDivisionError
    assert type(scheduler) is DDIMScheduler
    assert vars(scheduler).keys() == vars(DDIMScheduler()).keys()
    assert DDIMScheduler.from_pretrained(tmp_path / "saved").config["_class_name"] == "DDIMScheduler"


def test_a_step_that_was_replaced_is_refused(tmp_path: Path) -> None:
    scheduler = DDIMScheduler()
    scheduler.step = lambda *_: None
    with pytest.raises(InputError, match="the step of this DDIMScheduler was replaced"):
        record(WithSound(scheduler), tmp_path / "s", run="a").__enter__()


class Odd(WithSound):
    """A loop that does something else between scheduler and callback."""

    def __init__(self, change: str) -> None:
        super().__init__(FlowMatchEulerDiscreteScheduler())
        self.change = change

    def __call__(self, callback_on_step_end: Any = None) -> Any:
        own, calls = self.change == "own levels", 2 if self.change == "twice" else 1
        x = torch.randn((1, 4, 8) if own else (1, 4, 2, 8, 8), generator=torch.Generator().manual_seed(0))
        options = {"per_token_timesteps": torch.ones(1, 4)} if own else {}
        self.scheduler.set_timesteps(4)
        for i, t in enumerate(self.scheduler.timesteps[::calls]):
            for _ in range(calls):
                x = self.scheduler.step(-x, t, x, return_dict=False, **options)[0]
            shown = torch.cat([x, x], dim=2) if self.change == "part" else x
            if callback_on_step_end is not None:
                callback_on_step_end(self, i, t, {"latents": shown})
        return x


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("own levels", "gives its scheduler per_token_timesteps, so its states have no one noise level"),
        ("twice", "Odd made 2 scheduler steps until it called back for step 0; expected one a call"),
        ("part", r"steps a sample of shape \[1, 4, 2, 8, 8\] and calls back with \[1, 4, 4, 8, 8\]"),
    ],
)
def test_what_a_pipeline_does_to_its_states_is_noticed(change: str, named: str, tmp_path: Path) -> None:
    pipe = Odd(change)
    plain = pipe()
    with pytest.warns(RuntimeWarning, match=named) as warned, record(pipe, tmp_path / "s", run="a") as recording:
        sampled = pipe(callback_on_step_end=recording)
    assert len(warned) == 1
    assert torch.equal(plain, sampled)
