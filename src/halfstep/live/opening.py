"""Which world is walked through: the shipped one, or one of a checkpoint's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from halfstep.autoencoders import load_for
from halfstep.data.frames import open_latents, windows
from halfstep.data.navigation import waypoint_spacing
from halfstep.data.toy_world import STEP_METRES, TURN
from halfstep.errors import InputError
from halfstep.live.walks import WalkModel
from halfstep.models import read_checkpoint
from halfstep.shipped import shipped

STARTS = "starts.npz"
_STARTS = 64  # contexts of a store that walks may begin with


def open_walk(
    ckpt: Path | None,
    device: torch.device,
    *,
    data_path: Path | None = None,
    autoencoder: str | None = None,
    spacing: float | None = None,
) -> WalkModel:
    """The shipped world without `ckpt`; otherwise that of a network that takes actions, whose walks begin with frames
    of the store `data_path`. Raises InputError when the network takes none, or nothing says where to begin."""
    if ckpt is None:
        folder = shipped("cdit")
        checkpoint = read_checkpoint(folder)
        with np.load(folder / STARTS) as arrays:
            starts = torch.from_numpy(arrays["latents"]).float()
        known = checkpoint.about.latents
        return WalkModel(
            checkpoint,
            load_for(known, starts.shape[2]),
            starts,
            device,
            step=STEP_METRES,
            turn=TURN,
            spacing=waypoint_spacing(None, checkpoint.about.spacing),
        )
    checkpoint = read_checkpoint(ckpt)
    about = checkpoint.about
    if about.family.items != "walks":
        raise InputError(f"{ckpt}: is of {about.name}, which takes no actions; expected a model of walks")
    if data_path is None:
        raise InputError(
            "--data-path: not given; a walk begins with frames of a store like the one that was trained on"
        )
    meters = waypoint_spacing(spacing, about.spacing)
    config: dict[str, Any] = about.config
    reader, spec = open_latents(data_path, config["in_channels"], about.latents)
    found = windows(reader, config["context_size"])
    chosen = [found[int(n)] for n in np.linspace(0, len(found) - 1, min(_STARTS, len(found)))]
    contexts = [reader.read(key, first, first + config["context_size"]) for key, first in chosen]
    return WalkModel(
        checkpoint,
        load_for(spec, config["in_channels"], autoencoder),
        torch.from_numpy(np.stack(contexts)).float(),
        device,
        step=meters,
        spacing=meters,
    )
