"""A flow whose denoiser is known in closed form, for demonstrations and benchmarks: no network, real sampling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from halfstep.sampling.states import SamplerState


@dataclass(frozen=True)
class ToyFlow:
    """Clean latents are a mixture of Gaussians around `centers` [n, C, (T,) H, W], each with standard deviation
    `spread`; states are x = (1 - sigma) * clean + sigma * noise, for sigma from 1 to 0."""

    centers: torch.Tensor
    spread: float = 0.15

    def denoise(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """E[clean | x], of x's shape."""
        variance = ((1 - sigma) * self.spread) ** 2 + sigma**2
        difference = x - (1 - sigma) * self.centers
        weights = torch.softmax(-difference.flatten(1).square().sum(dim=1) / (2 * variance), dim=0)
        posterior = self.centers + (1 - sigma) * self.spread**2 / variance * difference
        mixed: torch.Tensor = torch.tensordot(weights, posterior, dims=1)
        return mixed

    def sample(self, seed: int, *, steps: int = 24, shift: float = 3.0) -> Iterator[SamplerState]:
        """Solve dx/dsigma = noise - clean from noise to data by Euler's method (Lipman et al. 2023, eq. 23), for one
        sample, and yield each state: `drive` takes it to its end.

        `shift` makes the noisy steps smaller, as video models do (Esser et al. 2024, eq. 23). The same seed gives the
        same sample.
        """
        even = torch.linspace(1, 0, steps + 1)
        sigmas = (shift * even / (1 + (shift - 1) * even)).tolist()
        x = torch.randn(self.centers.shape[1:], generator=torch.Generator().manual_seed(seed))
        yield SamplerState(0, 1000.0, 1.0, x[None])
        for k, (sigma, following) in enumerate(pairwise(sigmas), start=1):
            x = x + (following - sigma) * (x - self.denoise(x, sigma)) / sigma
            yield SamplerState(k, 1000 * following, following, x[None])


def smooth_field(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A smooth random latent [C, (T,) H, W] of unit variance, a quarter of the resolution blown up."""
    coarse = torch.randn((1, shape[0], *(max(2, n // 4) for n in shape[1:])), generator=generator)
    field = torch.nn.functional.interpolate(
        coarse, shape[1:], mode="trilinear" if len(shape) == 4 else "bilinear", align_corners=True
    )[0]
    return field / field.std()
