"""Pixels to latents within the training loop, for data that is not encoded yet.

Axes: B items, K frames of a walk, C channels, T frames of a clip, H W pixels or latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from halfstep.autoencoders import Autoencoder, Posterior, encode_gate
from halfstep.engine import Gate
from halfstep.precision import PrecisionPolicy


@dataclass(frozen=True)
class PixelEncoder:
    """Items that are pixels become model-ready latents, a fresh sample of the posterior each time. `clips`: items are
    clips [B, C, T, H, W], and not walks [B, K, C, H, W]. Samples that bf16 spoils are computed again in fp32 by the
    gate, once there is one."""

    autoencoder: Autoencoder
    clips: bool
    gate: Gate

    @classmethod
    def on(
        cls,
        autoencoder: Autoencoder,
        clips: bool,
        device: torch.device | None = None,
        policy: PrecisionPolicy | None = None,
    ) -> PixelEncoder:
        """On `device`, in bf16 where the training's `policy` computes in it, else in fp32: autoencoders overflow
        fp16."""
        place = device or torch.device("cpu")
        half = policy is not None and policy.compute == "bf16"
        own = PrecisionPolicy.parse("bf16-true" if half else "fp32")
        if device is not None:
            autoencoder = autoencoder.prepared(device, own)
        return cls(autoencoder, clips, encode_gate(autoencoder, own, place))

    def moved(self, device: torch.device, policy: PrecisionPolicy) -> PixelEncoder:
        """The same on a device, in the precision of a training."""
        return PixelEncoder.on(self.autoencoder, self.clips, device, policy)

    def __call__(self, items: torch.Tensor) -> torch.Tensor:
        """Latents of items [B, C, H, W], clips or walks. Those that cannot be had in fp32 either are not finite."""
        if self.autoencoder.spec.temporal_factor > 1:
            return self._encoded(items)
        if self.clips:
            pictures = self._encoded(items.transpose(1, 2).flatten(0, 1))
            return pictures.reshape(len(items), -1, *pictures.shape[1:]).transpose(1, 2)
        if items.dim() == 5:
            frames = self._encoded(items.flatten(0, 1))
            return frames.reshape(*items.shape[:2], *frames.shape[1:])
        return self._encoded(items)

    @torch.no_grad()
    def _encoded(self, pixels: torch.Tensor) -> torch.Tensor:
        drawn = Posterior(*(tensor.float() for tensor in self.gate(pixels).outputs)).draw()
        # A tensor of inference mode cannot take part in a gradient, a clone of it can.
        return self.autoencoder.scaled(drawn).clone()
