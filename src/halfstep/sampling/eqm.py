"""Sampling from EqM: down its landscape, or along the flow that it was trained on (Equilibrium Matching,
arXiv 2510.02300, section 4).

Axes: N samples, C channels, T frames, H W latents. The state is fp32 whatever the model computes in, because an update
of 0.007 is lost on a bf16 number near one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from halfstep.errors import InputError
from halfstep.models import EqM
from halfstep.models.objectives import gradient_magnitude
from halfstep.sampling.states import SamplerState


class GuidedField:
    """The field of a batch of samples with labels y [N], called as field(x, time); the condition is computed once where
    it does not depend on time.

    `scale` other than 1 takes the field with and without label, on the first `channels` channels (all by default);
    several labels a sample, y [N, K], are composed.
    """

    def __init__(self, model: EqM, y: torch.Tensor, scale: float = 1.0, channels: int | None = None) -> None:
        self._model, self._labels, self._scale, self._channels = model, y, scale, channels
        self._guided = scale != 1.0 or y.dim() == 2
        self._modulations: list[torch.Tensor] | None = None

    def only(self, which: torch.Tensor) -> GuidedField:
        """That of some of the samples."""
        return GuidedField(self._model, self._labels[which], self._scale, self._channels)

    def __call__(self, x: torch.Tensor, time: float) -> torch.Tensor:
        """The field at x [N, C, (T,) H, W], fp32 of x's shape."""
        t = torch.full((len(x),), time, device=x.device)
        if self._modulations is None or not self._model.uncond:
            labels = self._model.guidance_labels(self._labels) if self._guided else self._labels
            self._modulations = self._model.modulations(torch.full(labels.shape, time, device=x.device), labels)
        if self._guided:
            return self._model.guided(
                x, t, self._labels, self._scale, self._channels, modulations=self._modulations
            ).float()
        field: torch.Tensor = self._model(x, t, self._labels, modulations=self._modulations)
        return field.float()


@torch.no_grad()
def sample_eqm(
    field: GuidedField,
    x: torch.Tensor,
    *,
    updates: int,
    step_size: float,
    sampler: str = "ngd",
    momentum: float = 0.3,
    stop_below: float | None = None,
) -> Iterator[SamplerState]:
    """Move x [N, C, (T,) H, W] along the field for `updates` steps, and yield each state, the first one too.

    gd: x + eta f(x). ngd: f is taken at x + eta mu m, where m is the field of the step before (eq. 11). x may be noise,
    or data partly noised. With `stop_below` a sample is done when the root mean square of its field is below it, and
    costs nothing any more (section 4.3, adaptive compute). The noise level is the share of updates still to make.
    Raises InputError for an unknown sampler or no updates.
    """
    if sampler not in ("gd", "ngd"):
        raise InputError(f"sampler: got {sampler!r}; expected gd or ngd")
    _require_updates(updates)
    x = x.float()
    moving = torch.arange(len(x), device=x.device)
    velocity = torch.zeros_like(x)
    yield SamplerState(0, 0.0, 1.0, x)
    for k in range(1, updates + 1):
        everyone = len(moving) == len(x)
        here = x if everyone else x[moving]
        at = here + step_size * momentum * velocity if sampler == "ngd" else here
        velocity = field(at, 1 + (k - 1) * step_size)
        if everyone:
            x = here + step_size * velocity
        else:
            x = x.clone()  # the state before may still be looked at
            x[moving] = here + step_size * velocity
        moved = None if everyone else tuple(moving.tolist())
        if stop_below is not None:
            going = velocity.square().flatten(1).mean(dim=1).sqrt() >= stop_below
            if not bool(going.all()):
                moving, velocity, field = moving[going], velocity[going], field.only(going)
        yield SamplerState(k, float(k), 1 - k / updates, x, moved)
        if len(moving) == 0:
            break


@torch.no_grad()
def sample_eqm_ode(
    field: GuidedField, x: torch.Tensor, *, updates: int, method: str = "heun", start: float = 0.0
) -> Iterator[SamplerState]:
    """Integrate dx/dgamma = f(x) / c(gamma) from gamma = `start` to 1 in `updates` even steps, and yield each state.

    Along the paths that EqM is trained on, its field is c(gamma) times the velocity x1 - x0 of flow matching (Lipman et
    al. 2023), whose ODE this is. x [N, C, (T,) H, W] is noise for `start` 0, else `gamma x1 + (1 - gamma) x0`. euler
    takes one evaluation a step; heun two, but one in the last, because c(1) = 0 (as Karras et al. 2022, algorithm 1).
    The noise level is 1 - gamma. Raises InputError for an unknown method, no updates or a start outside [0, 1).
    """
    if method not in ("euler", "heun"):
        raise InputError(f"sampler: got {method!r}; expected euler or heun")
    _require_updates(updates)
    if not 0 <= start < 1:
        raise InputError(f"start: got {start}; expected a share of the way from noise to data, 0 or more, below 1")
    gammas = [start + (1 - start) * k / updates for k in range(updates + 1)]

    def velocity(at: torch.Tensor, gamma: float) -> torch.Tensor:
        return field(at, gamma) / float(gradient_magnitude(torch.tensor(gamma)))

    x = x.float()
    yield SamplerState(0, 0.0, 1 - gammas[0], x)
    for k in range(1, updates + 1):
        width = gammas[k] - gammas[k - 1]
        slope = velocity(x, gammas[k - 1])
        if method == "heun" and k < updates:
            slope = (slope + velocity(x + width * slope, gammas[k])) / 2
        x = x + width * slope
        yield SamplerState(k, float(k), 1 - gammas[k], x)


@torch.no_grad()
def energy_score(model: EqM, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
    """The energy of each sample [N], fp32: high for what is unlike the data (section 4.3, out-of-distribution
    detection). y: labels [N], by default none. Raises InputError for a model without an energy."""
    labels = torch.full((len(x),), model.num_classes, device=x.device) if y is None else y
    return model.energy_and_field(x.float(), torch.ones(len(x), device=x.device), labels)[0]


def _require_updates(updates: int) -> None:
    if updates < 1:
        raise InputError(f"updates: got {updates}; expected 1 or more")
