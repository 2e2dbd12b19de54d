"""halfstep bench conditions: how soon a small CDiT hears its action and its context, by how it is begun and trained."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from halfstep.bench.compare import document
from halfstep.config import validate
from halfstep.data.sources import SourceConfig
from halfstep.data.toy_world import PLAYGROUND_SIZE, write_toy_world
from halfstep.encode import EncodeOptions, encode
from halfstep.progress import SILENT, Progress
from halfstep.train.config import TrainConfig
from halfstep.train.loop import train

_HEARD = {"action_scale": 100.0, "positions": "sinusoidal"}
WAYS: dict[str, dict[str, Any]] = {
    "as published": {},
    "velocity": {"predicted": "velocity"},
    "velocity, min-SNR 5": {"predicted": "velocity", "min_snr": 5.0},
    "velocity, scaled actions": {"predicted": "velocity", "action_scale": 100.0},
    "velocity, sinusoidal positions": {"predicted": "velocity", "positions": "sinusoidal"},
    "velocity, both": {"predicted": "velocity", **_HEARD},
    "noise, both": _HEARD,
}


def bench_conditions(
    *, steps: int = 600, walks: int = 100, frames: int = 32, progress: Progress = SILENT
) -> dict[str, Any]:
    """Train a CDiT of 0.8 million weights on `walks` walks of `frames` frames through the playground in each way, with
    the same data in the same order.

    By way: by how much of itself the loss grows when a sample's action, or its context, is that of another sample (the
    mean of the last three looks), and the last loss, which of noise and of velocity are not alike.
    """
    with tempfile.TemporaryDirectory(prefix="halfstep-bench-") as scratch:
        folder = Path(scratch)
        write_toy_world(folder / "world", walks=walks, frames=frames, seed=1, play=True)
        encode([SourceConfig(path=folder / "world")], EncodeOptions(folder / "latents", "toy", size=PLAYGROUND_SIZE))
        progress.start(len(WAYS))
        found = {}
        for name, settings in WAYS.items():
            progress.show(name)
            found[name] = _train(folder, name, settings, steps)
            progress.advance()
    return document("conditions", {}, steps=steps, walks=walks, frames=frames, ways=found)


def _train(folder: Path, name: str, settings: dict[str, Any], steps: int) -> dict[str, Any]:
    values = {
        "model": {"network": "CDiT", "hidden_size": 96, "depth": 3, "num_heads": 4},
        "data_path": str(folder / "latents"),
        "context_size": 2,
        "len_traj_pred": 1,
        "distance": {"min_dist_cat": 1, "max_dist_cat": 1},
        "goals_per_obs": 1,
        "metric_waypoint_spacing": 0.25,
        "batch_size": 16,
        "lr": 1e-3,
        "warmup_steps": 50,
        "grad_clip_val": 1.0,
        "precision": "fp32",
        "num_workers": 0,
        "steps": steps,
        "log_every": max(1, steps // 12),
        "results_dir": str(folder / "results"),
        "run_name": name.replace(",", "").replace(" ", "-"),
        **settings,
    }
    config = validate(values, TrainConfig, "bench")
    train(config)
    records = [json.loads(line) for line in (config.folder / "log.jsonl").read_text().splitlines()]
    last = records[-3:]
    return {
        "action": round(sum(record["effects"]["action"] for record in last) / len(last), 4),
        "context": round(sum(record["effects"]["context"] for record in last) / len(last), 4),
        "loss": round(records[-1]["loss"], 4),
    }
