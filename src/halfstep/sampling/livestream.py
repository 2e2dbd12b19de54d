"""Frames of `livestream` in a few Euler steps of the probability flow (Karras et al. 2022, arXiv 2206.00364, algorithm
1 without its correction).

Axes: N samples, C channels, H W latents. The state is fp32 whatever the network computes in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from halfstep.errors import InputError
from halfstep.models.livestream import denoised
from halfstep.models.objectives import EDM_SIGMA_DATA
from halfstep.sampling.cdit import Prediction
from halfstep.sampling.noise import draw
from halfstep.sampling.states import SamplerState

# For data of deviation 0.5, as DIAMOND has them (Alonso et al. 2024, arXiv 2405.12399).
_SIGMA_MIN, _SIGMA_MAX, _RHO = 2e-3, 5.0, 7.0
_MOST_STEPS = 1000


def noise_levels(steps: int, sigma_data: float = EDM_SIGMA_DATA) -> list[float]:
    """The steps + 1 noise levels of `steps` steps, the first 5 for data of deviation 0.5, the last 0 (eq. 5, rho 7).

    The last stands for 2e-3, from which eq. 5 would take a step more: it costs as much as any other and moves a picture
    by less than its 8 bits can show. Raises InputError for less than one step.
    """
    if not 1 <= steps <= _MOST_STEPS:
        raise InputError(f"steps: got {steps}; expected 1 to {_MOST_STEPS}")
    first, last = _SIGMA_MAX ** (1 / _RHO), _SIGMA_MIN ** (1 / _RHO)
    scale = sigma_data / EDM_SIGMA_DATA
    return [scale * (first + k / steps * (last - first)) ** _RHO for k in range(steps)] + [0.0]


@torch.no_grad()
def sample_livestream(
    prediction: Prediction, *, steps: int = 3, generators: Sequence[torch.Generator]
) -> Iterator[SamplerState]:
    """Frames [N, C, H, W]; yields each state with its noise level, the first noise among them.

    Each sample draws from its own CPU generator, so that it does not depend on what else is in the batch. Raises
    InputError when generators are not N, or for a number of steps that `noise_levels` refuses.
    """
    model, context = prediction.model, prediction.context
    if len(generators) != len(context):
        raise InputError(f"generators: got {len(generators)} for {len(context)} samples; give one each")
    sigmas = noise_levels(steps, model.sigma_data)
    x = sigmas[0] * draw(model.latent_shape, generators).to(context.device)
    yield SamplerState(0, 0.0, sigmas[0], x)
    for k in range(1, steps + 1):
        before, after = sigmas[k - 1 : k + 1]
        sigma = torch.full((len(x),), before, device=x.device)
        frame = denoised(prediction.network or model, x, sigma, prediction.actions, context, model.sigma_data)
        x = torch.lerp(frame, x, after / before)  # x + (after - before) (x - frame) / before
        yield SamplerState(k, float(k), after, x)
