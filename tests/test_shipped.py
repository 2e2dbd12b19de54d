"""What is shipped is what its facts say, small, and better than nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from halfstep.autoencoders import load_autoencoder, to_pixels
from halfstep.config import load_yaml
from halfstep.data.toy_world import PLAYGROUND_SIZE, playground, render, walk
from halfstep.models import read_checkpoint
from halfstep.shipped import shipped
from halfstep.train.config import TrainConfig

FOLDERS = ("autoencoder", "cdit", "eqm")


def test_it_is_small() -> None:
    sizes = {name: sum(path.stat().st_size for path in shipped(name).rglob("*") if path.is_file()) for name in FOLDERS}
    assert sizes["autoencoder"] < 1e6 and sum(sizes.values()) < 15e6


def test_the_autoencoder_shows_the_playground() -> None:
    facts = json.loads((shipped("autoencoder") / "facts.json").read_text())
    rng, world = np.random.default_rng(5), playground()
    walked = walk(world, 40, rng, play=True)
    shown = range(0, 40, 5)
    frames = np.stack([render(world, walked.position[k], float(walked.yaw[k]), PLAYGROUND_SIZE) for k in shown])
    autoencoder = load_autoencoder("toy")
    latents = autoencoder.scaled(autoencoder.encode(to_pixels(torch.from_numpy(frames))).mean)
    error = np.mean((autoencoder.pictures(latents).astype(float) - frames) ** 2)
    assert 10 * np.log10(255**2 / error) > facts["psnr"] - 4
    assert autoencoder.spec.autoencoder == "toy" and latents.std() == pytest.approx(1, abs=0.35)
    assert autoencoder.reload().spec == autoencoder.spec


@pytest.mark.parametrize("name", ["cdit", "eqm"])
def test_networks_are_of_the_toy_autoencoders_latents(name: str) -> None:
    checkpoint = read_checkpoint(shipped(name))
    assert checkpoint.about.latents is not None and checkpoint.about.latents.autoencoder == "toy"
    assert checkpoint.about.latents.weights_sha256 == load_autoencoder("toy").spec.weights_sha256
    facts = json.loads((shipped(name) / "facts.json").read_text())
    assert facts["parameters"] == sum(value.numel() for value in checkpoint.weights.values())
    assert all(value.dtype == torch.float16 for value in checkpoint.weights.values())


@pytest.mark.parametrize("name", ["cdit", "eqm"])
def test_the_recipe_is_that_of_the_network(name: str) -> None:
    recipe = load_yaml(shipped(name) / "train.yaml", TrainConfig)
    about = read_checkpoint(shipped(name)).about
    facts = json.loads((shipped(name) / "facts.json").read_text())
    assert recipe.steps == facts["steps"]
    assert about.latents is not None and about.latents.pixels is not None
    height, width = (side // 8 for side in (about.latents.pixels.height, about.latents.pixels.width))
    shape = (4, *([4] if name == "eqm" else []), height, width)
    assert recipe.about(shape, about.config.get("num_classes", 0)).config == about.config


def test_the_walker_is_better_than_a_world_that_stands_still() -> None:
    psnr = json.loads((shipped("cdit") / "facts.json").read_text())["psnr_by_frames_ahead"]
    ahead = [ours - kept for ours, kept in zip(psnr["predicted"], psnr["last frame kept"], strict=True)]
    assert ahead[0] > 2 and min(ahead) > 0


def test_the_guide_says_what_the_facts_say() -> None:
    guide = (Path(__file__).parents[1] / "docs" / "guides" / "live.md").read_text()
    walker, clips = (json.loads((shipped(name) / "facts.json").read_text()) for name in ("cdit", "eqm"))
    psnr, nearest = walker["psnr_by_frames_ahead"], clips["nearest_of_training"]
    for figure in (
        *(f"{psnr[name][0]:.1f} dB" for name in psnr),
        f"{psnr['predicted'][-1]:.1f} dB",
        f"{psnr['last frame kept'][-1]:.1f} dB",
        f"({nearest['samples, median']:.2f}, median of the nearest)",
        f"({nearest['held-out clips, median']:.2f})",
        f"clips is {clips['frechet_to_held_out']['samples']:.0f},",
        f"have {clips['frechet_to_held_out']['as many real clips']:.0f} and",
        f"{walker['steps']} steps",
        f"{clips['steps']} steps",
    ):
        assert figure in " ".join(guide.split()), figure
