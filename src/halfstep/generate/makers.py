"""Makers: batches of samples by number, from an EqM or along walks from a CDiT.

Axes: N samples, S frames of a walk, K context frames, C channels, T frames of a clip, H W latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from halfstep.data.frames import latents_spec, open_frames, windows
from halfstep.data.navigation import REL_T_FRAMES, local_steps, to_actions
from halfstep.errors import InputError
from halfstep.models import About, CDiT, EqM
from halfstep.sampling import Recorder, rollout, sample_eqm, sample_eqm_ode
from halfstep.sampling.cdit import SCHEDULERS

EQM_SAMPLERS = ("gd", "ngd", "euler", "heun")

Recorders = Callable[[int], Sequence[Recorder]]


@dataclass(frozen=True)
class SampleOptions:
    """What to make. None leaves the choice to the network.

    `sampler`: gd, ngd (default), euler or heun for EqM; ancestral (default), ddim or dpm++ for CDiT, with `steps` as
    published, 250; gd and ngd make one update less. EqM: `labels` in turn, each a class or several to be composed;
    `stop_below`, `start_from` (a store or `.pt` tree whose latents are noised to `start_gamma`) as in
    `halfstep.sampling`. CDiT: `data_path` with walks whose beginnings are context, `frames` to predict. `format`: png,
    mp4, gif, or npy for latents that are not decoded. Samples depend on `seed` and their number alone.
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
    start_gamma: float = 0.0
    data_path: Path | None = None
    frames: int = 8
    spacing: float | None = None
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
    them."""

    frames: int
    steps: int

    def make(self, numbers: Sequence[int], recorders: Recorders | None, progress: Progress) -> Made:
        """`recorders(s)`: of the s-th frames, one a sample."""

    def facts(self, number: int) -> dict[str, Any]:
        """What a sample is made from."""


class EqMMaker:
    """Samples of a landscape, from noise or from noised data."""

    frames = 1

    def __init__(self, options: SampleOptions, network: EqM, about: About, device: torch.device) -> None:
        self._options, self._network, self._classes, self._device = options, network, about.classes, device
        self._sampler: Any = options.sampler or "ngd"
        if self._sampler not in EQM_SAMPLERS:
            raise InputError(f"sampler: got {self._sampler!r}; EqM has {', '.join(EQM_SAMPLERS)}")
        self._ode = self._sampler in ("euler", "heun")
        if self._ode and options.stop_below is not None:
            raise InputError("stop_below: is of gd and ngd; the flow's ODE has a fixed end")
        self.steps = options.steps if self._ode else options.steps - 1
        for label in {label for labels in options.labels for label in labels}:
            if not 0 <= label < network.num_classes:
                raise InputError(f"labels: got {label}; the model has classes 0 to {network.num_classes - 1}")
        if len({len(labels) for labels in options.labels}) > 1:
            raise InputError("labels: some samples have more labels than others; compose the same number in all")
        self._starts = None if options.start_from is None else _Frames(options.start_from, about)

    def make(self, numbers: Sequence[int], recorders: Recorders | None, progress: Progress) -> Made:
        options, moving = self._options, [len(numbers)]
        drawn = [self._draw(number) for number in numbers]
        x, y = torch.stack([noise for noise, _ in drawn]), torch.tensor([labels for _, labels in drawn])
        if self._starts is not None:
            starts = [self._starts.latent(number, self._network.latent_shape) for number in numbers]
            x = torch.lerp(x, torch.stack(starts), options.start_gamma)

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
            latents = sample_eqm_ode(self._network, x, y, method=self._sampler, start=options.start_gamma, **common)
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
        drawn = int(torch.randint(self._network.num_classes, (), generator=generator))
        given = self._options.labels
        return noise, list(given[number % len(given)]) if given else [drawn]


class WalkMaker:
    """Walks from real context frames, along the real actions."""

    def __init__(self, options: SampleOptions, network: CDiT, about: About, device: torch.device) -> None:
        self._options, self._network, self._device = options, network, device
        self._scheduler: Any = options.sampler or "ancestral"
        if self._scheduler not in SCHEDULERS:
            raise InputError(f"sampler: got {self._scheduler!r}; CDiT has {', '.join(SCHEDULERS)}")
        if options.data_path is None:
            raise InputError("data_path: not given; a CDiT walks on from the frames of a store with poses")
        spacing = options.spacing or about.spacing
        if spacing is None:
            raise InputError("spacing: the checkpoint does not say the metres of a waypoint; give it")
        self._spacing, self.frames, self.steps = spacing, options.frames, options.steps * options.frames
        self._walks = _Frames(options.data_path, about)
        self._starts = windows(self._walks.reader, network.context_size + options.frames)
        order = np.random.default_rng(options.seed).permutation(len(self._starts))
        self._order = [int(place) for place in order]

    def make(self, numbers: Sequence[int], recorders: Recorders | None, progress: Progress) -> Made:
        found, actions = [], []
        context_size = self._network.context_size
        for number in numbers:
            key, first = self._start(number)
            found.append(torch.from_numpy(self._walks.reader.read(key, first, first + context_size + self.frames)))
            position, yaw = self._walks.reader.poses(key)
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
        return {"walk": key, "frame": int(self._walks.reader.numbers(key)[first + self._network.context_size - 1])}

    def _start(self, number: int) -> tuple[str, int]:
        """The walk and its first context frame that a sample begins with."""
        return self._starts[self._order[number % len(self._order)]]


class _Frames:
    """Frames to start from, of the latents that the network knows."""

    def __init__(self, path: Path, about: About) -> None:
        self.path, self.reader = path, open_frames(path)
        spec = latents_spec(self.reader)
        assert spec is not None  # without pixels only latents are found
        if spec.channels != about.config["in_channels"]:
            raise InputError(
                f"{path}: has latents of {spec.channels} channels ({spec.autoencoder}); the model is of "
                f"{about.config['in_channels']}"
            )
        if about.latents is not None and (differences := about.latents.differences(spec)):
            raise InputError(f"{path}: holds other latents than the model was trained on: {'; '.join(differences)}")
        self._keys = self.reader.keys()

    def key(self, number: int) -> str:
        """The sequence `number`, beginning again after the last."""
        return self._keys[number % len(self._keys)]

    def latent(self, number: int, shape: tuple[int, ...]) -> torch.Tensor:
        """The sequence's first frame [C, H, W], or for a model of video as many as it has [C, T, H, W]."""
        key = self.key(number)
        frames = shape[1] if len(shape) == 4 else 1
        values = self.reader.read(key, 0, min(frames, self.reader.frames(key)))
        latent = values[0] if values.ndim == 5 or len(shape) == 3 else values.swapaxes(0, 1)
        if latent.shape != shape:
            raise InputError(f"{self.path}: {key} gives {list(latent.shape)}; the model needs {list(shape)}")
        return torch.from_numpy(np.ascontiguousarray(latent))


def own_generator(seed: int, number: int) -> torch.Generator:
    """On the CPU, so that every device starts from the same noise."""
    state = np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))
