"""Batches of one file a step, as the older tool writes them."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

SIGMAS = [1.0, 0.9, 0.7, 0.4]


def write_batch(
    folder: Path, steps: Sequence[int] = (0, 1, 2, 3), suffix: str = ".npy.gz", summary: bool = True, **changes: object
) -> np.ndarray:
    """One run of four scheduler steps as the older tool writes it; the latents, by step."""
    folder.mkdir(parents=True, exist_ok=True)
    latents = np.random.default_rng(0).standard_normal((4, 1, 4, 8, 8)).astype(np.float16)
    for step in steps:
        path = folder / f"step_{step:03d}{suffix}"
        if ".pt" in suffix:
            torch.save(torch.from_numpy(latents)[step], folder / "tensor")
            data = (folder / "tensor").read_bytes()
            (folder / "tensor").unlink()
        else:
            np.save(folder / "array.npy", latents[step])
            data = (folder / "array.npy").read_bytes()
            (folder / "array.npy").unlink()
        path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
        metadata = {
            "video_id": "v",
            "step": step,
            "timestep": 1000 * SIGMAS[step],
            "total_steps": 4,
            "shape": [1, 4, 8, 8],
            "dtype": "torch.float16",
            "prompt": "p",
            "seed": 5,
            "cfg_scale": 6.5,
            "sigma": SIGMAS[step],
            **changes,
        }
        (folder / f"step_{step:03d}_metadata.json").write_text(json.dumps(metadata))
    if summary:
        (folder / "summary.json").write_text(json.dumps({"video_id": "v", "stored_steps": list(steps)}))
    return latents[:, 0].astype(np.float32)
