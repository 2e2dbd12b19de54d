"""What needs no download and no weights.

dct8: a fixed, orthonormal 8x8 cosine codec with 16 channels, exact up to what it drops. pixels: nothing is changed.

Each 8x8 block of dct8 is turned to three orthonormal color axes (Ohta, Kanade and Sakai 1980: intensity, red-blue,
green) and transformed by the two-dimensional DCT-II. Kept are the coefficients with u + v <= 3 of the intensity and u +
v <= 1 of the two color axes.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from halfstep.autoencoders.base import Autoencoder, weights_sha256
from halfstep.spec import LatentSpec

BLOCK = 8
_AXES = torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64)
_KEPT_ORDERS = (3, 1, 1)  # the largest u + v kept on each color axis

# One over the standard deviation of each coefficient over scikit-image's photographs at 256 pixels, so that scaled
# latents have about unit variance.
_SCALE = (0.167, 0.84, 0.901, 1.68, 1.75, 1.92, 2.86, 2.62, 2.71, 3.26, 0.35, 2.59, 2.68, 1.07, 7.67, 8.06)


def _basis() -> torch.Tensor:
    """Orthonormal rows [16, 3, 8, 8] in float64."""
    position = torch.arange(BLOCK, dtype=torch.float64)
    frequency = position[:, None]
    cosines = torch.cos(math.pi * (2 * position + 1) * frequency / (2 * BLOCK)) * math.sqrt(2 / BLOCK)
    cosines[0] /= math.sqrt(2)
    axes = _AXES / _AXES.norm(dim=1, keepdim=True)
    rows = [
        axes[axis, :, None, None] * cosines[v][:, None] * cosines[u][None, :]
        for axis, order in enumerate(_KEPT_ORDERS)
        for total in range(order + 1)
        for v in range(total + 1)
        for u in [total - v]
    ]
    return torch.stack(rows)


class _Analysis(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("basis", _basis().float())

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(pixels, self.basis, stride=BLOCK)  # type: ignore[arg-type]


class _Synthesis(_Analysis):
    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv_transpose2d(latents, self.basis, stride=BLOCK)  # type: ignore[arg-type]


def dct8() -> Autoencoder:
    """The built-in codec. Pixels [B, 3, H, W] in [-1, 1], H and W divisible by 8; latents [B, 16, H/8, W/8]."""
    encoder, decoder = _Analysis().eval(), _Synthesis().eval()
    spec = LatentSpec("dct8", 16, BLOCK, scale=_SCALE, weights_sha256=weights_sha256(encoder))
    return Autoencoder(spec, encoder, decoder, reload=dct8)


def pixels() -> Autoencoder:
    """No codec: the latents [B, 3, H, W] are the pixels, in [-1, 1]."""
    encoder, decoder = nn.Identity(), nn.Identity()
    return Autoencoder(LatentSpec("pixels", 3, 1, weights_sha256=weights_sha256(encoder)), encoder, decoder, pixels)
