"""Autoencoders of the diffusers library: AutoencoderKL, AutoencoderTiny and, for video, AutoencoderKLWan."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halfstep.autoencoders.base import Autoencoder, weights_sha256
from halfstep.autoencoders.hub import cached_models, hub_answers, quiet_hub
from halfstep.errors import InputError
from halfstep.spec import LatentSpec

CLASSES = ("AutoencoderKL", "AutoencoderTiny", "AutoencoderKLWan")

# What makes latents model-ready, in the configs of all classes, and the value that changes nothing.
_AFFINE = {"scaling_factor": 1.0, "shift_factor": 0.0, "latents_mean": None, "latents_std": None}


class _Encoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        encoded = self.vae.encode(pixels)
        if hasattr(encoded, "latent_dist"):
            return encoded.latent_dist.mean, encoded.latent_dist.logvar
        latents: torch.Tensor = encoded.latents
        return latents


class _Decoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        pixels: torch.Tensor = self.vae.decode(latents).sample
        return pixels


def from_diffusers(identifier: str, revision: str | None = None, *, tiled: bool = False) -> Autoencoder:
    """Load by hub id or local folder, from its root or from its `vae` subfolder (a whole pipeline).

    The library's scaling and shift factor, or its mean and standard deviation a channel, become the spec's scale and
    shift. `tiled` lets the library encode and decode large pictures in overlapping tiles. Raises InputError when it
    cannot be found, is of another class, or has a config that says how to scale in a way that is not known.
    """
    import diffusers

    config, subfolder, offline = _load_config(identifier, revision)
    name = config.get("_class_name")
    if name not in CLASSES:
        raise InputError(f"{identifier}: is a {name}; expected one of {', '.join(CLASSES)}")
    try:
        with quiet_hub():
            vae = getattr(diffusers, name).from_pretrained(
                identifier,
                revision=revision,
                subfolder=subfolder,
                local_files_only=offline,
                torch_dtype=torch.float32,
                low_cpu_mem_usage=False,  # its other way needs accelerate
            )
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{identifier}: its weights cannot be loaded ({reason})") from error
    if tiled:
        vae.enable_tiling()
    vae.eval()
    spec = _spec(
        identifier, config.get("_commit_hash") or vae.config.get("_commit_hash") or revision or "", config, vae
    )
    reload = partial(from_diffusers, identifier, revision, tiled=tiled)
    # Wan's causal convolutions pass frames on through the module itself.
    return Autoencoder(
        spec,
        _Encoder(vae),
        _Decoder(vae),
        reload,
        reentrant=name != "AutoencoderKLWan",
        variational=name != "AutoencoderTiny",
    )


def _spec(identifier: str, revision: str, config: dict[str, Any], vae: Any) -> LatentSpec:
    """`config` is the file's, which may say more than the class knows."""
    digest = weights_sha256(vae)
    if type(vae).__name__ == "AutoencoderKLWan":
        channels, spatial, temporal = (
            vae.config.z_dim,
            vae.config.scale_factor_spatial,
            vae.config.scale_factor_temporal,
        )
    else:
        widths = "encoder_block_out_channels" if "encoder_block_out_channels" in vae.config else "block_out_channels"
        channels, spatial, temporal = vae.config.latent_channels, 2 ** (len(vae.config[widths]) - 1), 1
    scale, shift = _affine(identifier, config, vae)
    return LatentSpec(
        identifier,
        channels=channels,
        spatial_factor=spatial,
        temporal_factor=temporal,
        scale=scale,
        shift=shift,
        weights_sha256=digest,
        revision=revision,
    )


def _affine(identifier: str, config: dict[str, Any], vae: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Scale and shift as the library's pipelines apply them: `(raw - shift) * scale`.

    Raises InputError when the config says something of them that the pipelines of this class would leave out.
    """
    known = inspect.signature(type(vae).__init__).parameters
    for name, neutral in _AFFINE.items():
        if name not in known and config.get(name) not in (None, neutral):
            raise InputError(f"{identifier}: its config has a {name}, which {type(vae).__name__} does not apply")
    factor = float(vae.config.get("scaling_factor", 1.0))
    constant = float(vae.config.get("shift_factor") or 0.0)
    mean, std = (vae.config.get(name) for name in ("latents_mean", "latents_std"))
    if mean is None and std is None:
        return (factor,), (constant,)
    if mean is None or std is None or constant:
        found = ", ".join(name for name in _AFFINE if config.get(name) is not None)
        raise InputError(
            f"{identifier}: its config has {found}; expected latents_mean and latents_std together, and no "
            "shift_factor beside them"
        )
    channels = vae.config.z_dim if "z_dim" in vae.config else vae.config.latent_channels
    if len(mean) != channels or len(std) != channels or not all(std):
        raise InputError(
            f"{identifier}: its config has {len(mean)} of latents_mean and {len(std)} of latents_std; expected "
            f"{channels}, one a channel, and no deviation of 0"
        )
    return tuple(factor / deviation for deviation in std), tuple(float(value) for value in mean)


def _load_config(identifier: str, revision: str | None) -> tuple[dict[str, Any], str | None, bool]:
    """Config, the subfolder it was found in, and whether only this machine's files can be had."""
    from diffusers import AutoencoderKL

    is_folder = Path(identifier).is_dir()
    offline = is_folder or not hub_answers(identifier, revision, _local_alternatives())
    for subfolder in (None, "vae"):
        try:
            with quiet_hub():
                config = AutoencoderKL.load_config(
                    identifier, revision=revision, subfolder=subfolder, local_files_only=offline
                )
        except (OSError, ValueError):
            continue  # the next place may have it; when none does, the line below says so
        if "_class_name" in config and not config["_class_name"].endswith("Pipeline"):
            return config, subfolder, offline
    if is_folder:
        raise InputError(f"{identifier}: no autoencoder here; expected a diffusers config.json or the files of taef2")
    raise InputError(f"{identifier}: {'no network' if offline else 'no autoencoder in it'}; {_local_alternatives()}")


def _local_alternatives() -> str:
    return f"available here: {', '.join(['dct8', *cached_models()])}, or the folder of an autoencoder on disk"
