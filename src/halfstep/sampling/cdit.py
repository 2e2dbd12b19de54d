"""Frames of a navigation world model (arXiv 2412.03572), by the schedulers of diffusers.

Axes: N samples, K context frames, S steps of a rollout, C channels, H W latents. The state is fp32 whatever the model
computes in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch

from halfstep.errors import InputError
from halfstep.models import CDiT
from halfstep.sampling.noise import draw
from halfstep.sampling.recorder import Recorder, Step, one_each

Scheduler = Literal["ancestral", "ddim", "dpm++"]
SCHEDULERS = ("ancestral", "ddim", "dpm++")
TIMESTEPS = 1000


def make_scheduler(name: str, steps: int) -> Any:
    """The library's scheduler for `steps` of the 1000 timesteps, spread evenly from the last on.

    ancestral: Ho et al. 2020 with the learned range of variances (Nichol and Dhariwal 2021), at least 2 steps; ddim:
    Song et al. 2021, without noise; dpm++: Lu et al. 2022, second order, multistep. Raises InputError for another name
    or number of steps.
    """
    from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

    fewest = 2 if name == "ancestral" else 1
    if name not in SCHEDULERS:
        raise InputError(f"sampler: got {name!r}; expected one of {', '.join(SCHEDULERS)}")
    if not fewest <= steps <= TIMESTEPS:
        raise InputError(f"steps: got {steps}; expected {fewest} to {TIMESTEPS}")
    common = {
        "num_train_timesteps": TIMESTEPS,
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "beta_schedule": "linear",
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


def sample_cdit(
    model: CDiT,
    x_cond: torch.Tensor,
    y: torch.Tensor,
    rel_t: torch.Tensor,
    *,
    scheduler: Scheduler = "ancestral",
    steps: int = 250,
    generators: Sequence[torch.Generator],
    recorder: Recorder | Sequence[Recorder] | None = None,
    on_step: Callable[[int], None] = lambda _: None,
) -> torch.Tensor:
    """Frames [N, C, H, W], fp32, at time offsets rel_t [N] after actions y [N, 3] from context x_cond [N, K, C, H, W].

    Each sample draws from its own CPU generator, so that it does not depend on what else is in the batch. `recorder`
    takes every state, one recorder a sample, with the scheduler's sigma = sqrt((1 - abar) / abar) as noise level.
    `on_step` hears the number of each step that is done. Raises InputError for an unknown scheduler, or when generators
    or recorders are not N.
    """
    recorders = one_each(recorder, len(x_cond))
    if len(generators) != len(x_cond):
        raise InputError(f"generators: got {len(generators)} for {len(x_cond)} samples; give one each")
    library = make_scheduler(scheduler, steps)
    device = x_cond.device
    more = {"generator": list(generators)} if scheduler == "ancestral" else {}
    with torch.no_grad():
        x = draw(model.latent_shape, generators).to(device)
        timesteps = library.timesteps  # on the host, where the schedulers look their coefficients up
        _record(recorders, library, 0, timesteps[0], x)
        for k, t in enumerate(timesteps, start=1):
            output = model(x, torch.full((len(x),), int(t), device=device), y, x_cond, rel_t).float()
            if scheduler != "ancestral":
                output = output.chunk(2, dim=1)[0]  # the learned variance is for ancestral sampling alone
            x = library.step(output, t, x, **more).prev_sample
            _record(recorders, library, k, timesteps[k] if k < len(timesteps) else None, x)
            on_step(k)
    return x


def rollout(
    model: CDiT,
    context: torch.Tensor,
    actions: torch.Tensor,
    rel_t: float,
    *,
    scheduler: Scheduler = "ancestral",
    steps: int = 250,
    generators: Sequence[torch.Generator],
    recorders: Callable[[int], Sequence[Recorder]] = lambda _: (),
    on_step: Callable[[int], None] = lambda _: None,
) -> torch.Tensor:
    """Walk on from context [N, K, C, H, W] along actions [N, S, 3], one frame after the other, each prediction becoming
    context of the next: frames [N, S, C, H, W].

    An action is seen from where the one before it ended: `halfstep.data.navigation.local_steps` and `to_actions`
    make them of a path. `rel_t`: the time offset of one action, in units of 128 frames. `recorders(s)`: those of the
    s-th frames.
    """
    frames = []
    offset = torch.full((len(context),), rel_t, device=context.device)
    for number in range(actions.shape[1]):
        frame = sample_cdit(
            model,
            context,
            actions[:, number],
            offset,
            scheduler=scheduler,
            steps=steps,
            generators=generators,
            recorder=recorders(number),
            on_step=partial(_after, number * steps, on_step),
        )
        frames.append(frame)
        context = torch.cat([context[:, 1:], frame.unsqueeze(1)], dim=1)
    return torch.stack(frames, dim=1)


def _after(before: int, on_step: Callable[[int], None], step: int) -> None:
    on_step(before + step)


def _record(recorders: Sequence[Recorder], library: Any, k: int, t: torch.Tensor | None, x: torch.Tensor) -> None:
    if not recorders:
        return
    timestep = 0 if t is None else int(t)
    bar = 1.0 if t is None else float(library.alphas_cumprod[timestep])
    for recorder, latent in zip(recorders, x, strict=True):
        recorder.record(Step(k, float(timestep), ((1 - bar) / bar) ** 0.5, latent))
