"""Is a navigation world model right about the world? Predictions over time, rollouts, and plans (arXiv 2412.03572).

Axes: N samples, K context frames, S steps, C channels, H W latents.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from halfstep.autoencoders import Autoencoder, load_for
from halfstep.data.base import contiguous_runs
from halfstep.data.frames import FrameReader, open_latents, windows
from halfstep.data.latents import read_names
from halfstep.data.navigation import REL_T_FRAMES, follow, goal_actions, local_steps, to_actions, waypoint_spacing
from halfstep.errors import InputError, NumericsError
from halfstep.evaluate.pictures import PictureMetrics
from halfstep.evaluate.planning import cross_entropy_method
from halfstep.machine import open_device
from halfstep.models import CDiT, read_checkpoint
from halfstep.precision import PrecisionPolicy, network_trial, prepare, settle
from halfstep.progress import SILENT, Progress
from halfstep.sampling import Prediction, SamplerState, drive, rollout, sample_cdit
from halfstep.sampling.cdit import make_scheduler
from halfstep.sampling.noise import own_generator

Float = npt.NDArray[np.float64]
Scores = dict[str, dict[str, float]]

_PLANNING = 10**6  # in place of a horizon, for noise that no prediction has


@dataclass(frozen=True)
class WalkOptions:
    """What to evaluate. `names`: a list of walks, `traj_names.txt`; without it all are asked about, those of the
    training too. `horizons`: frames ahead; `walks`: how many beginnings, drawn by `seed`, or all where there are fewer.
    `plans`: of how many of them the way to the frame `plan_steps` ahead is planned, with `candidates` paths in each of
    `iterations` rounds of the cross-entropy method, the best `elites` of which shape the next."""

    ckpt: Path
    data_path: Path | str
    names: Path | None = None
    horizons: tuple[int, ...] = (1, 2, 4, 8)
    walks: int = 16
    sampler: str = "dpm++"
    steps: int = 25
    plans: int = 4
    plan_steps: int = 4
    candidates: int = 32
    elites: int = 6
    iterations: int = 3
    plan_sampling_steps: int = 6
    spacing: float | None = None
    autoencoder: str | None = None
    batch_size: int = 32
    seed: int = 0
    precision: str = "auto"
    device: str = "auto"


@dataclass(frozen=True)
class PlanScores:
    """Means over plans, in meters and radians: distance from the planned end to the real one, from the planned path to
    the real one (absolute trajectory error), and between their steps (relative pose error); and the same for the mean
    step of the data, repeated, which needs no model."""

    end: float
    path: float
    step: float
    turn: float
    mean_step_end: float
    mean_step_path: float


@dataclass(frozen=True)
class WalkReport:
    """Metrics by horizon: of frames predicted in one go (`direct`), one after the other (`rollout`), and of the last
    context frame taken for the prediction (`copy`). `not_measured`: metrics and why they are not there."""

    network: str
    policy: str
    walks: int
    direct: Scores
    rollout: Scores
    copy: Scores
    plan: PlanScores | None
    not_measured: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _World:
    """A model, the walks it is asked about, all their steps, and how latents become pictures."""

    options: WalkOptions
    network: CDiT
    reader: FrameReader
    spacing: float
    autoencoder: Autoencoder
    starts: list[tuple[str, int]]
    steps: Float
    device: torch.device
    policy: PrecisionPolicy

    @property
    def context_size(self) -> int:
        return self.network.context_size

    def frames(self, number: int, count: int) -> torch.Tensor:
        """Context and `count` frames after it, [K + count, C, H, W]."""
        key, first = self.starts[number]
        return torch.from_numpy(self.reader.read(key, first, first + self.context_size + count))

    def poses(self, number: int, count: int) -> tuple[Float, Float]:
        """Of the last context frame and the `count` after it."""
        key, first = self.starts[number]
        position, yaw = self.reader.poses(key)
        part = slice(first + self.context_size - 1, first + self.context_size + count)
        return np.asarray(position[part], np.float64), np.asarray(yaw[part], np.float64).reshape(-1)

    def sampler(self, steps: int, numbers: Sequence[int], what: int) -> Callable[[Prediction], Iterator[SamplerState]]:
        """The sampler of predictions for walks `numbers`, each with noise of its own for each `what`."""
        generators = [own_generator(self.options.seed, what, number) for number in numbers]
        return partial(sample_cdit, scheduler=self.options.sampler, steps=steps, generators=generators)

    def require_finite(self, latents: torch.Tensor, what: str) -> torch.Tensor:
        """The latents themselves. Raises NumericsError when they are not numbers."""
        if not bool(torch.isfinite(latents).all()):
            advice = "the checkpoint is broken" if self.policy.compute == "fp32" else "try --precision fp32"
            raise NumericsError(f"{self.options.ckpt}: {what} are not finite in {self.policy}; {advice}")
        return latents


def evaluate_walks(options: WalkOptions, progress: Progress = SILENT) -> WalkReport:
    """Evaluate the CDiT of `options.ckpt` on walks of a store with poses; pictures are compared with the decoded real
    latents. Raises InputError when they do not fit together,
    NumericsError when a prediction is not finite."""
    world, name = _open(options, progress)
    metrics = PictureMetrics(world.device)
    direct: dict[int, list[list[dict[str, float]]]] = {h: [] for h in options.horizons}
    rolled, copied = copy.deepcopy(direct), copy.deepcopy(direct)
    numbers = list(range(len(world.starts)))
    batches = [numbers[i : i + options.batch_size] for i in range(0, len(numbers), options.batch_size)]
    plans = min(options.plans, len(numbers))
    progress.start(len(batches) * (len(options.horizons) + 1) + plans)
    for batch in batches:
        longest = max(options.horizons)
        frames = torch.stack([world.frames(number, longest) for number in batch]).to(world.device)
        context, future = frames[:, : world.context_size], frames[:, world.context_size :]
        real = {h: world.autoencoder.pictures(future[:, h - 1]) for h in options.horizons}
        last = world.autoencoder.pictures(context[:, -1])
        poses = [world.poses(number, longest) for number in batch]
        for h in options.horizons:
            actions = np.stack([goal_actions(p, yaw, 0, [h], world.spacing)[0] for p, yaw in poses])
            prediction = Prediction(
                world.network,
                context,
                torch.from_numpy(actions).float().to(world.device),
                torch.full((len(batch),), h / REL_T_FRAMES, device=world.device),
            )
            predicted = drive(world.sampler(options.steps, batch, h)(prediction))
            world.require_finite(predicted, f"frames {h} ahead")
            direct[h].append(metrics(world.autoencoder.pictures(predicted), real[h]))
            copied[h].append(metrics(last, real[h]))
            progress.advance()
        actions = np.stack([to_actions(local_steps(p, yaw), world.spacing) for p, yaw in poses])
        walked = rollout(
            world.network,
            context,
            torch.from_numpy(actions).float().to(world.device),
            1 / REL_T_FRAMES,
            world.sampler(options.steps, batch, 0),
        )
        world.require_finite(walked, "frames of a rollout")
        for h in options.horizons:
            rolled[h].append(metrics(world.autoencoder.pictures(walked[:, h - 1]), real[h]))
        progress.advance()
    scored = []
    for number in range(plans):
        scored.append(_plan_scores(world, number))
        progress.advance()
    plan = PlanScores(*np.mean(scored, axis=0).tolist()) if scored else None
    return WalkReport(
        network=name,
        policy=str(world.policy),
        walks=len(numbers),
        direct=_means(direct),
        rollout=_means(rolled),
        copy=_means(copied),
        plan=plan,
        not_measured=metrics.not_measured,
    )


def _plan_scores(world: _World, number: int) -> tuple[float, ...]:
    """One plan's, in the order of PlanScores."""
    options = world.options
    frames = world.frames(number, options.plan_steps).to(world.device)
    context, goal = frames[: world.context_size], frames[-1]

    def cost(steps: Float) -> Float:
        """Mean squared distance, in latents, of the last imagined frame from the goal: all from the same noise."""
        costs = []
        for first in range(0, len(steps), options.batch_size):
            part = torch.from_numpy(to_actions(steps[first : first + options.batch_size], world.spacing)).float()
            imagined = rollout(
                world.network,
                context.expand(len(part), *context.shape),
                part.to(world.device),
                1 / REL_T_FRAMES,
                world.sampler(options.plan_sampling_steps, [number] * len(part), _PLANNING),
            )
            world.require_finite(imagined, "imagined frames")
            costs.append((imagined[:, -1] - goal).square().flatten(1).mean(dim=1).double().cpu().numpy())
        return np.concatenate(costs)

    mean = np.tile(world.steps.mean(axis=0), (options.plan_steps, 1))
    planned = cross_entropy_method(
        cost,
        mean,
        np.tile(world.steps.std(axis=0), (options.plan_steps, 1)),
        candidates=options.candidates,
        elites=options.elites,
        iterations=options.iterations,
        generator=np.random.default_rng((options.seed, number)),
    )
    real = local_steps(*world.poses(number, options.plan_steps))
    there, ours, simple = follow(real)[:, :2], follow(planned)[:, :2], follow(mean)[:, :2]
    return (
        float(np.linalg.norm(ours[-1] - there[-1])),
        float(np.linalg.norm(ours - there, axis=1).mean()),
        float(np.linalg.norm(planned[:, :2] - real[:, :2], axis=1).mean()),
        float(np.abs(_wrapped(planned[:, 2] - real[:, 2])).mean()),
        float(np.linalg.norm(simple[-1] - there[-1])),
        float(np.linalg.norm(simple - there, axis=1).mean()),
    )


def _wrapped(angles: Float) -> Float:
    """The same angles in radians from -pi to pi."""
    turned: Float = (angles + np.pi) % (2 * np.pi) - np.pi
    return turned


def _open(options: WalkOptions, progress: Progress) -> tuple[_World, str]:
    if not options.horizons or min(options.horizons) < 1 or min(options.walks, options.plan_steps) < 1:
        raise InputError("eval nwm: horizons, walks and plan steps are at least 1")
    if not 1 <= options.elites <= options.candidates:
        raise InputError(f"elites: got {options.elites} of {options.candidates} candidates; expected 1 to all of them")
    checkpoint = read_checkpoint(options.ckpt)
    network = checkpoint.build()
    if not isinstance(network, CDiT):
        raise InputError(f"{options.ckpt}: is of {checkpoint.about.name}; expected a CDiT")
    reader, spec = open_latents(options.data_path, network.in_channels, checkpoint.about.latents)
    spacing = waypoint_spacing(options.spacing, checkpoint.about.spacing)
    make_scheduler(options.sampler, min(options.steps, options.plan_sampling_steps))  # refuse before any work
    longest = max(*options.horizons, options.plan_steps)
    found = _among(windows(reader, network.context_size + longest), options.names)
    order = np.random.default_rng(options.seed).permutation(len(found))
    starts = [found[place] for place in order[: options.walks]]
    device = open_device(options.device)
    example, batch = checkpoint.about.family.example(network), min(options.batch_size, len(starts))
    policy, notes = settle(
        options.precision, device, "sample", trial=lambda: network_trial(network, example, batch, device)
    )
    for line in notes:
        progress.note(line)
    prepare(network.to(device), policy)
    autoencoder = load_for(spec, network.in_channels, options.autoencoder).prepared(device, PrecisionPolicy())
    steps = np.concatenate([local_steps(*(part[a:b] for part in reader.poses(key))) for key, a, b in _runs(reader)])
    world = _World(options, network, reader, spacing, autoencoder, starts, steps, device, policy)
    return world, checkpoint.about.name


def _among(found: list[tuple[str, int]], names: Path | None) -> list[tuple[str, int]]:
    """The places in walks that are named."""
    if names is None:
        return found
    wanted = set(read_names(names))
    kept = [(key, first) for key, first in found if key in wanted]
    if not kept:
        raise InputError(
            f"{names}: names no walk that is there and long enough; there is {found[0][0]!r}, for instance"
        )
    return kept


def _runs(reader: FrameReader) -> list[tuple[str, int, int]]:
    """Stretches of walks without a missing frame."""
    return [(key, *run) for key in reader.keys() for run in contiguous_runs(reader.numbers(key))]


def _means(scores: dict[int, list[list[dict[str, float]]]]) -> Scores:
    """By horizon and metric, over all walks."""
    flat = {horizon: [one for batch in batches for one in batch] for horizon, batches in scores.items()}
    return {
        str(horizon): {name: round(float(np.mean([one[name] for one in ones])), 4) for name in ones[0]}
        for horizon, ones in flat.items()
    }
