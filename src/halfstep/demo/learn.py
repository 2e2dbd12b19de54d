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
from halfstep.config import validate
from halfstep.data.base import Array
from halfstep.demo.pictures import psnr
from halfstep.machine import open_device
from halfstep.precision import choose, probe
from halfstep.progress import Progress
from halfstep.sample import SampleOptions, sample
from halfstep.store import DatasetStore, TrajectoryStore
from halfstep.train.config import TrainConfig
from halfstep.train.loop import train

_FIRST_STEPS = 8  # to learn how long a step takes
_CURVE_POINTS = 8
_CLIPS, _WALKS, _FRAMES = 8, 4, 6
_SAMPLING_STEPS = 100  # of each predicted frame; a network this young needs the noise that corrects its errors

EQM: dict[str, Any] = {
    "model": {"network": "EqM", "hidden_size": 128, "depth": 5, "num_heads": 4},
    "clip_len": 4,
    "global_batch_size": 16,
    "lr": 1e-3,
    "ema_decay": 0.98,
    "warmup_steps": 20,
}
CDIT: dict[str, Any] = {
    "model": {"network": "CDiT", "hidden_size": 96, "depth": 3, "num_heads": 4},
    "context_size": 2,
    "len_traj_pred": 8,
    "distance": {"min_dist_cat": -2, "max_dist_cat": 4},
    "goals_per_obs": 1,
    "metric_waypoint_spacing": 0.25,
    "batch_size": 16,
    "lr": 2e-3,
    "ema_decay": 0.99,
    "warmup_steps": 20,
}


@dataclass(frozen=True)
class Curve:
    """Loss by step, and seconds of a step."""

    steps: list[int]
    losses: list[float]
    seconds_per_step: float


@dataclass(frozen=True)
class Learned:
    """What the report shows of training, sampling and analysis. `clips` and `walks`: pictures; `walk_psnr` and
    `copy_psnr`: dB by frames ahead, of the predicted frame and of the last context frame in its place; `run_bytes`: of
    the recorded trajectories as stored and in fp32."""

    policy: str
    curves: dict[str, Curve]
    eqm: Curve
    cdit: Curve
    clips: list[Array]
    walks: list[Array]
    walk_psnr: list[float]
    copy_psnr: list[float]
    plots: list[Path]
    run_bytes: tuple[int, int]
    states: int


def learn(output: Path, progress: Progress, seconds: float) -> Learned:
    """Train an EqM on clips of the store in `output` for about `seconds` and a CDiT on its walks for twice as long, in
    the precision that is measured to be fastest; sample from both."""
    policy = choose(open_device("auto"), "train")
    progress.note(f"5/9 train an EqM on clips of four frames, in {policy}")
    eqm = _train_for(output, "eqm", EQM, seconds)
    progress.note(f"    loss {eqm.losses[0]:.2f} to {eqm.losses[-1]:.2f} in {eqm.steps[-1]} steps")
    progress.note("6/9 train a CDiT to predict frames from actions")
    cdit = _train_for(output, "cdit", CDIT, 2 * seconds)
    progress.note(f"    loss {cdit.losses[0]:.3f} to {cdit.losses[-1]:.3f} in {cdit.steps[-1]} steps")
    progress.note("7/9 train the EqM in each precision, from the same weights with the same noise")
    steps = max(_CURVE_POINTS, min(120, int(seconds / 3 / eqm.seconds_per_step)))
    curves = {name: _train(output, f"curve-{name}", EQM, steps, precision=name) for name in _worthwhile()}
    progress.note("8/9 sample from both, recording every step")
    clips = SampleOptions(output / "runs" / "eqm", output / "clips", number=_CLIPS, format="png", record=True)
    sample(clips)
    walks = SampleOptions(
        output / "runs" / "cdit",
        output / "walks",
        number=_WALKS,
        data_path=output / "latents",
        frames=_FRAMES,
        sampler="ancestral",
        steps=_SAMPLING_STEPS,
    )
    sample(walks)
    walk_psnr, copy_psnr = _walk_psnr(output)
    progress.note("9/9 analyze how the clips came about")
    store = TrajectoryStore.open(output / "clips" / "runs")
    plots = write_output(analyze(store, dict.fromkeys(store, "clips")), output / "analysis", "Clips from an EqM")
    return Learned(
        policy=str(policy),
        curves=curves,
        eqm=eqm,
        cdit=cdit,
        clips=_pictures(output / "clips"),
        walks=_pictures(output / "walks"),
        walk_psnr=walk_psnr,
        copy_psnr=copy_psnr,
        plots=[path for path in plots if path.suffix == ".png"],
        run_bytes=_run_bytes(output / "clips" / "runs", store),
        states=len(store[next(iter(store))]),
    )


def _worthwhile() -> list[str]:
    """fp32, and the half types that are not emulated here: others would take minutes to show nothing."""
    result = probe(open_device("auto"))
    halves = {"bf16": ["bf16-mixed", "bf16-true"], "fp16": ["16-mixed"]}
    return ["fp32", *(name for kind, names in halves.items() if result.speedup(kind, "train") > 1 for name in names)]


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
    facts = json.loads((output / "walks" / "samples.json").read_text())["samples"]
    predicted, copied = [], []
    for fact in facts:
        both = np.asarray(Image.open(output / "walks" / f"{fact['sample']:06d}.png"))
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
