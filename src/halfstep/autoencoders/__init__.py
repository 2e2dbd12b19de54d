"""Autoencoders by name: those that are built in or shipped, a diffusers hub id or folder, or a folder of taef2."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from halfstep.autoencoders.base import Autoencoder, Posterior, to_pixels
from halfstep.autoencoders.gate import encode_gate
from halfstep.errors import InputError
from halfstep.shipped import shipped
from halfstep.spec import LatentSpec

__all__ = ["Autoencoder", "Posterior", "encode_gate", "load_autoencoder", "load_for", "to_pixels"]

_SHORT_NAMES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}


def load_autoencoder(identifier: str = "dct8", revision: str | None = None, *, tiled: bool = False) -> Autoencoder:
    """Load an autoencoder in fp32 on the CPU.

    `identifier` is `dct8` (built in), `pixels` (which are their own latents), `toy` (shipped: 4 channels, learned on
    the toy world's playground), a folder that holds a diffusers autoencoder or pipeline, a folder with
    `taef2_encoder.pth` and `taef2_decoder.pth`, or a hub id (`stabilityai/sd-vae-ft-ema`) with its `revision`; `ema`
    and `mse` are Stable Diffusion's two, as published trainers call them. `tiled` turns on the library's tiling, for
    pictures that do not fit in memory. Raises InputError, naming what is available locally, when it cannot be loaded.
    """
    from halfstep.autoencoders.builtin import dct8, pixels
    from halfstep.autoencoders.diffusers import from_diffusers
    from halfstep.autoencoders.tiny import ENCODER_FILE, taef2

    if identifier == "dct8":
        return dct8()
    if identifier == "pixels":
        return pixels()
    if identifier == "toy":
        loaded = from_diffusers(str(shipped("autoencoder")), None, tiled=tiled)
        spec = replace(loaded.spec, autoencoder="toy")
        return replace(loaded, spec=spec, reload=partial(load_autoencoder, "toy", tiled=tiled))
    identifier = _SHORT_NAMES.get(identifier, identifier)
    if Path(identifier).is_dir():
        identifier = str(Path(identifier).resolve())  # a store notes it down, for reruns from other folders
    if (Path(identifier) / ENCODER_FILE).is_file():
        return taef2(Path(identifier))
    if identifier == "taef2":
        raise InputError(f"taef2: give the folder that holds {ENCODER_FILE} and its decoder as the autoencoder")
    return from_diffusers(identifier, revision, tiled=tiled)


def load_for(spec: LatentSpec | None, channels: int, name: str | None = None) -> Autoencoder:
    """The autoencoder that latents of `channels` channels were made with, as `spec` says it, or the one named.

    Raises InputError when neither says it, or when it is another one than theirs.
    """
    if name is None and spec is not None and spec.weights_sha256:
        name, revision = spec.autoencoder, spec.revision or None
    elif name is not None:
        revision = None
    else:
        raise InputError("latents: nothing says which autoencoder they are of; name it with --autoencoder")
    loaded = load_autoencoder(name, revision)
    if loaded.spec.channels != channels:
        raise InputError(f"{name}: has {loaded.spec.channels} channels; the latents have {channels}")
    if spec is not None and spec.weights_sha256 not in ("", loaded.spec.weights_sha256):
        raise InputError(f"{name}: its weights are not those that the latents were made with")
    return loaded
