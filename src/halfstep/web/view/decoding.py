"""Latents as pictures of what they show: autoencoders are loaded once and kept, and one picture is made at a time."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from halfstep.errors import HalfstepError, InputError
from halfstep.spec import LatentSpec
from halfstep.web.view.pictures import Array, Kept, png

if TYPE_CHECKING:
    from halfstep.autoencoders import Autoencoder

_LOADED = 2  # autoencoders at once
_FRAME_BYTES = 64 << 20


class Decoder:
    """Decodes latents with the autoencoder that their `LatentSpec` names, or `named` where it names none."""

    def __init__(self, named: str | None = None) -> None:
        self._named = named
        self._loaded: Kept[Autoencoder | str] = Kept(_LOADED)
        self._frames: Kept[Array] = Kept(_FRAME_BYTES, lambda frames: int(frames.nbytes))
        self._lock = threading.Lock()

    def why_not(self, spec: LatentSpec | None, channels: int) -> str | None:
        """Why latents of `channels` channels cannot be decoded; None when they can be."""
        try:
            self._autoencoder(spec, channels)
        except HalfstepError as error:
            return str(error)
        return None

    def picture(self, key: tuple[Any, ...], latent: Array, spec: LatentSpec | None, t: int) -> bytes:
        """What a model-ready latent [C, (T,) H, W] shows at its time `t`, as a PNG. `key` tells the latent from all
        others. Raises InputError when it cannot be decoded."""
        if latent.ndim not in (3, 4):
            raise InputError(f"latent: got shape {list(latent.shape)}; expected [C, H, W] or [C, T, H, W]")
        times = latent.shape[1] if latent.ndim == 4 else 1
        t = min(t, times - 1)
        if self._autoencoder(spec, len(latent)).spec.temporal_factor == 1:
            return png(self._frames.get((key, spec, t), lambda: self._decode(_at(latent, t), spec))[0])
        frames = self._frames.get((key, spec), lambda: self._decode(latent, spec))
        return png(frames[t * (len(frames) - 1) // max(1, times - 1)])

    def _decode(self, latent: Array, spec: LatentSpec | None) -> Array:
        """uint8 [frames, height, width, 3] of a latent [C, H, W], or [C, T, H, W] of an autoencoder over time."""
        import torch

        autoencoder = self._autoencoder(spec, len(latent))
        if not np.isfinite(latent).all():
            raise InputError(f"latent: {np.count_nonzero(~np.isfinite(latent))} of its values are not finite")
        values = torch.from_numpy(np.array(latent, np.float32)).unsqueeze(0)  # a copy: it may be a file's
        with self._lock:
            pictures: Array = autoencoder.pictures(values)
        return pictures[0] if pictures.ndim == 5 else pictures

    def _autoencoder(self, spec: LatentSpec | None, channels: int) -> Autoencoder:
        # Of those that cannot be loaded the line is kept: to find out may take as long as to load them.
        with self._lock:
            found = self._loaded.get((spec, channels), lambda: self._load(spec, channels))
        if isinstance(found, str):
            raise InputError(found)
        return found

    def _load(self, spec: LatentSpec | None, channels: int) -> Autoencoder | str:
        from halfstep.autoencoders import load_for
        from halfstep.precision import PrecisionPolicy

        try:
            found = load_for(spec, channels, None if spec is not None and spec.weights_sha256 else self._named)
        except HalfstepError as error:
            return str(error)
        return found.prepared("cpu", PrecisionPolicy(), channels_last=True)  # a fifth faster for one picture


def _at(latent: Array, t: int) -> Array:
    return latent[:, t] if latent.ndim == 4 else latent
