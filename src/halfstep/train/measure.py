"""halfstep train --measure: steps from latents against steps from pixels, and half against fp32, on one's own data."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import halfstep
from halfstep.autoencoders import load_for
from halfstep.config import validate
from halfstep.data.base import Array
from halfstep.data.frames import FrameReader, latents_spec, open_frames
from halfstep.errors import HalfstepError, InputError, some
from halfstep.files import alone, claim
from halfstep.machine import cores, device_name, open_device, peak_memory_mb
from halfstep.progress import SILENT, Progress
from halfstep.spec import LatentSpec, PixelSpec
from halfstep.team import is_launched
from halfstep.train.config import TrainConfig
from halfstep.train.data import TrainingData, open_data
from halfstep.train.loop import MARKS, train
from halfstep.train.measured import Case, Measured, conditions, saving, types_of
from halfstep.train.resume import would_begin

_ROUNDS = 2
_FEWEST, _MOST, _SECONDS = 2, 16, 4.0  # steps timed in one process; after so long there are no more than the fewest
_NEVER = 10**9  # steps
_ALIKE = 0.1  # relative: encoders in half stay below, another picture's latents are far above


class _Timed(TrainConfig):
    """A training whose pixels are fitted as those of a store were."""

    fitted: PixelSpec

    @property
    def pixels(self) -> PixelSpec:
        return self.fitted


@dataclass(frozen=True)
class Timing:
    """What one process found: seconds of each timed step, and the most memory that it held, in MB."""

    seconds: list[float]
    peak_memory_mb: float


def measure(config: TrainConfig, pixels: Path, progress: Progress = SILENT) -> Measured:
    """Time steps of the training loop from the latents that `config` names, and from the `pixels` that they were made
    of, encoded in every step; the latents in fp32 too, where the run's own policy is another.

    Each case runs in processes of its own, which take turns. Nothing is trained; measured.json is left in the run's
    folder. Raises InputError when the pixels are not those of the latents, or one of them is none.
    """
    if is_launched():
        raise InputError("--measure: times a single process; leave torchrun out")
    if config.data_path is None:
        raise InputError("--measure: needs a latent store as --data-path; it does not measure datasets")
    claim(config.folder, "training run", MARKS)
    device = open_device(config.device)
    spec = _stored_spec(config)
    data = open_data(config, 1)
    about, settled = would_begin(config, data, device)
    _require_same_frames(open_frames(config.data_path), pixels, spec)
    from_pixels = _timed(config, spec, _of_pixels(config, pixels, spec, data))
    open_data(from_pixels, 1)
    for line in settled.notes:
        progress.note(line)

    own = types_of(settled.policy)
    ours, in_fp32, encoding = f"latents, {own}", "latents, fp32", f"pixels, {own}"
    cases = {ours: _timed(config, spec, {"precision": str(settled.policy)})}
    if settled.policy.compute != "fp32":
        cases[in_fp32] = _timed(config, spec, {"precision": "fp32"})
    cases[encoding] = from_pixels.model_copy(update={"precision": str(settled.policy)})
    with alone(config.folder):
        runs = _in_turn(cases, progress)
        samples = data.items_per_step * data.goals
        found = {name: summed_up(parts, samples) for name, parts in runs.items()}
        measured = Measured(
            conditions=conditions(config, about, data, settled.policy, device, 1),
            machine={
                "device": device_name(device),
                "cores": cores(),
                "torch": torch.__version__,
                "halfstep": halfstep.__version__,
            },
            data={
                "latents": str(config.data_path),
                "pixels": str(pixels),
                "autoencoder": spec.autoencoder,
                "fitted": str(spec.pixels),
            },
            cases=found,
            against_fp32=saving(found[ours], found[in_fp32]) if in_fp32 in found and ours != in_fp32 else None,
            against_pixels=saving(found[ours], found[encoding]),
        )
        measured.write(config.folder)
    return measured


def _stored_spec(config: TrainConfig) -> LatentSpec:
    assert config.data_path is not None
    spec = latents_spec(open_frames(config.data_path, config.pixels))
    if spec is None:
        raise InputError(
            f"{config.data_path}: holds pixels already; --measure needs a store of their latents as --data-path: "
            f"`halfstep encode -i {config.data_path} -o LATENTS` makes one"
        )
    if spec.pixels is None or not spec.weights_sha256:
        raise InputError(
            f"{config.data_path}: nothing tells which autoencoder made these latents, of which pixels; --measure needs "
            "a store that `halfstep encode` made of pixels"
        )
    return spec


def _require_same_frames(latents: FrameReader, pixels: Path, spec: LatentSpec) -> None:
    """Raise InputError unless the first frames of some sequences become the latents that are stored for them."""
    assert spec.pixels is not None
    reader = open_frames(pixels, spec.pixels)
    if latents_spec(reader) is not None:
        raise InputError(f"--measure {pixels}: holds latents; name the pixels that they were made of")
    wanted = "name the folder that the latents were encoded from"
    keys, there = latents.keys(), set(reader.keys())
    if absent := [key for key in keys if key not in there]:
        raise InputError(
            f"--measure {pixels}: lacks {len(absent)} of the {len(keys)} sequences of the latents "
            f"({some(absent, 3)}); {wanted}"
        )
    autoencoder = load_for(spec, spec.channels)
    for key in sorted({keys[0], keys[len(keys) // 2], keys[-1]}):
        number = int(latents.numbers(key)[0])
        places = np.flatnonzero(reader.numbers(key) == number)
        if not len(places) or places[0] + spec.pixels.clip_length > reader.length(key):
            raise InputError(f"--measure {pixels}: {key} has no frame {number}, the latents have one; {wanted}")
        frames = torch.from_numpy(reader.read(key, int(places[0]), int(places[0]) + spec.pixels.clip_length))
        items = frames.movedim(0, 1)[None] if spec.temporal_factor > 1 else frames
        made = autoencoder.scaled(autoencoder.encode(items).mean)[0].numpy()
        if not _alike(made, latents.read(key, 0, 1)[0]):
            raise InputError(f"--measure {pixels}: frame {number} of {key} is another than the latents'; {wanted}")


def _alike(made: Array, stored: Array) -> bool:
    return bool(np.linalg.norm(made - stored) <= _ALIKE * np.linalg.norm(made))


def _of_pixels(config: TrainConfig, pixels: Path, spec: LatentSpec, data: TrainingData) -> dict[str, Any]:
    """The settings of the same training from the pixels."""
    assert spec.pixels is not None
    changes: dict[str, Any] = {
        "data_path": str(pixels),
        "autoencoder": spec.autoencoder,
        "revision": spec.revision or None,
    }
    if spec.pixels.clip_length > 1:
        changes["clip_len"] = spec.pixels.clip_length
    if config.family.items == "walks":
        changes["metric_waypoint_spacing"] = data.spacing  # which the name of the latents may have told
    return changes


def _timed(config: TrainConfig, spec: LatentSpec, changes: dict[str, Any]) -> _Timed:
    """The config with `changes`, of a run that neither ends nor leaves anything but a line."""
    quiet = {"steps": _NEVER, "log_every": _NEVER, "ckpt_every": _NEVER, "tensorboard": False, "wandb": False}
    values = {**config.document(), **quiet, **changes, "fitted": spec.pixels}
    return validate(values, _Timed, "--measure")


def _in_turn(cases: dict[str, _Timed], progress: Progress) -> dict[str, list[Timing]]:
    """Each case once a round, so that a busy moment falls on all of them."""
    runs: dict[str, list[Timing]] = {name: [] for name in cases}
    progress.start(_ROUNDS * len(cases))
    with tempfile.TemporaryDirectory(prefix="halfstep-measure-") as scratch:
        for number in range(_ROUNDS):
            for place, (name, case) in enumerate(cases.items()):
                folder = {"results_dir": Path(scratch), "run_name": f"{number}-{place}"}
                runs[name].append(_in_own_process(name, case.model_copy(update=folder)))
                progress.advance()
                progress.show(f"{name}: {statistics.median(runs[name][-1].seconds):.3g} s a step")
    return runs


def _in_own_process(name: str, case: _Timed) -> Timing:
    command = [sys.executable, "-c", "from halfstep.train.measure import print_own_times; print_own_times()"]
    result = subprocess.run(command, input=json.dumps(case.document()), capture_output=True, text=True, check=False)
    lines = result.stdout.splitlines()
    if result.returncode != 0 or not lines:
        why = (result.stderr.splitlines() or ["it said nothing"])[-1]
        raise HalfstepError(f"--measure: {name}: the process ended with {result.returncode} ({why})")
    return Timing(**json.loads(lines[-1]))


def print_own_times() -> None:
    """Time the training that standard input describes in this process, and print what was found."""
    config = _Timed.model_validate(json.load(sys.stdin))
    clock = _Clock(open_device(config.device))
    try:
        train(config, clock)
    except _Enough:
        sys.stdout.write(json.dumps(asdict(clock.found())) + "\n")


class _Enough(Exception):
    """All steps that are wanted have been timed: the run is left there, without a checkpoint."""


class _Clock(Progress):
    """Notes when steps end. The first one, in which all is made ready, is not timed."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._ends = device, list[float]()

    def advance(self, units: int = 1, *, written: int = 0) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._ends.append(time.perf_counter())
        timed = len(self._ends) - 1
        if timed == _MOST or (timed >= _FEWEST and self._ends[-1] - self._ends[0] > _SECONDS):
            raise _Enough

    def found(self) -> Timing:
        return Timing(np.diff(self._ends).tolist(), peak_memory_mb(self._device))


def summed_up(runs: list[Timing], samples: int) -> Case:
    """Steps of `samples` samples. Each process counts alike: in a busy moment it gets fewer steps done."""
    seconds = statistics.median(statistics.median(run.seconds) for run in runs)
    return Case(
        seconds_per_step=_rounded(seconds),
        smallest=_rounded(min(min(run.seconds) for run in runs)),
        largest=_rounded(max(max(run.seconds) for run in runs)),
        samples_per_second=_rounded(samples / seconds),
        peak_memory_mb=round(statistics.median(run.peak_memory_mb for run in runs), 1),
        steps=sum(len(run.seconds) for run in runs),
    )


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
