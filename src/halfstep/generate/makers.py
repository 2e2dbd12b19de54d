"""Makers: batches of samples by number, from an EqM or along walks from a CDiT.

Axes: N samples, S frames of a walk, K context frames, C channels, T frames of a clip, H W latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from halfstep.data.frames import FrameReader, open_latents, windows
from halfstep.data.navigation import REL_T_FRAMES, local_steps, to_actions, waypoint_spacing
from halfstep.errors import InputError
from halfstep.models import About, CDiT, EqM
from halfstep.sampling import Recorder, rollout, sample_eqm, sample_eqm_ode
from halfstep.sampling.cdit import SCHEDULERS, make_scheduler
from halfstep.sampling.noise import own_generator
from halfstep.spec import LatentSpec

EQM_SAMPLERS = ("gd", "ngd", "euler", "heun")
_EQM_SAMPLING = ("step_size", "momentum", "guidance_scale", "guidance_channels", "labels", "stop_below")
_EQM_ONLY = (*_EQM_SAMPLING, "start_from", "start_gamma", "video", "clip_len", "energy")
_CDIT_ONLY = ("data_path", "frames", "spacing")

Recorders = Callable[[int], Sequence[Recorder]]


@dataclass(frozen=True)
class SampleOptions:
    """What to make. None leaves the choice to the network.

    `sampler`: gd, ngd (default), euler or heun for EqM; ancestral (default), ddim or dpm++ for CDiT, with `steps` as
    published, 250; gd and ngd make one update less. EqM: `labels` in turn, each a class or several to be composed;
    `stop_below` as in `halfstep.sampling`; `start_from`, a store or `.pt` tree whose latents are noised, so that
    `start_gamma` (0.5) is their share; `video` and `clip_len` of a published checkpoint that does not say it. CDiT:
    `data_path` with walks whose beginnings are context, `frames` to predict. `format`: png, mp4, gif, or npy for
    latents that are not decoded. `record`: keep each step, at the error of `storage`. Samples depend on `seed` and
    their number alone.
    """

    ckpt: Path
    output: Path
    number: int = 16
    model: str | None = None
    autoencoder: str | None = None
    sampler: str | None = None
    steps: int = 250
    step_size: float = 0.0017
    momentum: float = 0.3
    guidance_scale: float = 1.0
    guidance_channels: int | None = None
    labels: tuple[tuple[int, ...], ...] = ()
    stop_below: float | None = None
    start_from: Path | None = None
    start_gamma: float | None = None
    data_path: Path | None = None
    frames: int = 8
    spacing: float | None = None
    video: bool = False
    clip_len: int | None = None
    energy: str | None = None
    ema: bool = True
    batch_size: int = 32
    seed: int = 0
    precision: str = "auto"
    device: str = "auto"
    format: str | None = None
    fps: int = 8
    record: bool = False
    storage: str = "fp16"


class Progress:
    """Told how sampling goes; the base class keeps silent."""

    def start(self, samples: int, steps: int) -> None:
        """So many samples are to be made, each in so many steps."""

    def step(self, samples: int) -> None:
        """One step of so many samples is done."""

    def note(self, line: str) -> None:
        """Something the user should know."""


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
    them; `spec`: of the latents, None when nobody knows."""

    frames: int
    steps: int
    spec: LatentSpec | None

    def make(self, numbers: Sequence[int], recorders: Recorders | None, progress: Progress) -> Made:
        """`recorders(s)`: of the s-th frames, one a sample."""

    def facts(self, number: int) -> dict[str, Any]:
        """What a sample is made from."""


class EqMMaker:
    """Samples of a landscape, from noise or from noised data."""

    frames = 1

    def __init__(self, options: SampleOptions, network: EqM, about: About, device: torch.device) -> None:
        _require_own(options, _CDIT_ONLY, "an EqM")
        self._options, self._network, self._classes, self._device = options, network, about.classes, device
        self._sampler: Any = options.sampler or "ngd"
        if self._sampler not in EQM_SAMPLERS:
            raise InputError(f"sampler: got {self._sampler!r}; EqM has {', '.join(EQM_SAMPLERS)}")
        self._ode = self._sampler in ("euler", "heun")
        if self._ode and options.stop_below is not None:
            raise InputError("stop_below: is of gd and ngd; the flow's ODE has a fixed end")
        self.steps = options.steps if self._ode else options.steps - 1
        if not (math.isfinite(options.step_size) and math.isfinite(options.momentum)):
            raise InputError(f"step_size {options.step_size}, momentum {options.momentum}: expected numbers")
        if options.guidance_channels is not None and options.guidance_channels > network.in_channels:
            raise InputError(
                f"guidance_channels: got {options.guidance_channels}; the latents have {network.in_channels} channels"
            )
        for label in {label for labels in options.labels for label in labels}:
            if not 0 <= label < network.num_classes:
                raise InputError(f"labels: got {label}; the model has classes 0 to {network.num_classes - 1}")
        if len({len(labels) for labels in options.labels}) > 1:
            raise InputError("labels: some samples have more labels than others; compose the same number in all")
        self._starts = _open_starts(options, network, about, below_one=self._ode)
        self.spec = about.latents if self._starts is None else self._starts.spec

    def make(self, numbers: Sequence[int], recorders: Recorders | None, progress: Progress) -> Made:
        options, moving = self._options, [len(numbers)]
        drawn = [self._draw(number) for number in numbers]
        x, y = torch.stack([noise for noise, _ in drawn]), torch.tensor([labels for _, labels in drawn])
        if self._starts is not None:
            x = torch.lerp(x, torch.stack([self._starts.latent(number) for number in numbers]), self._starts.gamma)

        def on_update(_: int, still: int) -> None:
            progress.step(len(numbers))
            moving.append(still)

        common: dict[str, Any] = {
            "updates": self.steps,
            "guidance_scale": options.guidance_scale,
            "guidance_channels": options.guidance_channels,
            "recorder": None if recorders is None else recorders(0),
            "on_update": on_update,
        }
        x, y = x.to(self._device), (y if y.shape[1] > 1 else y[:, 0]).to(self._device)
        if self._ode:
            start = 0.0 if self._starts is None else self._starts.gamma
            latents = sample_eqm_ode(self._network, x, y, method=self._sampler, start=start, **common)
        else:
            latents = sample_eqm(
                self._network,
                x,
                y,
                sampler=self._sampler,
                step_size=options.step_size,
                momentum=options.momentum,
                stop_below=options.stop_below,
                **common,
            )
        # An update was made for those that still moved after the one before it.
        return Made(latents, sum(moving[:-1]) / len(numbers))

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

    path: Path
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
        values = self.reader.read(key, 0, min(frames, self.reader.frames(key)))
        latent = values[0] if values.ndim == 5 or len(self.shape) == 3 else values.swapaxes(0, 1)
        if latent.shape != self.shape:
            raise InputError(f"{self.path}: {key} gives {list(latent.shape)}; the model needs {list(self.shape)}")
        return torch.from_numpy(np.ascontiguousarray(latent))


def _open_starts(options: SampleOptions, network: EqM, about: About, *, below_one: bool) -> _Starts | None:
    if options.start_from is None:
        if options.start_gamma is not None:
            raise InputError("start_gamma: is the share of latents to start from; give start_from too")
        return None
    gamma = 0.5 if options.start_gamma is None else options.start_gamma
    if not 0 <= gamma <= 1 or (below_one and gamma == 1):
        raise InputError(f"start_gamma: got {gamma}; expected 0 to 1, and below 1 for the flow's ODE")
    reader, spec = open_latents(options.start_from, network.in_channels, about.latents)
    return _Starts(options.start_from, reader, spec, reader.keys(), network.latent_shape, gamma)


class WalkMaker:
    """Walks from real context frames, along the real actions."""

    def __init__(self, options: SampleOptions, network: CDiT, about: About, device: torch.device) -> None:
        _require_own(options, _EQM_ONLY, "a CDiT")
        self._options, self._network, self._device = options, network, device
        self._scheduler: Any = options.sampler or "ancestral"
        if self._scheduler not in SCHEDULERS:
            raise InputError(f"sampler: got {self._scheduler!r}; CDiT has {', '.join(SCHEDULERS)}")
        if options.data_path is None:
            raise InputError("data_path: not given; a CDiT walks on from the frames of a store with poses")
        make_scheduler(self._scheduler, options.steps)  # which refuses what it cannot do
        self._spacing = waypoint_spacing(options.spacing, about.spacing)
        self.frames, self.steps = options.frames, options.steps * options.frames
        self.spec: LatentSpec | None
        self._walks, self.spec = open_latents(options.data_path, network.in_channels, about.latents)
        self._starts = windows(self._walks, network.context_size + options.frames)
        self._walks.poses(self._starts[0][0])
        order = np.random.default_rng(options.seed).permutation(len(self._starts))
        self._order = [int(place) for place in order]

    def make(self, numbers: Sequence[int], recorders: Recorders | None, progress: Progress) -> Made:
        found, actions = [], []
        context_size = self._network.context_size
        for number in numbers:
            key, first = self._start(number)
            found.append(torch.from_numpy(self._walks.read(key, first, first + context_size + self.frames)))
            position, yaw = self._walks.poses(key)
            path = slice(first + context_size - 1, first + context_size + self.frames)
            steps = local_steps(position[path], yaw[path])
            actions.append(torch.from_numpy(to_actions(steps, self._spacing)).float())
        frames = torch.stack(found).to(self._device)
        latents = rollout(
            self._network,
            frames[:, :context_size],
            torch.stack(actions).to(self._device),
            1 / REL_T_FRAMES,
            scheduler=self._scheduler,
            steps=self._options.steps,
            generators=[own_generator(self._options.seed, number) for number in numbers],
            recorders=recorders or (lambda _: ()),
            on_step=lambda _: progress.step(len(numbers)),
        )
        return Made(latents, self._options.steps, frames[:, context_size:])

    def facts(self, number: int) -> dict[str, Any]:
        key, first = self._start(number)
        return {"walk": key, "frame": int(self._walks.numbers(key)[first + self._network.context_size - 1])}

    def _start(self, number: int) -> tuple[str, int]:
        """The walk and its first context frame that a sample begins with."""
        return self._starts[self._order[number % len(self._order)]]


def _require_own(options: SampleOptions, foreign: tuple[str, ...], network: str) -> None:
    """Raise InputError for an option that is of the other network."""
    silent = SampleOptions(options.ckpt, options.output)
    for name in foreign:
        if getattr(options, name) != getattr(silent, name):
            raise InputError(f"{name}: is not an option of {network}")
