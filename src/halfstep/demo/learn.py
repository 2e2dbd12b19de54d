"""The second half of the demonstration: train on the latents, sample with every step recorded, analyze."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from halfstep.analyze import analyze, write_output
from halfstep.autoencoders import load_for
from halfstep.config import load_yaml, validate
from halfstep.data.base import Array
from halfstep.demo.pictures import psnr
from halfstep.machine import open_device
from halfstep.models import read_checkpoint
from halfstep.precision import PRESETS, prepare, probe, simulate
from halfstep.precision.memory import with_batch
from halfstep.progress import Progress
from halfstep.sample import SampleOptions, sample
from halfstep.shipped import shipped
from halfstep.store import DatasetStore, TrajectoryStore
from halfstep.train.config import TrainConfig
from halfstep.train.loop import train

_FIRST_STEPS = 8  # to learn how long a step takes
_CURVE_POINTS = 8
_CLIPS, _WALKS, _FRAMES = 8, 4, 8
_YOUNG = 2  # samples of each network that began anew
_SAMPLING_STEPS = 6  # of each predicted frame
_HALVES = {"bf16": "bf16-true", "fp16": "16-true"}

# In place of the recipes' own: minutes, not an hour.
_SHORT = {"batch_size": 16, "lr": 3e-4, "ema_decay": 0.99, "warmup_steps": 20}
_SCRATCH = {"lr": 1e-3}  # of a network that begins anew


@dataclass(frozen=True)
class Curve:
    """Loss by step, and seconds of a step."""

    steps: list[int]
    losses: list[float]
    seconds_per_step: float


@dataclass(frozen=True)
class Trained:
    """A network that went on from shipped weights, and one that began anew and was trained for as long. `pictures`: of
    the first, and `young` of the other."""

    shipped: Curve
    scratch: Curve
    pictures: list[Array]
    young: list[Array]


@dataclass(frozen=True)
class Learned:
    """What the report shows of training, sampling and analysis. `walk_psnr` and `copy_psnr`: dB by frames ahead, of the
    predicted frame and of the last context frame in its place; `half_errors`: of one step of the CDiT, by half type,
    relative to the fp32 output, and whether it was simulated; `run_bytes`: of the recorded trajectories as stored and
    in fp32."""

    policy: str
    curves: dict[str, Curve]
    eqm: Trained
    cdit: Trained
    walk_psnr: list[float]
    copy_psnr: list[float]
    half_errors: dict[str, tuple[float, bool]]
    plots: list[Path]
    run_bytes: tuple[int, int]
    states: int


def learn(output: Path, progress: Progress, seconds: float) -> Learned:
    """Train an EqM on clips of the store in `output` and a CDiT on its walks, each for about `seconds` in all: half of
    it from shipped weights, half of it anew, in the precision that is measured to be fastest; sample from all four."""
    progress.note("5/9 train an EqM on clips of four frames, from shipped weights and from none")
    eqm = _train_both(output, "eqm", seconds / 2, progress)
    progress.note("6/9 train a CDiT to predict frames from actions, from shipped weights and from none")
    cdit = _train_both(output, "cdit", seconds / 2, progress)
    progress.note("7/9 train the EqM in each precision, from the same weights with the same noise")
    steps = max(_CURVE_POINTS, min(80, int(seconds / 4 / eqm[0].seconds_per_step)))
    curves = {
        name: _train(output, f"curve-{name}", {**_recipe("eqm"), **_SCRATCH}, steps, precision=name)
        for name in worthwhile("train", "fp32", "bf16-mixed", "bf16-true", "16-mixed")
    }
    progress.note("8/9 sample from all of them, recording every step")
    pictures = {
        "eqm": _clips(output, "eqm", _CLIPS),
        "eqm-scratch": _clips(output, "eqm-scratch", _YOUNG),
        "cdit": _walks(output, "cdit", _WALKS),
        "cdit-scratch": _walks(output, "cdit-scratch", _YOUNG),
    }
    walk_psnr, copy_psnr = _walk_psnr(output)
    progress.note("9/9 analyze how the clips came about, and what half precision costs")
    store = TrajectoryStore.open(output / "clips" / "eqm" / "runs")
    plots = write_output(analyze(store, dict.fromkeys(store, "clips")), output / "analysis", "Clips from an EqM")
    return Learned(
        policy=json.loads((output / "runs" / "eqm" / "log.jsonl").read_text().splitlines()[-1])["policy"],
        curves=curves,
        eqm=Trained(*eqm, pictures["eqm"], pictures["eqm-scratch"]),
        cdit=Trained(*cdit, pictures["cdit"], pictures["cdit-scratch"]),
        walk_psnr=walk_psnr,
        copy_psnr=copy_psnr,
        half_errors={name: _half_error(output / "runs" / "cdit", name) for name in _HALVES},
        plots=[path for path in plots if path.suffix == ".png"],
        run_bytes=_run_bytes(output / "clips" / "eqm" / "runs", store),
        states=len(store[next(iter(store))]),
    )


def worthwhile(task: str, *presets: str) -> list[str]:
    """Those of the presets whose half types are not emulated here: others would take minutes to show nothing."""
    result = probe(open_device("auto"))
    return [
        name for name in presets if (compute := PRESETS[name].compute) == "fp32" or result.speedup(compute, task) > 1
    ]


def _recipe(name: str) -> dict[str, Any]:
    """The settings by which the shipped network was trained."""
    return {**load_yaml(shipped(name) / "train.yaml", dict[str, Any]), **_SHORT}


def _train_both(output: Path, name: str, seconds: float, progress: Progress) -> tuple[Curve, Curve]:
    """From shipped weights, and anew."""
    settings = _recipe(name)
    shipped_run = _train_for(output, name, {**settings, "ckpt": str(shipped(name))}, seconds)
    scratch = _train_for(output, f"{name}-scratch", {**settings, **_SCRATCH}, seconds)
    for how, curve in (("from shipped weights", shipped_run), ("anew", scratch)):
        progress.note(f"    {how}: loss {curve.losses[0]:.3f} to {curve.losses[-1]:.3f} in {curve.steps[-1]} steps")
    return shipped_run, scratch


def _clips(output: Path, run: str, number: int) -> list[Array]:
    folder = output / "clips" / run
    sample(SampleOptions(output / "runs" / run, folder, number=number, format="png", record=True))
    return _pictures(folder)


def _walks(output: Path, run: str, number: int) -> list[Array]:
    folder = output / "walks" / run
    options = SampleOptions(
        output / "runs" / run,
        folder,
        number=number,
        data_path=output / "latents",
        frames=_FRAMES,
        sampler="dpm++",
        steps=_SAMPLING_STEPS,
    )
    sample(options)
    return _pictures(folder)


@torch.no_grad()
def _half_error(run: Path, name: str) -> tuple[float, bool]:
    """Of one step of a network in a half type: rms(half - fp32) / rms(fp32), and whether half had to be simulated."""
    checkpoint, device = read_checkpoint(run), open_device("auto")
    network = checkpoint.build().to(device)
    example = with_batch(checkpoint.about.family.example(network), 8)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(value.shape, generator=generator).to(device) for value in example]
    exact = network(*inputs)
    if simulated := probe(device).speedup(name, "sample") < 1:
        with simulate(network, _HALVES[name]) as run_in_half:
            half = run_in_half(*inputs)
    else:
        half = prepare(network, PRESETS[_HALVES[name]])(*inputs)
    error = (half.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    return float(error), simulated


def _train_for(output: Path, name: str, settings: dict[str, Any], seconds: float) -> Curve:
    """A few steps to learn their time, then the same run goes on."""
    first = _train(output, name, settings, _FIRST_STEPS)
    return _train(output, name, settings, max(2 * _FIRST_STEPS, int(seconds / first.seconds_per_step)))


def _train(output: Path, name: str, settings: dict[str, Any], steps: int, precision: str = "auto") -> Curve:
    values = {
        **settings,
        "data_path": str(output / "latents"),
        "results_dir": str(output / "runs"),
        "run_name": name,
        "precision": precision,
        "steps": steps,
        "log_every": max(1, steps // _CURVE_POINTS),
    }
    train(validate(values, TrainConfig, "demo"))
    records = [json.loads(line) for line in (output / "runs" / name / "log.jsonl").read_text().splitlines()]
    usual = float(np.median([record["seconds_per_step"] for record in records]))
    return Curve([record["step"] for record in records], [record["loss"] for record in records], usual)


def _walk_psnr(output: Path) -> tuple[list[float], list[float]]:
    """Mean PSNR of the frames of walks by frames ahead, and of the last context frame against the same real ones."""
    store = DatasetStore.open(output / "latents")
    autoencoder = load_for(store.spec, store.spec.channels)
    folder = output / "walks" / "cdit"
    facts = json.loads((folder / "samples.json").read_text())["samples"]
    predicted, copied = [], []
    for fact in facts:
        both = np.asarray(Image.open(folder / f"{fact['sample']:06d}.png"))
        now = int(np.flatnonzero(store.read_array(fact["walk"], "frame") == fact["frame"])[0])
        last = autoencoder.pictures(torch.from_numpy(store.read(fact["walk"], now, now + 1)))[0]
        height, width = last.shape[:2]
        columns = [slice(k * (width + 1), k * (width + 1) + width) for k in range(_FRAMES)]
        real = [both[:height, column] for column in columns]
        predicted.append([psnr(a, both[height + 1 :, column]) for a, column in zip(real, columns, strict=True)])
        copied.append([psnr(a, last) for a in real])
    return np.mean(predicted, axis=0).tolist(), np.mean(copied, axis=0).tolist()


def _pictures(folder: Path) -> list[Array]:
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))]


def _run_bytes(folder: Path, store: TrajectoryStore) -> tuple[int, int]:
    stored = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return stored, sum(4 * len(run) * int(np.prod(run.latents[0].shape)) for run in store.values())
