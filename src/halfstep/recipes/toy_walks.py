"""python -m halfstep.recipes.toy_walks RUN LATENTS HELD_OUT OUT: ship a CDiT of the playground, and judge it.

LATENTS is the store that it was trained on, HELD_OUT a folder that `halfstep toy-world --play` made with another seed
than the walks of the training. The weights are the run's moving average in fp16; starts.npz has frames of HELD_OUT to
begin walks with.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from PIL import Image

from halfstep.autoencoders import load_autoencoder, to_pixels
from halfstep.data.navigation import REL_T_FRAMES, local_steps, to_actions
from halfstep.data.pickles import load_poses
from halfstep.data.toy_world import STEP_METRES, TURN
from halfstep.data.walks import POSES_FILE
from halfstep.models import Checkpoint
from halfstep.recipes.shipping import nearest, write_facts, write_weights
from halfstep.sampling import rollout, sample_cdit
from halfstep.sampling.noise import own_generator
from halfstep.store import DatasetStore

STARTS, AHEAD, STEPS = 64, 16, 4
LONG_WALKS, LONG = 16, 512


def walks(folder: Path, context: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents [S, K, 4, h, w] to begin with, true pictures [S, 1 + AHEAD, H, W, 3] from the last of them on, uint8, and
    the actions [S, AHEAD, 3] between them, two of each walk."""
    autoencoder = load_autoencoder("toy")
    latents, pictures, actions = [], [], []
    for number in range(STARTS):
        walk = folder / f"walk_{number // 2:03d}"
        first = 4 if number % 2 == 0 else 34
        position, yaw = load_poses(walk / POSES_FILE)
        taken = range(first, first + context + AHEAD)
        frames = torch.from_numpy(np.stack([np.asarray(Image.open(walk / f"{k}.jpg")) for k in taken]))
        latents.append(autoencoder.scaled(autoencoder.encode(to_pixels(frames[:context])).mean))
        pictures.append(frames[context - 1 :])
        path = slice(first + context - 1, first + context + AHEAD)
        actions.append(torch.from_numpy(to_actions(local_steps(position[path], yaw[path]), 0.25)).float())
    return torch.stack(latents), torch.stack(pictures), torch.stack(actions)


def judge(checkpoint: Checkpoint, held_out: Path) -> dict[str, Any]:
    """PSNR (dB) against true pictures by frames ahead: of walks along the true actions in `STEPS` steps a frame, of the
    last true frame kept, and of the true frames through the autoencoder, which nobody can pass."""
    network: Any = checkpoint.build()
    autoencoder = load_autoencoder("toy")
    context, pictures, actions = walks(held_out, network.context_size)
    generators = [own_generator(0, number) for number in range(STARTS)]
    sampler = partial(sample_cdit, scheduler="dpm++", steps=STEPS, generators=generators)
    made = rollout(network, context, actions, 1 / REL_T_FRAMES, sampler)
    true = pictures[:, 1:]
    kept = pictures[:, :1].expand_as(true)
    coded = torch.stack(
        [
            torch.from_numpy(autoencoder.pictures(autoencoder.scaled(autoencoder.encode(to_pixels(p)).mean)))
            for p in true
        ]
    )
    shown = torch.stack([torch.from_numpy(autoencoder.pictures(walk)) for walk in made])
    found = {"predicted": shown, "last frame kept": kept, "through the autoencoder": coded}
    return {name: [round(value, 2) for value in _psnr(frames, true)] for name, frames in found.items()}


def long_walks(checkpoint: Checkpoint, latents: Path, held_out: Path) -> dict[str, Any]:
    """Do walks dissolve in which keys are held whatever is seen, also at walls? How far their frames of the second half
    are from the nearest frame of the training, beside frames that were never trained on, and noise."""
    network: Any = checkpoint.build()
    context, pictures, _ = walks(held_out, network.context_size)
    rng, generators = np.random.default_rng(0), [own_generator(1, number) for number in range(LONG_WALKS)]
    keys = np.stack([_held_keys(rng) for _ in range(LONG_WALKS)])
    actions = torch.from_numpy(to_actions(keys, 0.25)).float()
    sampler = partial(sample_cdit, scheduler="dpm++", steps=STEPS, generators=generators)
    made = rollout(network, context[:: STARTS // LONG_WALKS], actions, 1 / REL_T_FRAMES, sampler)
    autoencoder, store = load_autoencoder("toy"), DatasetStore.open(latents)
    known = torch.cat([torch.from_numpy(store.read(key)).float() for key in store.keys()])
    real = autoencoder.scaled(autoencoder.encode(to_pixels(pictures[:, AHEAD])).mean)
    found = {
        "walks": made[:, LONG // 2 :: LONG // 32].flatten(0, 1),
        "held-out frames": real,
        "noise": torch.randn(real.shape, generator=own_generator(2)),
    }
    return {name: round(float(np.median(nearest(frames, known))), 3) for name, frames in found.items()}


def _held_keys(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Steps [LONG, 3] in meters and radians of keys that are held for some frames each."""
    steps: list[tuple[float, float, float]] = []
    while len(steps) < LONG:
        forward, turn = rng.choice([1, 0, -1], p=[0.7, 0.15, 0.15]), rng.choice([1, 0, -1], p=[0.3, 0.4, 0.3])
        steps += [(forward * STEP_METRES, 0.0, turn * TURN)] * int(rng.geometric(0.1))
    return np.array(steps[:LONG])


def _psnr(frames: torch.Tensor, true: torch.Tensor) -> list[float]:
    """By frames ahead, of [S, AHEAD, H, W, 3]."""
    errors = (frames.float() - true.float()).square().mean(dim=(0, 2, 3, 4))
    return (10 * torch.log10(255**2 / errors)).tolist()


def main(run: Path, latents: Path, held_out: Path, output: Path) -> None:
    """Write the folder OUTPUT: model.safetensors, starts.npz and facts.json."""
    checkpoint = write_weights(run, output)
    context, _, _ = walks(held_out, checkpoint.about.config["context_size"])
    np.savez_compressed(output / "starts.npz", latents=context.half().numpy())
    judged = {
        "psnr_by_frames_ahead": judge(checkpoint, held_out),
        "nearest_of_training_after_long_walks": long_walks(checkpoint, latents, held_out),
    }
    write_facts(run, output, checkpoint, judged)


if __name__ == "__main__":
    typer.run(main)
