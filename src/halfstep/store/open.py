"""One way to open recorded trajectories, whatever kept them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from upath import UPath

from halfstep.errors import StoreError
from halfstep.files import located
from halfstep.store.legacy import LegacyBatch
from halfstep.store.run import Run
from halfstep.store.trajectory import TrajectoryStore
from halfstep.store.trajectory_layout import RUN_PATTERN


def open_trajectories(path: Path | UPath | str) -> Mapping[str, Run]:
    """The runs recorded in `path`: a trajectory store, also behind a URL, a batch folder of the older one-file-a-step
    format, or the `latents` folder of either. Raises StoreError when there is none."""
    path = located(path)
    store = find_trajectory_store(path)
    if store is not None:
        return TrajectoryStore.open(store)
    if not isinstance(path, Path):
        raise StoreError(f"{path}: no trajectories here (no zarr.json of a group); a batch folder is read on disk only")
    if not path.is_dir():
        raise StoreError(f"{path}: no such folder; expected a trajectory store or a batch folder")
    return LegacyBatch(path)


def find_trajectory_store(path: Path | UPath | str) -> Path | UPath | None:
    """The folder of the trajectory store at `path` or in its `latents`, if there is one."""
    path = located(path)
    folders = (path, path / "latents")
    return next((f for f in folders if (f / "zarr.json").exists() or any(f.glob(RUN_PATTERN))), None)


def readable_runs(runs: Mapping[str, Run]) -> tuple[dict[str, Run], list[str]]:
    """The runs whose metadata can be read, and why the others cannot."""
    readable: dict[str, Run] = {}
    problems = []
    for key in runs:
        try:
            readable[key] = runs[key]
        except StoreError as error:
            problems.append(f"{error}; left out")
    return readable, problems
