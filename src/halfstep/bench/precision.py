"""halfstep bench precision: does half precision learn what fp32 learns? Training curves over several seeds."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from halfstep.bench.compare import document
from halfstep.config import validate
from halfstep.data.sources import SourceConfig
from halfstep.data.toy_world import write_toy_world
from halfstep.encode import EncodeOptions, encode
from halfstep.errors import InputError
from halfstep.files import replacing
from halfstep.train.config import TrainConfig
from halfstep.train.loop import train

_SIZES = {"network": "EqM", "hidden_size": 96, "depth": 4, "num_heads": 4}


def bench_precision(
    *,
    precisions: tuple[str, ...] = ("fp32", "bf16-mixed", "bf16-true"),
    seeds: int = 5,
    steps: int = 600,
    plot: Path | None = None,
) -> dict[str, Any]:
    """Train a small EqM on the toy world with each precision and seed; loss by step, a mean over 20 steps.

    A seed decides initial weights, order and noise, in all precisions alike. `within_seed_spread` says whether the mean
    curve of a precision lies within the fp32 seeds' smallest and largest at every point. `plot` writes the curves.
    Raises InputError where there is no place for it.
    """
    if plot is not None and (plot.is_dir() or not plot.parent.is_dir()):
        raise InputError(f"--plot: got {plot}; expected a file in a folder that is there")
    curves: dict[str, list[list[float]]] = {precision: [] for precision in precisions}
    with tempfile.TemporaryDirectory(prefix="halfstep-bench-") as scratch:
        folder = Path(scratch)
        write_toy_world(folder / "world", walks=16, frames=32)
        options = EncodeOptions(folder / "latents", size=(128, 128), batch_size=4)
        encode([SourceConfig(path=folder / "world")], options)
        for seed in range(seeds):
            for precision in precisions:
                values = {
                    "model": _SIZES,
                    "data_path": str(folder / "latents"),
                    "results_dir": str(folder),
                    "run_name": f"{precision}-{seed}",
                    "precision": precision,
                    "global_seed": seed,
                    "global_batch_size": 16,
                    "lr": 1e-3,
                    "warmup_steps": 20,
                    "steps": steps,
                    "log_every": 20,
                    "ckpt_every": steps,
                }
                report = train(validate(values, TrainConfig, "bench"))
                lines = (Path(report.run) / "log.jsonl").read_text().splitlines()
                curves[precision].append([json.loads(line)["loss"] for line in lines])
    means = {precision: np.mean(values, axis=0) for precision, values in curves.items()}
    fp32 = np.array(curves[precisions[0]])
    points = [20 * (i + 1) for i in range(fp32.shape[1])]
    apart = {p: np.abs(means[p] - means[precisions[0]]) / means[precisions[0]] for p in precisions[1:]}
    if plot is not None:
        _plot(plot, points, curves)
    return document(
        "precision",
        {},
        network=_SIZES,
        seeds=seeds,
        steps=steps,
        final_loss={
            p: {"mean": round(float(v[-1]), 4), "seeds": [round(c[-1], 4) for c in curves[p]]} for p, v in means.items()
        },
        largest_difference_of_means={p: round(float(v.max()), 5) for p, v in apart.items()},
        largest_difference_of_a_seed={
            p: round(float((np.abs(np.array(curves[p]) - fp32) / fp32).max()), 5) for p in precisions[1:]
        },
        spread_of_seeds=round(float(((fp32.max(axis=0) - fp32.min(axis=0)) / fp32.mean(axis=0)).mean()), 5),
        within_seed_spread={
            p: bool(((means[p] >= fp32.min(axis=0)) & (means[p] <= fp32.max(axis=0))).all()) for p in precisions[1:]
        },
        curves={p: [[round(loss, 4) for loss in curve] for curve in values] for p, values in curves.items()},
    )


def _plot(path: Path, points: list[int], curves: dict[str, list[list[float]]]) -> None:
    from matplotlib.figure import Figure

    colors = ["#1d2430", "#2f6fed", "#e07a1f", "#3b9a5a"]
    figure = Figure(figsize=(11, 4.2), layout="tight")
    loss, difference = figure.subplots(1, 2)
    base = np.array(next(iter(curves.values())))
    for (precision, values), color in zip(curves.items(), colors, strict=False):
        seeds = np.array(values)
        loss.fill_between(points, seeds.min(axis=0), seeds.max(axis=0), color=color, alpha=0.15, linewidth=0)
        loss.plot(points, seeds.mean(axis=0), color=color, label=precision, linewidth=1.6)
        relative = (seeds.mean(axis=0) / base.mean(axis=0) - 1) * 100
        difference.plot(points, relative, color=color, label=precision, linewidth=1.6)
    spread = (base / base.mean(axis=0) - 1) * 100
    difference.fill_between(
        points, spread.min(axis=0), spread.max(axis=0), color=colors[0], alpha=0.12, linewidth=0, label="fp32 seeds"
    )
    loss.set_title(f"Training loss, mean and range of {len(base)} seeds")
    difference.set_title("Difference of the means from fp32, %")
    for axes in (loss, difference):
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=130, format="png")
