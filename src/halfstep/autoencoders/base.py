"""Autoencoder: pixels to latents and back, behind one shape of interface.

Axes: B batch, C channels, T time, H height, W width. Pixels are RGB in [-1, 1], [B, 3, H, W], or [B, 3, T, H, W] for an
autoencoder that also compresses time. Latents are unscaled, [B, C, h, w] or [B, C, t, h, w].
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from halfstep.errors import InputError
from halfstep.precision import PrecisionPolicy, prepare
from halfstep.spec import LatentSpec


class Posterior(NamedTuple):
    """What an encoder says of a latent: its mean and, for a variational one, the logarithm of its variance."""

    mean: torch.Tensor
    logvar: torch.Tensor | None = None

    def draw(self) -> torch.Tensor:
        """A fresh sample, by torch's own generator; the mean where there is no variance."""
        if self.logvar is None:
            return self.mean
        return self.mean + torch.exp(0.5 * self.logvar) * torch.randn_like(self.mean)


def to_pixels(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures [B, (T,) H, W, 3], uint8, as an autoencoder takes them: fp32 [B, 3, (T,) H, W] in [-1, 1]."""
    return pictures.movedim(-1, 1).float() / 127.5 - 1


@dataclass(frozen=True)
class Autoencoder:
    """An encoder and a decoder of one latent space.

    `encoder` maps pixels to a mean or to (mean, logvar), `decoder` latents to pixels. `reload` makes the same
    autoencoder anew in fp32, for batches that a half type spoils. An encoder that keeps state between its layers cannot
    serve two threads at once and says so in `reentrant`; one that gives a variance says so in `variational`.
    """

    spec: LatentSpec
    encoder: nn.Module
    decoder: nn.Module
    reload: Callable[[], Autoencoder]
    reentrant: bool = True
    variational: bool = False

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor) -> Posterior:
        """The posterior of `pixels`. Raises InputError when the shape does not fit the autoencoder."""
        self._require(pixels, 3, self.spec.spatial_factor, "pixels")
        result = self.encoder(pixels)
        return Posterior(*result) if isinstance(result, tuple) else Posterior(result)

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels, not clamped, of unscaled latents."""
        self._require(latents, self.spec.channels, 1, "latents")
        pixels: torch.Tensor = self.decoder(latents)
        return pixels

    def scaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Model-ready latents, `(latents - shift) * scale`."""
        shift, scale = self._affine(latents)
        return (latents - shift) * scale

    def unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of `scaled`."""
        shift, scale = self._affine(latents)
        return latents / scale + shift

    def pictures(self, latents: torch.Tensor) -> npt.NDArray[np.uint8]:
        """What model-ready latents show, rounded and clipped: [B, H, W, 3] of [B, C, h, w], or [B, T, H, W, 3]."""
        pixels = self.decode(self.unscaled(latents)).float()
        rounded = ((pixels + 1) * 127.5).round().clamp(0, 255).byte()
        shown: npt.NDArray[np.uint8] = rounded.movedim(1, -1).cpu().numpy()
        return shown

    def prepared(
        self, device: str | torch.device, policy: PrecisionPolicy, *, channels_last: bool | None = None
    ) -> Autoencoder:
        """This autoencoder on `device` in the formats of `policy` (see `prepare`), whose islands are named as in the
        network of the library; the modules are changed in place."""
        if hasattr(self.encoder, "vae"):
            policy = replace(policy, islands=tuple(f"vae.{pattern}" for pattern in policy.islands))
        encoder, decoder = (
            prepare(m.to(device).eval(), policy, channels_last=channels_last) for m in (self.encoder, self.decoder)
        )
        return replace(self, encoder=encoder, decoder=decoder)

    def _affine(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (-1,) + (1,) * (latents.dim() - 2)
        return tuple(  # type: ignore[return-value]
            torch.tensor(values, device=latents.device, dtype=latents.dtype).reshape(shape)
            for values in (self.spec.shift, self.spec.scale)
        )

    def _require(self, tensor: torch.Tensor, channels: int, factor: int, what: str) -> None:
        dims = 5 if self.spec.temporal_factor > 1 else 4
        if tensor.dim() != dims or tensor.shape[1] != channels or any(size % factor for size in tensor.shape[-2:]):
            axes = "B, C, T, H, W" if dims == 5 else "B, C, H, W"
            raise InputError(
                f"{self.spec.autoencoder}: got {what} of shape {list(tensor.shape)}; expected [{axes}] with "
                f"C = {channels} and H, W divisible by {factor}"
            )


def weights_sha256(*modules: nn.Module) -> str:
    """One digest over names, shapes and fp32 bytes of all parameters and buffers, in the order of their names."""
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {list(tensor.shape)} ".encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy())
    return digest.hexdigest()
