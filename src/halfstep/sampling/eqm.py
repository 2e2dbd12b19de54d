"""Sampling from EqM: down its landscape, or along the flow that it was trained on (Equilibrium Matching,
arXiv 2510.02300, section 4).

Axes: N samples, C channels, T frames, H W latents. The state is fp32 whatever the model computes in, because an update
of 0.007 is lost on a bf16 number near one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch

from halfstep.errors import InputError
from halfstep.models import EqM
from halfstep.models.eqm import gradient_magnitude
from halfstep.sampling.recorder import Recorder, Step, one_each

Sampler = Literal["gd", "ngd"]
OdeMethod = Literal["euler", "heun"]
OnUpdate = Callable[[int, int], None]


def sample_eqm(
    model: EqM,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    sampler: Sampler,
    step_size: float,
    momentum: float = 0.3,
    updates: int,
    guidance_scale: float = 1.0,
    guidance_channels: int | None = None,
    stop_below: float | None = None,
    recorder: Recorder | Sequence[Recorder] | None = None,
    on_update: OnUpdate = lambda *_: None,
) -> torch.Tensor:
    """Move x [N, C, (T,) H, W] along the field for `updates` steps; the latents, fp32.

    gd: x + eta f(x). ngd: f is taken at x + eta mu m, where m is the field of the step before (eq. 11). x may be noise,
    or data partly noised. `guidance_scale` other than 1 takes the field with and without label y [N], on the first
    `guidance_channels` channels (all by default); several labels a sample, y [N, K], are composed. With `stop_below` a
    sample is done when the root mean square of its field is below it, and costs nothing any more (section 4.3, adaptive
    compute). Without time the condition is computed once. `recorder` takes every state, one recorder a sample; as noise
    level it sees the share of updates still to make. `on_update` hears after each update its number and how many
    samples still move. Raises InputError for an unknown sampler, no updates, or a number of recorders that is not N.
    """
    if sampler not in ("gd", "ngd"):
        raise InputError(f"sampler: got {sampler!r}; expected gd or ngd")
    _require_updates(updates)
    recorders = one_each(recorder, len(x))
    with torch.no_grad():
        x = x.float().clone()
        field_at = _Field(model, y, guidance_scale, guidance_channels)
        moving = torch.arange(len(x), device=x.device)
        velocity = torch.zeros_like(x)
        _record(recorders, range(len(x)), 0, updates, x)
        for k in range(1, updates + 1):
            here = x[moving]
            at = here + step_size * momentum * velocity if sampler == "ngd" else here
            velocity = field_at(at, 1 + (k - 1) * step_size)
            x[moving] = here + step_size * velocity
            _record(recorders, moving.tolist() if recorders else (), k, updates, x)
            if stop_below is not None:
                going = velocity.square().flatten(1).mean(dim=1).sqrt() >= stop_below
                if not bool(going.all()):
                    moving, velocity = moving[going], velocity[going]
                    field_at.keep(going)
            on_update(k, len(moving))
            if len(moving) == 0:
                break
    return x


def sample_eqm_ode(
    model: EqM,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    method: OdeMethod,
    updates: int,
    start: float = 0.0,
    guidance_scale: float = 1.0,
    guidance_channels: int | None = None,
    recorder: Recorder | Sequence[Recorder] | None = None,
    on_update: OnUpdate = lambda *_: None,
) -> torch.Tensor:
    """Integrate dx/dgamma = f(x) / c(gamma) from gamma = `start` to 1 in `updates` even steps; the latents, fp32.

    Along the paths that EqM is trained on, its field is c(gamma) times the velocity x1 - x0 of flow matching (Lipman et
    al. 2023), whose ODE this is. x [N, C, (T,) H, W] is noise for `start` 0, else `gamma x1 + (1 - gamma) x0`. euler
    takes one evaluation a step; heun two, but one in the last, because c(1) = 0 (as Karras et al. 2022, algorithm 1).
    A recorder sees 1 - gamma as noise level. Other arguments and errors as in `sample_eqm`.
    """
    if method not in ("euler", "heun"):
        raise InputError(f"sampler: got {method!r}; expected euler or heun")
    _require_updates(updates)
    if not 0 <= start < 1:
        raise InputError(f"start: got {start}; expected a share of the way from noise to data, 0 or more, below 1")
    recorders = one_each(recorder, len(x))
    gammas = [start + (1 - start) * k / updates for k in range(updates + 1)]
    with torch.no_grad():
        x = x.float()
        field_at = _Field(model, y, guidance_scale, guidance_channels)

        def velocity(at: torch.Tensor, gamma: float) -> torch.Tensor:
            return field_at(at, gamma) / float(gradient_magnitude(torch.tensor(gamma)))

        everyone = range(len(x))
        _record(recorders, everyone, 0, updates, x, 1 - gammas[0])
        for k in range(1, updates + 1):
            width = gammas[k] - gammas[k - 1]
            slope = velocity(x, gammas[k - 1])
            if method == "heun" and k < updates:
                slope = (slope + velocity(x + width * slope, gammas[k])) / 2
            x = x + width * slope
            _record(recorders, everyone, k, updates, x, 1 - gammas[k])
            on_update(k, len(x))
    return x


def energy_score(model: EqM, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
    """The energy of each sample [N], fp32: high for what is unlike the data (section 4.3, out-of-distribution
    detection). y: labels [N], by default none. Raises InputError for a model without an energy."""
    labels = torch.full((len(x),), model.num_classes, device=x.device) if y is None else y
    with torch.no_grad():
        return model.energy_and_field(x.float(), torch.ones(len(x), device=x.device), labels)[0]


class _Field:
    """The field of a batch of samples, guided or not; the condition is computed once where it does not depend on
    time."""

    def __init__(self, model: EqM, y: torch.Tensor, scale: float, channels: int | None) -> None:
        self._model, self._labels, self._scale, self._channels = model, y, scale, channels
        self._guided = scale != 1.0 or y.dim() == 2
        self._modulations: list[torch.Tensor] | None = None

    def keep(self, which: torch.Tensor) -> None:
        """Go on with these samples alone."""
        self._labels, self._modulations = self._labels[which], None

    def __call__(self, x: torch.Tensor, time: float) -> torch.Tensor:
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


def _require_updates(updates: int) -> None:
    if updates < 1:
        raise InputError(f"updates: got {updates}; expected 1 or more")


def _record(
    recorders: Sequence[Recorder],
    which: Sequence[int],
    k: int,
    updates: int,
    x: torch.Tensor,
    sigma: float | None = None,
) -> None:
    if recorders:
        for number in which:
            recorders[number].record(Step(k, float(k), 1 - k / updates if sigma is None else sigma, x[number]))
