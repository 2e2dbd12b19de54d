"""What is minimized. Noise, targets and losses are fp32 whatever the network computes in; losses are one a sample.

Axes: N samples, C channels, then what a latent has: (T,) H, W.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

TIMESTEPS = 1000  # of the diffusion, with betas from 1e-4 to 0.02
# What a diffusion network predicts. "noise", as published, on the schedule as it is; "velocity" (Salimans and Ho 2022,
# "Progressive Distillation", app. D) on one that ends in pure noise.
Predicted = Literal["noise", "velocity"]


def with_history_noise(context: torch.Tensor, most: float, deviation: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Context [N, K, C, H, W], fp32, with noise in all of a sample's frames, and its level [N], drawn between 0 and
    `most` in units of the data's `deviation`: a network that goes on from frames of its own must bear their faults
    (Valevski et al. 2024, "GameNGen", arXiv 2408.14837, section 3.2.1)."""
    level = most * torch.rand(len(context), device=context.device)
    noise = torch.randn_like(context) * deviation * level.reshape(-1, 1, 1, 1, 1)
    return context + noise, level


# --- Equilibrium Matching (arXiv 2510.02300) --------------------------------------------------------------------------


def gradient_magnitude(gamma: torch.Tensor) -> torch.Tensor:
    """c(gamma) = 4 min(1, 5 (1 - gamma)): the field vanishes at the data (truncated decay, eq. 8 with a = 0.8)."""
    return 4 * torch.clamp(5 * (1 - gamma), max=1)


def eqm_loss(
    model: nn.Module,
    x1: torch.Tensor,
    y: torch.Tensor,
    *,
    x0: torch.Tensor | None = None,
    gamma: torch.Tensor | None = None,
    dispersive_weight: float = 0.0,
) -> torch.Tensor:
    """Mean squared error [N] of the field at x_gamma = gamma x1 + (1 - gamma) x0 against c(gamma) (x1 - x0).

    x1: data [N, C, (T,) H, W]; y: labels [N]; x0: noise and gamma: [N] in [0, 1), drawn when not given. With
    `dispersive_weight`, that times the dispersive loss of the last block's tokens is added to each sample.
    """
    x1 = x1.float()
    x0 = torch.randn_like(x1) if x0 is None else x0.float()
    gamma = torch.rand(len(x1), device=x1.device) if gamma is None else gamma.float()
    share = gamma.reshape(-1, *[1] * (x1.dim() - 1))
    x_gamma = torch.lerp(x0, x1, share)
    target = gradient_magnitude(share) * (x1 - x0)
    if dispersive_weight == 0:
        return _squared_error(model(x_gamma, gamma, y), target)
    network: Any = getattr(model, "module", model)  # what a distributed wrapper holds
    tokens: list[torch.Tensor] = []
    hook = network.blocks[-1].register_forward_hook(lambda _, __, output: tokens.append(output))
    try:
        field = model(x_gamma, gamma, y)
    finally:
        hook.remove()
    return _squared_error(field, target) + dispersive_weight * dispersive_loss(tokens[0])


def _squared_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over each sample, fp32 [N]."""
    return (output.float() - target).square().flatten(1).mean(dim=1)


def dispersive_loss(z: torch.Tensor) -> torch.Tensor:
    """log mean_ij exp(-|z_i - z_j|^2 / D) over all pairs of samples, of activations z [N, ...] with D numbers each.

    A scalar, lower the further samples lie apart (Wang and He 2025, "Diffuse and Disperse"); published with the weight
    0.5.
    """
    flat = z.float().flatten(1)
    squared = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist").square() / flat.shape[1]
    return torch.logsumexp(-squared.flatten(), dim=0) - math.log(squared.numel())


# --- Diffusion with a learned range of variances ----------------------------------------------------------------------


def _betas(predicted: Predicted) -> np.ndarray:
    """[1000] in fp64; of "velocity" those of an abar that is moved and scaled to end at 0, a signal-to-noise ratio of
    zero (Lin et al. 2024, arXiv 2305.08891, alg. 1). Noise cannot be predicted there: it is the input."""
    betas = np.linspace(1e-4, 0.02, TIMESTEPS, dtype=np.float64)
    if predicted == "noise":
        return betas
    root = np.sqrt(np.cumprod(1 - betas))
    bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return np.asarray(1 - bar / np.append(1.0, bar[:-1]))


@cache
def _schedule(device: torch.device, predicted: Predicted) -> dict[str, torch.Tensor]:
    """Coefficients [1000] by timestep, computed in fp64 (Ho et al. 2020, section 3; Nichol and Dhariwal 2021)."""
    betas = _betas(predicted)
    bar = np.cumprod(1 - betas)
    bar_before = np.append(1.0, bar[:-1])
    posterior = betas * (1 - bar_before) / (1 - bar)
    coefficients = {
        "sqrt_bar": np.sqrt(bar),
        "sqrt_one_minus_bar": np.sqrt(1 - bar),
        "snr": bar / (1 - bar),
        "log_beta": np.log(betas),
        # The posterior's variance is zero at the first timestep, which takes that of the second.
        "log_posterior": np.log(np.append(posterior[1], posterior[1:])),
        "mean_of_start": betas * np.sqrt(bar_before) / (1 - bar),
        "mean_of_now": (1 - bar_before) * np.sqrt(1 - betas) / (1 - bar),
    }
    return {name: torch.from_numpy(values).float().to(device) for name, values in coefficients.items()}


def diffusion_loss(
    model: nn.Module,
    x_start: torch.Tensor,
    *condition: torch.Tensor,
    t: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    predicted: Predicted = "noise",
    min_snr: float | None = None,
) -> torch.Tensor:
    """Loss [N] of a network that predicts noise or velocity, and a variance: L_simple + L_vlb (Nichol and Dhariwal
    2021, eq. 16, with the weight of 1000 timesteps taken into bits a number).

    x_start: latents [N, C, H, W]; the network is called as model(x_t, t, *condition) and returns [N, 2 C, H, W]; t: [N]
    timesteps 0 to 999 and noise: drawn when not given. With `min_snr` L_simple counts as an error of x_start with the
    weight min(SNR, min_snr) (Hang et al. 2023, arXiv 2303.09556, eq. 8; 5 there).
    """
    x_start = x_start.float()
    t = torch.randint(TIMESTEPS, (len(x_start),), device=x_start.device) if t is None else t
    noise = torch.randn_like(x_start) if noise is None else noise.float()
    shape = (-1, *[1] * (x_start.dim() - 1))
    at = {name: values[t].reshape(shape) for name, values in _schedule(x_start.device, predicted).items()}
    x_t = at["sqrt_bar"] * x_start + at["sqrt_one_minus_bar"] * noise
    output, variance = model(x_t, t, *condition).float().chunk(2, dim=1)
    if predicted == "noise":
        target, start = noise, (x_t - at["sqrt_one_minus_bar"] * output.detach()) / at["sqrt_bar"]
    else:
        target = at["sqrt_bar"] * noise - at["sqrt_one_minus_bar"] * x_start
        start = at["sqrt_bar"] * x_t - at["sqrt_one_minus_bar"] * output.detach()
    simple = _squared_error(output, target)
    if min_snr is not None:
        snr = at["snr"].flatten()
        # An error of x_start is one of noise over SNR, and one of velocity over 1 + SNR.
        simple = simple * snr.clamp(max=min_snr) / (snr if predicted == "noise" else snr + 1)
    return simple + _variational_bound(start, variance, x_start, x_t, t, at)


def _variational_bound(
    start: torch.Tensor,
    variance: torch.Tensor,
    x_start: torch.Tensor,
    x_t: torch.Tensor,
    t: torch.Tensor,
    at: dict[str, torch.Tensor],
) -> torch.Tensor:
    """L_t in bits a number [N] (Ho et al. 2020, eq. 5). `start`, x_start as it was predicted, is detached: this trains
    the variance alone."""
    mean = at["mean_of_start"] * start + at["mean_of_now"] * x_t
    # Nichol and Dhariwal 2021, eq. 15, with the network's output from -1 to 1.
    log_variance = torch.lerp(at["log_posterior"], at["log_beta"], (variance + 1) / 2)
    true_mean = at["mean_of_start"] * x_start + at["mean_of_now"] * x_t
    divergence = 0.5 * (
        log_variance
        - at["log_posterior"]
        - 1
        + torch.exp(at["log_posterior"] - log_variance)
        + (true_mean - mean).square() * torch.exp(-log_variance)
    )
    likelihood = -_discretized_log_likelihood(x_start, mean, 0.5 * log_variance)
    terms = torch.where(t.reshape(-1, *[1] * (x_start.dim() - 1)) == 0, likelihood, divergence)
    return terms.flatten(1).mean(dim=1) / math.log(2)


def _discretized_log_likelihood(x: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """Log probability of the bin of width 2/255 around x in [-1, 1] under a Gaussian (Ho et al. 2020, eq. 13), with the
    tanh approximation of its distribution function as published."""

    def cumulative(value: torch.Tensor) -> torch.Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))

    centered, inverse = x - mean, torch.exp(-log_scale)
    above = cumulative(inverse * (centered + 1 / 255))
    below = cumulative(inverse * (centered - 1 / 255))
    inner = torch.log((above - below).clamp(min=1e-12))
    lowest, highest = torch.log(above.clamp(min=1e-12)), torch.log((1 - below).clamp(min=1e-12))
    return torch.where(x < -0.999, lowest, torch.where(x > 0.999, highest, inner))


# --- Denoising in few steps (Karras et al. 2022, arXiv 2206.00364, "EDM") ---------------------------------------------

# Of ln sigma in training, for data of deviation 0.5. Table 1 has a mean of -1.2, for sigmas up to 80 in many steps: few
# steps begin at 5, which that hardly trains. DIAMOND (Alonso et al. 2024, arXiv 2405.12399) has this one.
EDM_MEAN, EDM_DEVIATION = -0.4, 1.2
EDM_SIGMA_DATA = 0.5


@dataclass(frozen=True)
class Preconditioning:
    """Table 1's scalings for noise levels `sigma` [N], fp32, each [N, 1, 1, 1] but `noise` [N]: the denoised data are
    skip x + out F(in x, noise), where input and target of the network F have variance 1 for data of variance
    `sigma_data` squared. In fp32 whatever F computes in: at small sigma the result is nearly x itself."""

    sigma: torch.Tensor
    sigma_data: float

    @property
    def skip(self) -> torch.Tensor:
        return self.sigma_data**2 / self._variance

    @property
    def out(self) -> torch.Tensor:
        return self._sigma * self.sigma_data / self._variance.sqrt()

    @property
    def into(self) -> torch.Tensor:
        return 1 / self._variance.sqrt()

    @property
    def noise(self) -> torch.Tensor:
        return self.sigma.float().log() / 4

    @property
    def _sigma(self) -> torch.Tensor:
        return self.sigma.float().reshape(-1, 1, 1, 1)

    @property
    def _variance(self) -> torch.Tensor:
        return self._sigma**2 + self.sigma_data**2


def edm_denoised(
    model: Callable[..., torch.Tensor],
    x: torch.Tensor,
    sigma: torch.Tensor,
    sigma_data: float,
    *condition: torch.Tensor,
) -> torch.Tensor:
    """The data [N, C, H, W], fp32, that x of noise levels sigma [N] are thought to be (eq. 7); the network is called as
    model(in x, noise, *condition)."""
    at = Preconditioning(sigma, sigma_data)
    x = x.float()
    return at.skip * x + at.out * model(at.into * x, at.noise, *condition).float()


def edm_loss(
    model: Callable[..., torch.Tensor],
    y: torch.Tensor,
    *condition: torch.Tensor,
    sigma_data: float = EDM_SIGMA_DATA,
    sigma: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
) -> torch.Tensor:
    """Loss [N] of a network of `edm_denoised` for data y [N, C, H, W]: the error of what is denoised, with the weight
    lambda = 1 / out^2 of table 1, is that of the network itself (eq. 8), which is computed here as it loses no digits.

    sigma: [N] and noise, normal of y's shape: drawn when not given, sigma log-normally.
    """
    y = y.float()
    if sigma is None:
        sigma = (EDM_MEAN + EDM_DEVIATION * torch.randn(len(y), device=y.device)).exp() * sigma_data / EDM_SIGMA_DATA
    noise = torch.randn_like(y) if noise is None else noise.float()
    at, level = Preconditioning(sigma, sigma_data), sigma.float().reshape(-1, 1, 1, 1)
    # (y - skip x) / out, without what cancels at small sigma.
    target = (level * y - sigma_data**2 * noise) * at.into / sigma_data
    return _squared_error(model(at.into * (y + level * noise), at.noise, *condition), target)
