"""True walks, which a model is held against: frames, what they show, and the steps between them.

Axes: W walks, F frames of each, S steps, C channels, h w latents, H W pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from halfstep.autoencoders import Autoencoder, to_pixels
from halfstep.data.base import contiguous_runs
from halfstep.data.frames import FrameReader
from halfstep.data.navigation import local_steps
from halfstep.data.toy_world import PLAYGROUND_SIZE, playground, render, walk
from halfstep.errors import InputError

PLACES = 64  # of a walk, at which a model is asked for the next frame
_SEED = 2024  # of the toy world's walks, which nothing is trained on
_BATCH = 32  # pictures that an autoencoder takes at a time

Float = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Truth:
    """`latents` [W, F, C, h, w] of true frames and their `pixels` [W, F, 3, H, W] in [-1, 1], fp32. `moved` [W, S, 3]:
    step s leads from frame s to the next, in meters forward and to the left and radians to the left. There are more
    steps than frames: walks of a model go on where the true ones end. `context_size`: frames that a prediction follows
    from."""

    latents: torch.Tensor
    pixels: torch.Tensor
    moved: Float
    context_size: int

    @property
    def walks(self) -> int:
        return len(self.latents)

    @property
    def places(self) -> int:
        """Of each walk: place p has its context in frames p to p + context_size - 1."""
        return self.latents.shape[1] - self.context_size

    def context(self, place: int) -> torch.Tensor:
        return self.latents[:, place : place + self.context_size]


def toy_truth(
    autoencoder: Autoencoder, context_size: int, *, walks: int, frames: int, device: torch.device, places: int = PLACES
) -> Truth:
    """Walks through the toy world's playground, rendered and encoded by `autoencoder`; with steps for walks of `frames`
    frames."""
    world, shown = playground(), context_size + places
    paths = [
        walk(world, max(shown, context_size + frames), np.random.default_rng((_SEED, number)), play=True)
        for number in range(walks)
    ]
    pictures = [
        render(world, path.position[n], float(path.yaw[n]), PLAYGROUND_SIZE) for path in paths for n in range(shown)
    ]
    pixels = to_pixels(torch.from_numpy(np.stack(pictures)))
    latents = torch.cat([autoencoder.scaled(autoencoder.encode(part).mean) for part in _batches(pixels)])
    return Truth(
        latents.view(walks, shown, *latents.shape[1:]).clone().to(device),
        pixels.view(walks, shown, *pixels.shape[1:]).to(device),
        np.stack([local_steps(path.meant, path.yaw) for path in paths]),
        context_size,
    )


def store_truth(
    reader: FrameReader,
    decode: Callable[[torch.Tensor], torch.Tensor],
    context_size: int,
    *,
    walks: int,
    frames: int,
    device: torch.device,
    places: int = PLACES,
) -> Truth:
    """The longest walks of a store; their pixels are what `decode` makes of their latents. Walks of `frames` frames
    take the steps of a true one again and again. Raises InputError when there are too few walks."""
    runs = [(key, *run) for key in reader.keys() for run in contiguous_runs(reader.numbers(key))]
    longest = sorted(runs, key=lambda run: run[1] - run[2])[:walks]
    if len(longest) < walks or longest[-1][2] - longest[-1][1] <= context_size:
        enough = sum(stop - start > context_size for _, start, stop in longest)
        raise InputError(
            f"--data-path: has {enough} walks of more than {context_size} frames without a gap; expected one for each "
            f"of {walks} seeds: give fewer --seeds, or a larger store"
        )
    shown = min(context_size + places, *(stop - start for _, start, stop in longest))
    latents, moved = [], []
    for key, start, stop in longest:
        latents.append(torch.from_numpy(reader.read(key, start, start + shown)).float())
        position, yaw = reader.poses(key)
        steps = local_steps(position[start:stop], yaw[start:stop])
        moved.append(np.resize(steps, (max(shown, context_size + frames) - 1, 3)))
    held = torch.stack(latents).to(device)
    pixels = torch.cat([decode(part) for part in _batches(held.flatten(0, 1))])
    pixels = pixels.clamp(-1, 1).view(walks, shown, *pixels.shape[1:])
    return Truth(held, pixels, np.stack(moved), context_size)


def _batches(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return rows.chunk(math.ceil(len(rows) / _BATCH))
