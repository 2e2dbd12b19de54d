"""Small runs, and what they leave."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from halfstep.config import validate
from halfstep.progress import Progress
from halfstep.train.config import TrainConfig

SMALL = {"network": "EqM", "hidden_size": 32, "depth": 2, "num_heads": 2}
SMALL_CDIT = {**SMALL, "network": "CDiT"}
WALKS = {
    "context_size": 2,
    "len_traj_pred": 4,
    "distance": {"min_dist_cat": -2, "max_dist_cat": 4},
    "goals_per_obs": 2,
    "metric_waypoint_spacing": 0.25,
}


def config(folder: Path, latents: Path | str, **changes: Any) -> TrainConfig:
    values = {
        "model": SMALL,
        "data_path": str(latents),
        "results_dir": str(folder),
        "run_name": "run",
        "precision": "fp32",
        "global_batch_size": 8,
        "lr": 1e-3,
        "ema_decay": 0.9,
        "log_every": 2,
        "ckpt_every": 100,
        "steps": 6,
        "device": "cpu",
    }
    return validate({**values, **changes}, TrainConfig, "test")


def run_folder(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    newest = max((folder / "run" / "checkpoints").iterdir())
    return {path.name: load_file(path) for path in newest.glob("*.safetensors")}


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]


def assert_same(ours: dict[str, dict[str, torch.Tensor]], theirs: dict[str, dict[str, torch.Tensor]]) -> None:
    assert ours.keys() == theirs.keys()
    for file, tensors in ours.items():
        assert tensors.keys() == theirs[file].keys()
        for name, value in tensors.items():
            assert torch.equal(value, theirs[file][name]), f"{file}: {name}"


def read_state(folder: Path) -> dict[str, Any]:
    newest = max((folder / "run" / "checkpoints").iterdir())
    return json.loads((newest / "state.json").read_text())


def rewrite(path: Path, weights: dict[str, torch.Tensor]) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(weights, path, metadata)


class Listening(Progress):
    """Keeps what a user is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, line: str) -> None:
        self.notes.append(line)
