"""Makers: batches of samples by number, from an EqM or along walks from a CDiT or a livestream.

Axes: N samples, S frames of a walk, K context frames, C channels, T frames of a clip, H W latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from halfstep.data.frames import FrameReader, open_latents, windows
from halfstep.data.navigation import REL_T_FRAMES, local_steps, to_actions, waypoint_spacing
from halfstep.errors import InputError
from halfstep.models import About, CDiT, EqM, LiveStream
from halfstep.progress import Progress
from halfstep.sample.options import SampleOptions
from halfstep.sampling import (
    GuidedField,
    Recorder,
    SamplerState,
    drive,
    noise_levels,
    rollout,
    sample_cdit,
    sample_eqm,
    sample_eqm_ode,
    sample_livestream,
)
from halfstep.sampling.cdit import make_scheduler
from halfstep.sampling.noise import own_generator
from halfstep.spec import LatentSpec

Recorders = Callable[[int], Sequence[Recorder]]


@dataclass(frozen=True)
class Made:
    """A batch: latents [N, C, (T,) H, W], or of walks [N, S, C, H, W] with the real ones beside them; and the mean
    number of updates that each frame took."""

    latents: torch.Tensor
    updates: float
    real: torch.Tensor | None = None


class Maker(Protocol):
    """Makes samples by number: sample i is the same in whatever batch it is, but for the last digits, because kernels
    for batches of other sizes round differently. `frames`: of a walk, 1 for EqM; `steps`: of the sampler for all of
    them; `sampler`: its name; `spec`: of the latents, None when nobody knows."""

    frames: int
    steps: int
    sampler: str
    spec: LatentSpec | None

    def make(self, numbers: Sequence[int], recorders: Recorders | None, progress: Progress) -> Made:
        """`recorders(s)`: of the s-th frames, one a sample."""

    def facts(self, number: int) -> dict[str, Any]:
        """What a sample is made from."""


class EqMMaker:
    """Samples of a landscape, from noise or from noised data."""

    frames = 1

    def __init__(self, options: SampleOptions, network: EqM, about: About, device: torch.device) -> None:
        self._options, self._network, self._classes, self._device = options, network, about.classes, device
        self.sampler = _sampler(options, about)
        self._ode = self.sampler in ("euler", "heun")
        if self._ode and options.stop_below is not None:
            raise InputError("--stop-below needs --sampler gd or ngd; the flow's ODE has a fixed end")
        steps = options.steps or about.family.steps
        self.steps = steps if self._ode else steps - 1
        if self.steps < 1:
            raise InputError(f"--steps: got {steps}; expected 2 or more, as {self.sampler} makes one update less")
        numbers = {"step-size": options.step_size, "momentum": options.momentum, "cfg-scale": options.guidance_scale}
        for flag, value in {**numbers, "stop-below": options.stop_below or 0.0}.items():
            if not math.isfinite(value):
                raise InputError(f"--{flag}: got {value}; expected a finite number")
        if options.guidance_channels is not None and options.guidance_channels > network.in_channels:
            raise InputError(
                f"--cfg-channels: got {options.guidance_channels}; the latents have {network.in_channels} channels"
            )
        for label in {label for labels in options.labels for label in labels}:
            if not 0 <= label < network.num_classes:
                raise InputError(f"--labels: got {label}; the model has classes 0 to {network.num_classes - 1}")
        if len({len(labels) for labels in options.labels}) > 1:
            raise InputError("--labels: some samples have more labels than others; compose the same number in all")
        self._starts = _open_starts(options, network, about, below_one=self._ode)
        self.spec = about.latents if self._starts is None else self._starts.spec

    def make(self, numbers: Sequence[int], recorders: Recorders | None, progress: Progress) -> Made:
        options = self._options
        drawn = [self._draw(number) for number in numbers]
        x, y = torch.stack([noise for noise, _ in drawn]), torch.tensor([labels for _, labels in drawn])
        if self._starts is not None:
            x = torch.lerp(x, torch.stack([self._starts.latent(number) for number in numbers]), self._starts.gamma)
        x, y = x.to(self._device), (y if y.shape[1] > 1 else y[:, 0]).to(self._device)
        field = GuidedField(self._network, y, options.guidance_scale, options.guidance_channels)
        if self._ode:
            start = 0.0 if self._starts is None else self._starts.gamma
            states = sample_eqm_ode(field, x, updates=self.steps, method=self.sampler, start=start)
        else:
            states = sample_eqm(
                field,
                x,
                updates=self.steps,
                step_size=options.step_size,
                sampler=self.sampler,
                momentum=options.momentum,
                stop_below=options.stop_below,
            )
        counted = _Counted(states)
        latents = drive(counted, [] if recorders is None else recorders(0), progress)
        return Made(latents, counted.updates / len(numbers))

    def facts(self, number: int) -> dict[str, Any]:
        labels = self._draw(number)[1]
        start = {} if self._starts is None else {"start": self._starts.key(number)}
        return {"labels": labels, "classes": [self._classes[n] for n in labels if n < len(self._classes)], **start}

    def _draw(self, number: int) -> tuple[torch.Tensor, list[int]]:
        """Noise and labels of a sample."""
        generator = own_generator(self._options.seed, number)
        noise = torch.randn(self._network.latent_shape, generator=generator)
        given, classes = self._options.labels, self._network.num_classes
        if given:
            return noise, list(given[number % len(given)])
        return noise, [int(torch.randint(classes, (), generator=generator)) if classes else 0]


@dataclass(frozen=True)
class _Starts:
    """Latents of `shape` to start from, and their share `gamma`, the rest being noise."""

    path: Path | str
    reader: FrameReader
    spec: LatentSpec
    keys: list[str]
    shape: tuple[int, ...]
    gamma: float

    def key(self, number: int) -> str:
        """The sequence that a sample starts from, beginning again after the last."""
        return self.keys[number % len(self.keys)]

    def latent(self, number: int) -> torch.Tensor:
        """The sequence's first frame [C, H, W], or for a model of video as many as it has [C, T, H, W]."""
        key, frames = self.key(number), self.shape[1] if len(self.shape) == 4 else 1
        values = self.reader.read(key, 0, min(frames, self.reader.length(key)))
        latent = values[0] if values.ndim == 5 or len(self.shape) == 3 else values.swapaxes(0, 1)
        if latent.shape != self.shape:
            raise InputError(f"{self.path}: {key} gives {list(latent.shape)}; the model needs {list(self.shape)}")
        return torch.from_numpy(np.ascontiguousarray(latent))


def _open_starts(options: SampleOptions, network: EqM, about: About, *, below_one: bool) -> _Starts | None:
    if options.start_from is None:
        if options.start_gamma is not None:
            raise InputError("--start-gamma needs --start-from: it is the share of the latents to start from")
        return None
    gamma = 0.5 if options.start_gamma is None else options.start_gamma
    if not 0 <= gamma <= 1 or (below_one and gamma == 1):
        raise InputError(f"--start-gamma: got {gamma}; expected 0 to 1, and below 1 for the flow's ODE")
    reader, spec = open_latents(options.start_from, network.in_channels, about.latents)
    return _Starts(options.start_from, reader, spec, reader.keys(), network.latent_shape, gamma)


class _Counted:
    """The states of a sampler, and how many updates of single samples they took."""

    def __init__(self, states: Iterator[SamplerState]) -> None:
        self._states, self.updates = states, 0

    def __iter__(self) -> Iterator[SamplerState]:
        for state in self._states:
            self.updates += len(state.movers) if state.index else 0
            yield state


class WalkMaker:
    """Walks from real context frames, along the real actions."""

    def __init__(self, options: SampleOptions, network: CDiT | LiveStream, about: About, device: torch.device) -> None:
        self._options, self._network, self._device = options, network, device
        self.sampler = _sampler(options, about)
        if options.data_path is None:
            raise InputError(
                f"--data-path: not given; a {about.network} walks on from the frames of a store with poses"
            )
        self._updates = options.steps or about.family.steps
        self._sample = self._sampler_of(network)
        self._spacing = waypoint_spacing(options.spacing, about.spacing)
        self.frames, self.steps = options.frames, self._updates * options.frames
        self.spec: LatentSpec | None
        self._walks, self.spec = open_latents(options.data_path, network.in_channels, about.latents)
        self._starts = windows(self._walks, network.context_size + options.frames)
        self._walks.poses(self._starts[0][0])
        order = np.random.default_rng(options.seed).permutation(len(self._starts))
        self._order = [int(place) for place in order]

    def make(self, numbers: Sequence[int], recorders: Recorders | None, progress: Progress) -> Made:
        options, found, actions = self._options, [], []
        context_size = self._network.context_size
        for number in numbers:
            key, first = self._start(number)
            found.append(torch.from_numpy(self._walks.read(key, first, first + context_size + self.frames)))
            position, yaw = self._walks.poses(key)
            path = slice(first + context_size - 1, first + context_size + self.frames)
            steps = local_steps(position[path], yaw[path])
            actions.append(torch.from_numpy(to_actions(steps, self._spacing)).float())
        frames = torch.stack(found).to(self._device)
        sampler = partial(self._sample, generators=[own_generator(options.seed, number) for number in numbers])

        def follow(frame: int, states: Iterator[SamplerState]) -> torch.Tensor:
            return drive(states, [] if recorders is None else recorders(frame), progress)

        actions_of_all = torch.stack(actions).to(self._device)
        context = frames[:, :context_size]
        latents = rollout(
            self._network, context, actions_of_all, 1 / REL_T_FRAMES, sampler, follow, options.guidance_scale
        )
        return Made(latents, self._updates, frames[:, context_size:])

    def facts(self, number: int) -> dict[str, Any]:
        key, first = self._start(number)
        return {"walk": key, "frame": int(self._walks.numbers(key)[first + self._network.context_size - 1])}

    def _sampler_of(self, network: CDiT | LiveStream) -> Callable[..., Iterator[SamplerState]]:
        """Raises InputError for what it cannot do."""
        if isinstance(network, LiveStream):
            noise_levels(self._updates)
            return partial(sample_livestream, steps=self._updates)
        make_scheduler(self.sampler, self._updates)
        if self._options.guidance_scale != 1 and not network.guidable:
            raise InputError("--cfg-scale: this CDiT was trained with every action; it takes one with action_dropout")
        return partial(sample_cdit, scheduler=self.sampler, steps=self._updates)

    def _start(self, number: int) -> tuple[str, int]:
        """The walk and its first context frame that a sample begins with."""
        return self._starts[self._order[number % len(self._order)]]


def _sampler(options: SampleOptions, about: About) -> str:
    samplers = about.family.samplers
    if options.sampler not in (None, *samplers):
        raise InputError(f"--sampler: got {options.sampler!r}; {about.network} has {', '.join(samplers)}")
    return options.sampler or samplers[0]


MAKERS: dict[str, Callable[[SampleOptions, Any, About, torch.device], Maker]] = {
    "EqM": EqMMaker,
    "CDiT": WalkMaker,
    "livestream": WalkMaker,
}
