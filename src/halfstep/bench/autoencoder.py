"""An autoencoder that is not downloaded: Stable Diffusion's architecture, with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch


@torch.random.fork_rng(devices=[])
def sd_vae_shaped(folder: Path, channels: Sequence[int] = (128, 256, 512, 512)) -> str:
    """Save an AutoencoderKL with random weights and so many `channels` at its four levels; the folder."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=tuple(channels),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        scaling_factor=0.18215,
    ).save_pretrained(folder)
    return str(folder)
