"""Pictures through an image-to-image pipeline, their steps side by side."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from halfstep.errors import InputError
from halfstep.live import LiveEngine
from halfstep.live.pictures import PictureModel
from halfstep.live.pipelines import open_pipeline
from halfstep.sampling.noise import own_generator
from tests.live.worlds import CPU
from tests.support.networks import tiny_autoencoder, tiny_stable_diffusion

SIZE = (12, 8)
LEVELS = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), dim=0)


class Knowing(nn.Module):
    """Knows the noise of each step's place, and so what every picture was."""

    def __init__(self, seed: int, velocity: bool) -> None:
        super().__init__()
        self.seed, self.velocity = seed, velocity
        self.batches: list[list[int]] = []

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, encoder_hidden_states: torch.Tensor) -> Any:
        self.batches.append(timesteps.tolist())
        assert encoder_hidden_states.shape == (len(x), 5, 3)
        noise = torch.randn(x.shape, generator=own_generator(self.seed))
        level = LEVELS[timesteps].reshape(-1, 1, 1, 1)
        start = (x - (1 - level).sqrt() * noise) / level.sqrt()
        return SimpleNamespace(sample=level.sqrt() * noise - (1 - level).sqrt() * start if self.velocity else noise)


class Plain(nn.Module):
    """An autoencoder whose latents are the pixels."""

    config = SimpleNamespace(scaling_factor=0.5)

    def encode(self, pixels: torch.Tensor) -> Any:
        return SimpleNamespace(latents=pixels)

    def decode(self, latents: torch.Tensor) -> Any:
        return SimpleNamespace(sample=latents)


def model(unet: nn.Module, kind: str = "epsilon") -> PictureModel:
    return PictureModel(
        unet, Plain(), (torch.zeros(1, 5, 3),), LEVELS, CPU, velocity=kind == "v_prediction", size=SIZE, strength=0.6
    )


def picture(value: int) -> np.ndarray:
    return np.full((SIZE[1], SIZE[0], 3), value, np.uint8)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_picture_comes_out_after_as_many_frames_as_it_has_steps(kind: str, steps: int) -> None:
    unet = Knowing(3, kind == "v_prediction")
    engine = LiveEngine(model(unet, kind), CPU, steps=steps, seed=3)
    assert engine.reset().picture.mean() == pytest.approx(128, abs=0.5)  # grey
    shown = [round(float(engine.step(picture(20 * k)).picture.mean())) for k in range(8)]
    late = steps - 1  # the first picture stands in for those that never came
    assert shown == pytest.approx([0] * late + [20 * k for k in range(8 - late)], abs=1)
    assert all(batch == unet.batches[0] and len(batch) == steps for batch in unet.batches)  # one call a frame
    assert unet.batches[0] == sorted(unet.batches[0], reverse=True) and unet.batches[0][0] == 599


def test_steps_may_be_changed_on_the_way() -> None:
    engine = LiveEngine(model(Knowing(0, False)), CPU, steps=3)
    engine.reset()
    for value in (10, 20, 30):
        engine.step(picture(value))
    engine.set_steps(1)
    assert engine.step(picture(200)).picture.mean() == pytest.approx(200, abs=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import DDIMScheduler

    path: Path = tmp_path_factory.mktemp("sd")
    tiny_stable_diffusion(tiny_autoencoder((4, 8)), DDIMScheduler(clip_sample=False)).save_pretrained(path)
    return path


def test_a_pipeline_of_the_library(folder: Path) -> None:
    made = open_pipeline(str(folder), "a cat", CPU, size=(32, 16), strength=0.5)
    other = open_pipeline(str(folder), "cat cat a", CPU, size=(32, 16), strength=0.5)
    seen = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
    frames = []
    for one in (made, made, other):
        engine = LiveEngine(one, CPU, steps=2)
        engine.reset(5)
        frames.append([engine.step(seen).picture for _ in range(3)])
    assert frames[0][0].shape == (16, 32, 3)
    assert np.array_equal(frames[0], frames[1])
    assert not np.array_equal(frames[0], frames[2])  # another prompt
    engine = LiveEngine(made, CPU, steps=2, precision="bf16")
    engine.reset(5)
    half = [engine.step(seen).picture for _ in range(3)]
    assert np.abs(half[-1].astype(float) - frames[0][-1]).mean() < 6  # bf16 has three digits, twice


def test_what_is_no_such_pipeline_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--size: got 33x16; .* needs multiples of 2"):
        open_pipeline(str(folder), "a cat", CPU, size=(33, 16), strength=0.5)
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    with pytest.raises(InputError, match="cannot be had for image-to-image"):
        open_pipeline(str(tmp_path), "a cat", CPU, size=(32, 16), strength=0.5)
    with pytest.raises(InputError, match="not a folder, and not on the hub"):
        open_pipeline(str(tmp_path / "none"), "a cat", CPU, size=(32, 16), strength=0.5)
