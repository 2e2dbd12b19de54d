"""Image-to-image pipelines of every kind: what their networks are told, and frames that the library would make."""

from __future__ import annotations

import copy
import inspect
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from halfstep.errors import InputError
from halfstep.live import LiveEngine
from halfstep.live.pictures import PictureModel
from halfstep.live.pipelines import WholePipeline, open_pipeline, schedule
from halfstep.precision import PrecisionPolicy, prepare
from halfstep.sampling.noise import own_generator
from tests.live.worlds import CPU
from tests.support.networks import (
    tiny_autoencoder,
    tiny_flux,
    tiny_stable_diffusion,
    tiny_stable_diffusion_3,
    tiny_stable_diffusion_xl,
)

SEEN = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)


def open_at(folder: Path, prompt: str = "a cat", size: tuple[int, int] = (32, 16)) -> Any:
    return open_pipeline(str(folder), prompt, CPU, size=size, strength=0.5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from diffusers import EulerDiscreteScheduler

    made = {
        "xl": tiny_stable_diffusion_xl(tiny_autoencoder((4, 8)), EulerDiscreteScheduler()),
        "sd3": tiny_stable_diffusion_3(tiny_autoencoder((4, 8), shift_factor=0.1)),
        "flux": tiny_flux(tiny_autoencoder((4, 8), shift_factor=0.1)),
    }
    found = {}
    for name, pipe in made.items():
        found[name] = tmp_path_factory.mktemp(name)
        pipe.save_pretrained(found[name])
    return found


def test_the_network_of_an_xl_is_told_what_the_library_tells_it(folders: dict[str, Path]) -> None:
    from diffusers import StableDiffusionXLImg2ImgPipeline

    pipe = StableDiffusionXLImg2ImgPipeline.from_pretrained(folders["xl"])
    told: list[dict[str, Any]] = []
    pipe.unet.register_forward_pre_hook(lambda _, args, kwargs: told.append(kwargs), with_kwargs=True)
    pipe("a cat", image=Image.fromarray(SEEN), strength=0.5, num_inference_steps=2, guidance_scale=1.0)
    ours: list[tuple[Any, ...]] = []
    model = open_at(folders["xl"])
    assert isinstance(model, PictureModel)
    model.network.register_forward_pre_hook(lambda _, args: ours.append(args))
    engine = LiveEngine(model, CPU, steps=2)
    engine.reset(5)
    engine.step(SEEN)
    _, _, embedding, pooled, sizes = ours[0]
    theirs = told[0]["added_cond_kwargs"]
    for value, expected in (
        (embedding, told[0]["encoder_hidden_states"]),
        (pooled, theirs["text_embeds"]),
        (sizes, theirs["time_ids"]),
    ):
        assert len(value) == 2
        torch.testing.assert_close(value, expected.expand_as(value))


@pytest.mark.parametrize("name", ["sd3", "flux"])
@pytest.mark.parametrize("steps", [1, 3])
def test_a_frame_is_what_the_library_makes_of_the_picture(folders: dict[str, Path], name: str, steps: int) -> None:
    from diffusers import AutoPipelineForImage2Image

    pipe = AutoPipelineForImage2Image.from_pretrained(folders[name])
    pipe.set_progress_bar_config(disable=True)
    of, strength = schedule(steps, 0.5)
    expected = pipe(
        "a cat",
        image=Image.fromarray(SEEN),
        height=16,
        width=32,
        num_inference_steps=of,
        strength=strength,
        generator=own_generator(5),
        output_type="np",
        **({"guidance_scale": 1.0} if name == "sd3" else {}),
    ).images[0]
    model = open_at(folders[name])
    assert isinstance(model, WholePipeline)
    calls: list[None] = []
    model.network.register_forward_pre_hook(lambda *_: calls.append(None))
    engine = LiveEngine(model, CPU, steps=steps)
    engine.reset(5)
    picture = engine.step(SEEN).picture
    assert len(calls) == steps
    assert np.abs(picture.astype(float) - 255 * expected).max() <= 0.51  # rounded to 8 bits
    assert np.array_equal(engine.step(SEEN).picture, picture)  # nothing is kept but the seed


@pytest.mark.parametrize("name", ["xl", "sd3", "flux"])
def test_half_is_near_fp32(folders: dict[str, Path], name: str) -> None:
    model = open_at(folders[name])
    shown = {}
    for precision in ("fp32", "bf16", "fp16"):
        engine = LiveEngine(model, CPU, steps=2, precision=precision)
        engine.reset(5)
        frames = [engine.step(SEEN) for _ in range(8)]
        assert not engine.not_finite
        if precision != "fp32":
            assert frames[0].difference is not None and 0 <= frames[0].difference < 6  # bf16 has three digits, twice
        shown[precision] = frames[-1].picture.astype(float)
        engine.close()
    assert 0 < np.abs(shown["bf16"] - shown["fp32"]).mean() < 6


def test_the_prompt_is_encoded_once_and_counts(folders: dict[str, Path]) -> None:
    model = open_at(folders["sd3"])
    assert all(getattr(model._pipe, name) is None for name in ("text_encoder", "text_encoder_2", "text_encoder_3"))
    engines = [LiveEngine(one, CPU, steps=1) for one in (model, open_at(folders["sd3"], prompt="cat cat a"))]
    for engine in engines:
        engine.reset(5)
    assert not np.array_equal(*(engine.step(SEEN).picture for engine in engines))


def test_timesteps_are_not_rounded(folders: dict[str, Path]) -> None:
    """bf16 has 256 steps between 512 and 1024; the library hands timesteps on in fp32."""
    model = open_at(folders["sd3"])
    told: list[torch.Tensor] = []
    of = type(model.network.module)
    called = of.forward

    def listening(self: Any, *args: Any, **kwargs: Any) -> Any:
        told.append(kwargs["timestep"])
        assert kwargs["hidden_states"].dtype == torch.bfloat16
        return called(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of, "forward", listening)
        half = prepare(copy.deepcopy(model.network), PrecisionPolicy.parse("bf16-true"))
        model.predict(half, model.begin(5).state, SEEN, 2)
    assert [given.dtype for given in told] == [torch.float32] * 2


def test_a_pipeline_without_one_of_its_encoders(tmp_path: Path) -> None:
    """As it was saved: its list of parts says that there is none."""
    pipe = tiny_stable_diffusion_3(tiny_autoencoder((4, 8), shift_factor=0.1))
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipe.save_pretrained(tmp_path)
    engine = LiveEngine(open_at(tmp_path), CPU, steps=1)
    engine.reset(5)
    assert engine.step(SEEN).problem is None


def test_what_steps_side_by_side_are_not_for_is_called_whole(tmp_path: Path) -> None:
    from diffusers import DDIMScheduler, EDMDPMSolverMultistepScheduler

    for name, scheduler in {
        "sample": DDIMScheduler(prediction_type="sample", clip_sample=False, steps_offset=1),
        "edm": EDMDPMSolverMultistepScheduler(),
    }.items():
        tiny_stable_diffusion(tiny_autoencoder((4, 8)), scheduler).save_pretrained(tmp_path / name)
        model = open_at(tmp_path / name)
        assert isinstance(model, WholePipeline)
        engine = LiveEngine(model, CPU, steps=2)
        engine.reset(5)
        assert engine.step(SEEN).problem is None


def test_strength_is_as_near_as_the_steps_allow() -> None:
    for steps in range(1, 9):
        for hundredth in range(5, 101):
            of, strength = schedule(steps, hundredth / 100)
            assert int(of * strength) == of - int(max(of - of * strength, 0)) == steps  # the library's two ways
            assert abs(strength - hundredth / 100) <= 0.5 / max(1, steps) + 1e-9
    assert schedule(2, 0.5) == (4, 0.5) and schedule(8, 1.0) == (8, 1.0)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model_index.json", b"{}"),
        ("model_index.json", b"[]"),
        ("text_encoder/model.safetensors", b""),
        ("text_encoder/model.safetensors", b"\x10" + b"\0" * 20),
        ("tokenizer/tokenizer.json", b"{}"),
        ("scheduler/scheduler_config.json", b'{"_class_name": "DDIMScheduler", "num_train_timesteps": "x"}'),
    ],
)
def test_damaged_folders_are_named(folders: dict[str, Path], tmp_path: Path, name: str, content: bytes) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(folders["xl"], damaged)
    (damaged / name).write_bytes(content)
    with pytest.raises(InputError, match="cannot be had for image-to-image") as caught:
        open_at(damaged)
    assert "\n" not in str(caught.value)


def test_what_makes_nothing_of_a_picture_is_named(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import DDIMScheduler, StableDiffusion3Img2ImgPipeline

    with pytest.raises(InputError, match=r"--size: got 33x16; StableDiffusion3Img2ImgPipeline needs multiples of 2"):
        open_at(folders["sd3"], size=(33, 16))
    tiny_stable_diffusion(tiny_autoencoder((4, 8)), DDIMScheduler(steps_offset=1), in_channels=9).save_pretrained(
        tmp_path / "inpaint"
    )
    with pytest.raises(InputError, match=r"makes nothing of .* \(RuntimeError: .* to have 9 channels"):
        open_at(tmp_path / "inpaint")
    called = StableDiffusion3Img2ImgPipeline.__call__

    def wanting_more(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("`control_image` has to be given")

    wanting_more.__signature__ = inspect.signature(called)  # type: ignore[attr-defined]
    monkeypatch.setattr(StableDiffusion3Img2ImgPipeline, "__call__", wanting_more)
    with pytest.raises(
        InputError, match=r"makes nothing of a prompt and a picture of 32x16 \(ValueError: `control_image` has"
    ):
        open_at(folders["sd3"])
