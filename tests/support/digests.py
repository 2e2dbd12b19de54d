"""Digests of what halfstep writes, to hold a change of the code against.

`python -m tests.support.digests > before.txt`, change, `... > after.txt`, and `diff` says which bits are others now.

Stores, checkpoints, samples and recorded runs are made by the command line on a toy world, in fp32 and in bf16. Digests
belong to one kind of processor: compare only those of one machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# What a change of the code must not change. Logs have times, settings have paths.
_KEPT = ("*.safetensors", "*.parquet", "*.png", "*.npz", "*.npy", "c.*", "c/*")

_SIZES = {"hidden_size": 48, "depth": 2, "num_heads": 4}
_EQM = {"network": "EqM", **_SIZES, "patch_size": 4}
_CDIT = {"network": "CDiT", **_SIZES, "patch_size": 2}
_TRAINING = {"global_batch_size": 4, "steps": 3, "log_every": 1, "results_dir": "runs", "ema_decay": 0.5, "lr": 0.01}
_WALKS = {"context_size": 2, "len_traj_pred": 2, "distance": {"min_dist_cat": -2, "max_dist_cat": 2}}

_RUNS = {
    "eqm-fp32": {"model": _EQM, "data_path": "plain", "precision": "fp32"},
    "eqm-bf16": {"model": _EQM, "data_path": "plain", "precision": "bf16-mixed"},
    "eqm-true": {"model": _EQM, "data_path": "plain", "precision": "bf16-true", "gradient_accumulation_steps": 2},
    "clips": {"model": _EQM, "data_path": "plain", "precision": "fp32", "clip_len": 3, "global_batch_size": 2},
    "pixels": {"model": _EQM, "data_path": "vae", "precision": "fp32", "dispersive_weight": 0.5},
    "encoder": {"model": _EQM, "data_path": "pictures", "precision": "fp32", "image_size": 64},
    "cdit": {"model": _CDIT, "data_path": "plain", "precision": "fp32", "metric_waypoint_spacing": 0.25, **_WALKS},
}
_WALK_SAMPLES = ["--ckpt", "runs/cdit", "-n", "2", "--steps", "3", "--frames", "2", "--data-path", "plain"]
_SAMPLES = {
    "ngd": ["--ckpt", "runs/eqm-fp32", "-n", "3", "--steps", "5", "--record"],
    "gd": ["--ckpt", "runs/eqm-bf16", "-n", "2", "--steps", "4", "--sampler", "gd", "--cfg-scale", "2"],
    "stopping": ["--ckpt", "runs/eqm-fp32", "-n", "3", "--steps", "6", "--stop-below", "1.2", "--record"],
    "heun": ["--ckpt", "runs/eqm-fp32", "-n", "2", "--steps", "3", "--sampler", "heun", "--record"],
    "euler": ["--ckpt", "runs/clips", "-n", "2", "--steps", "3", "--sampler", "euler", "--record", "--format", "gif"],
    "noised": ["--ckpt", "runs/eqm-fp32", "-n", "2", "--steps", "3", "--start-from", "plain"],
    "latents": ["--ckpt", "runs/eqm-true", "-n", "2", "--steps", "3", "--format", "npy", "--precision", "bf16-true"],
    "ancestral": [*_WALK_SAMPLES, "--record"],
    "dpm": [*_WALK_SAMPLES, "--sampler", "dpm++", "--record", "--storage", "fp32"],
}


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _small_vae(folder / "small-vae")
        _halfstep(folder, "toy-world", "-o", "world", "--walks", "3", "--frames", "8")
        (folder / "pictures" / "a").mkdir(parents=True)
        for number, picture in enumerate(sorted((folder / "world" / "walk_000").glob("*.jpg"))):
            shutil.copy(picture, folder / "pictures" / "a" / f"{number}.jpg")
        encode = ["--quiet", "--size", "64", "--batch-size", "4"]
        _halfstep(folder, "encode", "-i", "world", "-o", "plain", *encode, "--precision", "fp32")
        _halfstep(folder, "encode", "-i", "world", "-o", "half", *encode, "--precision", "bf16-true")
        vae = ["--autoencoder", "small-vae", "--moments", "--mirror", "--precision", "bf16-mixed"]
        _halfstep(folder, "encode", "-i", "pictures", "-o", "vae", "--quiet", "--size", "16", *vae)
        for name, settings in _RUNS.items():
            (folder / f"{name}.yaml").write_text(json.dumps({**_TRAINING, **settings, "run_name": name}))
            _halfstep(folder, "train", "--config", f"{name}.yaml", "--quiet")
        for name, arguments in _SAMPLES.items():
            more = [] if "--precision" in arguments else ["--precision", "fp32"]
            _halfstep(folder, "sample", *arguments, *more, "-o", f"samples/{name}", "--quiet")
        for top in ("plain", "half", "vae", *(f"runs/{n}" for n in _RUNS), *(f"samples/{n}" for n in _SAMPLES)):
            sys.stdout.write(f"{top:20} {_digest(folder / top)}\n")


def _halfstep(folder: Path, *arguments: str) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, "-m", "halfstep", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr}")


def _small_vae(folder: Path) -> None:
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.18215,
    ).save_pretrained(folder)


def _digest(folder: Path) -> str:
    """Of names and bytes of all files that are kept."""
    paths = sorted({path for pattern in _KEPT for path in folder.rglob(pattern) if path.is_file()})
    state = hashlib.sha256()
    for path in paths:
        content = _content(path)
        state.update(f"{path.relative_to(folder)} {len(content)} ".encode())
        state.update(content)
    return f"{state.hexdigest()[:24]} {len(paths)} files"


def _content(path: Path) -> bytes:
    """The bytes of a file; of weights and shards the arrays alone, since headers tell of versions and paths."""
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        return data[8 + int.from_bytes(data[:8], "little") :]
    return data


if __name__ == "__main__":
    main()
