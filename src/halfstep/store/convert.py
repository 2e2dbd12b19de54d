"""Recorded runs from the older one-file-a-step format into a TrajectoryStore, and back."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upath import UPath

from halfstep.errors import InputError, StoreError
from halfstep.files import claim, file_errors, write_durably
from halfstep.progress import SILENT, Progress
from halfstep.settings import require_same
from halfstep.store.legacy import LegacyBatch, step_bytes
from halfstep.store.open import find_trajectory_store
from halfstep.store.run import Float32, Run
from halfstep.store.trajectory import TrajectoryStore
from halfstep.store.trajectory_layout import TrajectoryFormat


@dataclass(frozen=True)
class ConvertReport:
    """Runs `converted` and `skipped` (there from an earlier call), steps written, bytes of the result on disk and of
    the same steps in fp32, and lines about what could not be taken over."""

    converted: int
    skipped: int
    steps: int
    bytes: int
    fp32_bytes: int
    notes: list[str]


def to_store(
    runs: Mapping[str, Run], root: Path | str, format: TrajectoryFormat, progress: Progress = SILENT
) -> ConvertReport:
    """Copy `runs` into the store at `root`, made when it is not there; runs that are complete there are left alone.

    Problems of a run stay with it, and a run that did not finish stays incomplete. `progress` hears of each run. Raises
    InputError when a run of the name is there that this did not write.
    """
    store = TrajectoryStore.create(root)
    skipped, steps, fp32_bytes, notes = 0, 0, 0, []
    progress.start(len(runs))
    for key in runs:
        run = runs[key]
        progress.advance()
        if key in store:
            there = store[key].attributes
            if "converted" not in there:
                raise InputError(f"{store.root}: has a run {key!r} of its own; name another store")
            if there["converted"] == "whole":
                _hold_against(store[key], run, f"{store.root}/{key}", format)
                skipped += 1
                continue
            store.remove(key)
        attributes = {"prompt": run.prompt, "seed": run.seed, **run.attributes, "converted": "partly"}
        attributes = {
            name: value for name, value in attributes.items() if not name.startswith(("latents_", "complete"))
        }
        writer = store.record(key, format, **{name: v for name, v in attributes.items() if v is not None})
        written = 0
        problems = [line for line in run.problems if not line.startswith("incomplete: ")]
        try:
            for k, latents in _readable_steps(run, problems):
                writer.append(int(run.steps[k]), float(run.timesteps[k]), float(run.sigmas[k]), latents)
                writer.pack()
                written += 1
            writer.finish(complete=bool(run.attributes.get("complete")), problems=problems, converted="whole")
        finally:
            writer.close()
        steps += written
        fp32_bytes += 4 * written * math.prod(run.latents.shape[1:])
        notes += [f"{key}: {line}" for line in problems]
        progress.show(f"{key}: {written} steps")
    return ConvertReport(len(runs) - skipped, skipped, steps, folder_bytes(store.root), fp32_bytes, notes)


def to_batch(runs: Mapping[str, Run], root: Path | str, progress: Progress = SILENT) -> ConvertReport:
    """Write `runs` as a batch folder of the older format at `root`: `.npy.gz` in float32, or float16 where the run says
    that it came from such files. A run whose summary.json is there is left alone.

    File i holds the state after scheduler step i and is labeled with the noise level before it, as that format has
    it; the initial noise has no place in it and is left out.
    """
    root = Path(root)
    latents_folder = root / "latents"
    if find_trajectory_store(root) is not None:
        raise InputError(f"{root}: is a trajectory store; name a folder for the batch")
    claim(root, "batch of recorded runs", ("latents",))
    skipped, steps, fp32_bytes, notes = 0, 0, 0, []
    progress.start(len(runs))
    for key in runs:
        run = runs[key]
        progress.advance()
        folder = latents_folder / _folder_name(key)
        if (folder / "summary.json").exists():
            _hold_against(LegacyBatch(root)[key], run, str(folder))
            skipped += 1
            continue
        problems = list(run.problems)
        with file_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            written = _write_run(run, folder, problems)
        if run.steps.size and run.attributes.get("initial_noise", True) and run.steps[0] == 0:
            notes.append(f"{key}: the initial noise has no place in this format and was left out")
        notes += [f"{key}: {line}" for line in problems]
        steps += written
        fp32_bytes += 4 * written * math.prod(run.latents.shape[1:])
        progress.show(f"{key}: {written} steps")
    return ConvertReport(len(runs) - skipped, skipped, steps, folder_bytes(latents_folder), fp32_bytes, notes)


def folder_bytes(folder: Path | UPath) -> int:
    """The bytes of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _folder_name(key: str) -> Path:
    match = re.fullmatch(r"(prompt_\d+)_vid(\d+)", key)
    return Path(match[1]) / f"vid_{match[2]}" if match else Path(key) / "vid_001"


def _hold_against(there: Run, run: Run, where: str, format: TrajectoryFormat | None = None) -> None:
    """Raise InputError when what is there from an earlier call is another run, or was kept in another format."""
    before, now = (
        {"prompt": each.prompt, "seed": each.seed, "shape": list(each.latents.shape[1:])} for each in (there, run)
    )
    if format is not None:
        before["format"], now["format"] = there.attributes.get("latents_format", str(format)), str(format)
    require_same(where, "run", before, now, advice="name another place")


def _readable_steps(run: Run, problems: list[str]) -> Iterator[tuple[int, Float32]]:
    """Place and latents of each step; those whose bytes are damaged are left out with a line among `problems`."""
    for k in range(len(run)):
        try:
            latents = run.latents[k]
        except StoreError as error:
            problems.append(f"damaged: step {run.steps[k]} was left out ({error})")
            continue
        yield k, latents


def _write_run(run: Run, folder: Path, problems: list[str]) -> int:
    after_step = run.attributes.get("initial_noise", True)  # whether step 0 is the noise, so that files count from one
    labels = _labels(run)
    dtype = "float16" if run.attributes.get("dtype") == "torch.float16" else "float32"
    total = run.attributes.get("total_steps")
    if total is None and run.attributes.get("complete") and len(run):
        total = int(run.steps[-1])
    numbers = []
    for k, latents in _readable_steps(run, problems):
        number = int(run.steps[k]) - 1 if after_step else int(run.steps[k])
        if number < 0:
            continue
        sigma, timestep = labels[k]
        metadata = {
            "video_id": run.key,
            "step": number,
            "timestep": timestep,
            "total_steps": total,
            "shape": [1, *latents.shape],
            "dtype": f"torch.{dtype}",
            "prompt": run.prompt,
            "seed": run.seed,
            "cfg_scale": run.attributes.get("guidance"),
            "generation_time": None,
            "sigma": sigma,
        }
        write_durably(folder / f"step_{number:03d}.npy.gz", step_bytes(latents, dtype))
        write_durably(folder / f"step_{number:03d}_metadata.json", json.dumps(metadata, indent=2).encode())
        numbers.append(number)
    if any(labels[k][0] is None for k in range(len(run)) if int(run.steps[k]) > 0):
        problems.append(
            "missing: the noise levels before some steps, which this format labels them with, were not kept"
        )
    if run.attributes.get("complete"):
        summary: dict[str, Any] = {
            "video_id": run.key,
            "stored_steps": numbers,
            "total_stored": len(numbers),
            "storage_dir": str(folder.parent.parent),
            "storage_format": "numpy",
            "compressed": True,
        }
        write_durably(folder / "summary.json", json.dumps(summary, indent=2).encode())
    return len(numbers)


def _labels(run: Run) -> list[tuple[float | None, float | None]]:
    """Sigma and timestep before each stored state's step; None where they were not kept."""
    if "sigma_labels" in run.attributes:
        return list(zip(run.attributes["sigma_labels"], run.attributes["timestep_labels"], strict=True))
    level = {int(step): (float(run.sigmas[k]), float(run.timesteps[k])) for k, step in enumerate(run.steps)}
    return [level.get(int(step) - 1, (None, None)) for step in run.steps]
