"""Frames of a navigation world model (arXiv 2412.03572), by the schedulers of diffusers.

Axes: N samples, K context frames, S frames of a rollout, C channels, H W latents. The state is fp32 whatever the model
computes in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from halfstep.errors import InputError
from halfstep.models import CDiT, LiveStream
from halfstep.models.cdit import FAMILY
from halfstep.models.objectives import TIMESTEPS, Predicted
from halfstep.sampling.noise import draw
from halfstep.sampling.states import SamplerState, drive


def make_scheduler(name: str, steps: int, predicted: Predicted = "noise") -> Any:
    """The library's scheduler for `steps` of the 1000 timesteps, spread evenly from the last on, for a network that was
    trained with `predicted` of `diffusion_loss`.

    ancestral: Ho et al. 2020 with the learned range of variances (Nichol and Dhariwal 2021), at least 2 steps; ddim:
    Song et al. 2021, without noise; dpm++: Lu et al. 2022, second order, multistep. Raises InputError for another name
    or number of steps.
    """
    from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

    fewest = 2 if name == "ancestral" else 1
    if name not in FAMILY.samplers:
        raise InputError(f"sampler: got {name!r}; expected one of {', '.join(FAMILY.samplers)}")
    if not fewest <= steps <= TIMESTEPS:
        raise InputError(f"steps: got {steps}; expected {fewest} to {TIMESTEPS}")
    common = {
        "num_train_timesteps": TIMESTEPS,
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "prediction_type": "epsilon" if predicted == "noise" else "v_prediction",
        "rescale_betas_zero_snr": predicted == "velocity",
    }
    if name == "ancestral":
        library = {"variance_type": "learned_range", "clip_sample": False, "timestep_spacing": "linspace"}
        scheduler = DDPMScheduler(**common, **library)
    else:
        # DDIM is DPM-Solver++ of first order (Lu et al. 2022, section 5). The library's own DDIM goes back a whole
        # number of timesteps, 1000 // steps, and loses its way where 1000 is no multiple.
        library = {"algorithm_type": "dpmsolver++", "solver_order": 1 if name == "ddim" else 2}
        scheduler = DPMSolverMultistepScheduler(**common, **library, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    return scheduler


@dataclass(frozen=True)
class Prediction:
    """The frames that a CDiT is asked for: N of them at time offsets rel_t [N], in units of 128 frames, after actions
    [N, 3] from context [N, K, C, H, W]. Called as prediction(x, timestep). `guidance_scale`: how far beyond what is
    predicted without the action (Ho and Salimans 2022), for a network whose training left actions out. `network`: what
    is called in the model's place, as the model in another precision. Of a LiveStream, for `sample_livestream`."""

    model: Any
    context: torch.Tensor
    actions: torch.Tensor
    rel_t: torch.Tensor
    guidance_scale: float = 1.0
    network: Callable[..., torch.Tensor] | None = None

    def __call__(self, x: torch.Tensor, timestep: int) -> torch.Tensor:
        """What the model predicts and its variance [N, 2 C, H, W], fp32, of the noised frames x [N, C, H, W]."""
        network = self.network or self.model
        t = torch.full((len(x),), timestep, device=x.device)
        if self.guidance_scale == 1:
            output: torch.Tensor = network(x, t, self.actions, self.context, self.rel_t)
            return output.float()
        twice = [torch.cat([value] * 2) for value in (x, t, self.actions, self.context, self.rel_t)]
        known = torch.arange(2 * len(x), device=x.device) < len(x)
        with_action, without = network(*twice, known).float().chunk(2)
        (predicted, variance), (base, _) = with_action.chunk(2, dim=1), without.chunk(2, dim=1)
        return torch.cat([torch.lerp(base, predicted, self.guidance_scale), variance], dim=1)


@torch.no_grad()
def sample_cdit(
    prediction: Prediction,
    *,
    scheduler: str = "ancestral",
    steps: int = 250,
    generators: Sequence[torch.Generator],
) -> Iterator[SamplerState]:
    """Frames [N, C, H, W] by a scheduler of `make_scheduler`; yields each state, with the scheduler's sigma =
    sqrt((1 - abar) / abar) as noise level.

    Each sample draws from its own CPU generator, so that it does not depend on what else is in the batch. Raises
    InputError for an unknown scheduler, or when generators are not N.
    """
    context = prediction.context
    if prediction.guidance_scale != 1 and not prediction.model.guidable:
        raise InputError("guidance_scale: the model was trained with every action; it takes one with action_dropout")
    if len(generators) != len(context):
        raise InputError(f"generators: got {len(generators)} for {len(context)} samples; give one each")
    library = make_scheduler(scheduler, steps, prediction.model.predicted)
    more = {"generator": list(generators)} if scheduler == "ancestral" else {}
    x = draw(prediction.model.latent_shape, generators).to(context.device)
    timesteps = library.timesteps  # on the host, where the schedulers look their coefficients up
    yield _state(library, 0, timesteps[0], x)
    for k, t in enumerate(timesteps, start=1):
        output = prediction(x, int(t))
        if scheduler != "ancestral":
            output = output.chunk(2, dim=1)[0]  # the learned variance is for ancestral sampling alone
        x = library.step(output, t, x, **more).prev_sample
        yield _state(library, k, timesteps[k] if k < len(timesteps) else None, x)


def rollout(
    model: CDiT | LiveStream,
    context: torch.Tensor,
    actions: torch.Tensor,
    rel_t: float,
    sampler: Callable[[Prediction], Iterator[SamplerState]],
    follow: Callable[[int, Iterator[SamplerState]], torch.Tensor] = lambda _, states: drive(states),
    guidance_scale: float = 1.0,
) -> torch.Tensor:
    """Walk on from context [N, K, C, H, W] along actions [N, S, 3], one frame after the other, each prediction becoming
    context of the next: frames [N, S, C, H, W].

    An action is seen from where the one before it ended: `halfstep.data.navigation.local_steps` and `to_actions`
    make them of a path. `rel_t`: the time offset of one action, in units of 128 frames. `sampler` makes the states of a
    prediction, `partial(sample_cdit, ...)` or `partial(sample_livestream, ...)`; `follow(s, states)` takes those of the
    s-th frames to their end. `guidance_scale`: see Prediction.
    """
    frames = []
    offset = torch.full((len(context),), rel_t, device=context.device)
    for number in range(actions.shape[1]):
        frame = follow(number, sampler(Prediction(model, context, actions[:, number], offset, guidance_scale)))
        frames.append(frame)
        context = torch.cat([context[:, 1:], frame.unsqueeze(1)], dim=1)
    return torch.stack(frames, dim=1)


def _state(library: Any, k: int, t: torch.Tensor | None, x: torch.Tensor) -> SamplerState:
    timestep = 0 if t is None else int(t)
    # Pure noise has no finite noise level; the library's solvers take 2^-24 for its abar.
    bar = 1.0 if t is None else max(2**-24, float(library.alphas_cumprod[timestep]))
    return SamplerState(k, float(timestep), ((1 - bar) / bar) ** 0.5, x)
