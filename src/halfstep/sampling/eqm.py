"""Sampling from EqM by descending its landscape (Equilibrium Matching, arXiv 2510.02300, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from halfstep.errors import InputError
from halfstep.models import EqM
from halfstep.sampling.recorder import Recorder, Step

Sampler = Literal["gd", "ngd"]


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
    recorder: Recorder | Sequence[Recorder] | None = None,
) -> torch.Tensor:
    """Move x [N, C, (T,) H, W] along the field for `updates` steps; the latents, fp32.

    gd: x + eta f(x). ngd: f is taken at x + eta mu m, where m is the field of the step before (eq. 11). x may be noise,
    or data partly noised; the state stays fp32 whatever the model computes in, because an update of 0.007 is lost on a
    bf16 number near one. `guidance_scale` other than 1 takes the field with and without label y [N], on the first
    `guidance_channels` channels (all by default). Without time the condition is computed once. `recorder` takes every
    state, one recorder a sample; as noise level it sees the share of updates still to make. Raises InputError for an
    unknown sampler or a number of recorders that is not N.
    """
    if sampler not in ("gd", "ngd"):
        raise InputError(f"sampler: got {sampler!r}; expected gd or ngd")
    recorders = [] if recorder is None else list(recorder) if isinstance(recorder, Sequence) else [recorder]
    if recorders and len(recorders) != len(x):
        raise InputError(f"recorder: got {len(recorders)} for {len(x)} samples; give one each")
    guided = guidance_scale != 1.0
    with torch.no_grad():
        x = x.float()
        time = torch.ones(len(x), device=x.device)
        labels = torch.cat([y, torch.full_like(y, model.num_classes)]) if guided else y
        times = torch.cat([time, time]) if guided else time
        modulations = model.modulations(times, labels)
        velocity = torch.zeros_like(x)
        _record(recorders, 0, updates, x)
        for k in range(1, updates + 1):
            if not model.uncond and k > 1:
                modulations = model.modulations(times + (k - 1) * step_size, labels)
            at = x + step_size * momentum * velocity if sampler == "ngd" else x
            if guided:
                field = model.guided(at, time, y, guidance_scale, guidance_channels, modulations=modulations).float()
            else:
                field = model(at, time, y, modulations=modulations).float()
            x = x + step_size * field
            velocity = field
            _record(recorders, k, updates, x)
    return x


def _record(recorders: Sequence[Recorder], k: int, updates: int, x: torch.Tensor) -> None:
    for recorder, latent in zip(recorders, x, strict=False):  # there may be none
        recorder.record(Step(k, float(k), 1 - k / updates, latent))
