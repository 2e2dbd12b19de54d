"""python -m halfstep.recipes.toy_clips RUN LATENTS HELD_OUT OUT: ship a video EqM of the playground, and judge it.

LATENTS is the store that it was trained on, HELD_OUT one of walks that it never saw. The weights are the run's moving
average in fp16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from scipy.linalg import sqrtm
from torch.nn.functional import avg_pool2d

from halfstep.models import Checkpoint
from halfstep.recipes.shipping import nearest, write_facts, write_weights
from halfstep.sampling import GuidedField, drive, sample_eqm
from halfstep.sampling.noise import draw, own_generator
from halfstep.store import DatasetStore

SAMPLES, UPDATES, POOLED = 64, 249, 4
_STEP_SIZE, _MOMENTUM = 0.0017, 0.3

Float64 = npt.NDArray[np.float64]


def clips(path: Path, frames: int, step: int) -> torch.Tensor:
    """Every `step`-th stretch of `frames` frames of a store: [n, C, T, h, w], fp32."""
    store = DatasetStore.open(path)
    walks = [torch.from_numpy(store.read(key)).float() for key in store.keys()]
    return torch.cat([walk.unfold(0, frames, step).permute(0, 1, 4, 2, 3) for walk in walks])


def samples(checkpoint: Checkpoint) -> torch.Tensor:
    """As `halfstep sample` makes them from seed 0: [n, C, T, h, w]."""
    network: Any = checkpoint.build()
    made = []
    for first in range(0, SAMPLES, 16):
        noise = draw(network.latent_shape, [own_generator(0, number) for number in range(first, first + 16)])
        field = GuidedField(network, torch.zeros(16, dtype=torch.long))
        made.append(drive(sample_eqm(field, noise, updates=UPDATES, step_size=_STEP_SIZE, momentum=_MOMENTUM)))
    return torch.cat(made)


def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of Gaussians through features of clips (Dowson and Landau 1982), here means over 4 x 4 latents of each frame:
    |mean - mean|^2 + tr(A + B - 2 sqrt(A B))."""
    (mean_a, cov_a), (mean_b, cov_b) = (_moments(clip) for clip in (a, b))
    root = np.real(sqrtm(cov_a @ cov_b))
    return float(np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a + cov_b - 2 * root))


def _moments(clip: torch.Tensor) -> tuple[Float64, Float64]:
    pooled = avg_pool2d(clip.transpose(1, 2).flatten(0, 1), POOLED).reshape(len(clip), -1).double().numpy()
    return pooled.mean(axis=0), np.cov(pooled, rowvar=False)


def judge(checkpoint: Checkpoint, latents: Path, held_out: Path) -> dict[str, Any]:
    """The samples' distance from held-out clips beside that of as many real ones, and whether they are copies: how far
    samples, and held-out clips, are from the nearest clip of the training."""
    frames = checkpoint.about.config["num_frames"]
    known, others = clips(latents, frames, 2), clips(held_out, frames, 7)
    made = samples(checkpoint)
    rng = np.random.default_rng(0)
    real = known[torch.from_numpy(rng.permutation(len(known))[:SAMPLES])]
    noise = torch.randn_like(real)
    return {
        "frechet_to_held_out": {
            "samples": round(frechet(made, others), 3),
            "as many real clips": round(frechet(real, others), 3),
            "noise": round(frechet(noise, others), 3),
        },
        "nearest_of_training": {
            "samples, median": round(float(np.median(nearest(made, known))), 3),
            "samples, smallest": round(float(nearest(made, known).min()), 3),
            "held-out clips, median": round(float(np.median(nearest(others[:: len(others) // SAMPLES], known))), 3),
        },
    }


def main(run: Path, latents: Path, held_out: Path, output: Path) -> None:
    """Write the folder OUTPUT: model.safetensors and facts.json."""
    checkpoint = write_weights(run, output)
    write_facts(run, output, checkpoint, judge(checkpoint, latents, held_out))


if __name__ == "__main__":
    typer.run(main)
