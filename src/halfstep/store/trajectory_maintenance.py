"""Look after a trajectory store: read every byte, fold in what a crash left in journals, drop what is damaged."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from upath import UPath

from halfstep.errors import HalfstepError
from halfstep.files import file_errors, fsync_path, write_durably
from halfstep.store.journal import NAME as JOURNAL_NAME
from halfstep.store.journal import is_being_written
from halfstep.store.predictive import first_groups
from halfstep.store.run import Run
from halfstep.store.trajectory import StepReader, TrajectoryStore, read_run
from halfstep.store.trajectory_layout import FORMAT_VERSION, LABELS, RUN_PATTERN, DurableStore, chunk_path, readable
from halfstep.store.trajectory_writer import add_problem, recover_run


@dataclass(frozen=True)
class TrajectoryVerifyReport:
    """What `verify_trajectories` found. `problems` are damage; `incomplete` names runs whose recording did not finish,
    which is none."""

    runs: int
    steps: int
    incomplete: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


@dataclass(frozen=True)
class TrajectoryRepairReport:
    """What `repair_trajectories` did: steps `recovered` from journals by run, and lines about what was `lost`."""

    recovered: dict[str, int]
    lost: list[str]


def verify_trajectories(root: Path | UPath | str) -> TrajectoryVerifyReport:
    """Read every step of every run at `root`; all bytes of latents, labels and journals are under checksums. Raises
    StoreError when there is no store."""
    store = TrajectoryStore.open(root)
    steps, incomplete, problems = 0, [], []
    for key in store.keys():
        try:
            run = store[key]
            if not run.attributes.get("complete"):
                incomplete.append(key)
            damaged = _damaged_groups(store.root, key)
            lines = [line for line in run.problems if line.startswith("damaged:") and "were dropped" not in line]
            problems += [f"{store.root}/{key}: {line}" for line in [*lines, *_miscounted(store.root, key, run)]]
        except HalfstepError as error:
            problems.append(str(error))
            continue
        problems += damaged.values()
        steps += len(run)
    for folder in sorted((f for f in store.root.iterdir() if f.is_dir() and not f.name.startswith(".")), key=str):
        if not (folder / "zarr.json").exists():
            problems.append(f"{folder}: is no run any more, its zarr.json is missing; read another copy of it")
    return TrajectoryVerifyReport(len(store), steps, incomplete, problems)


def repair_trajectories(root: Path | str) -> TrajectoryRepairReport:
    """Bring every run at `root` that nobody is recording into a state without journal and damage.

    Steps in a journal move to the arrays; groups of steps whose bytes are damaged are dropped, with a line among the
    run's problems; the others keep their bytes. A run whose metadata is damaged is left as it is and named. Raises
    StoreError when there is no store.
    """
    root = Path(root)
    if not (root / "zarr.json").exists() and any(root.glob(RUN_PATTERN)):
        with file_errors(root):
            zarr.create_group(DurableStore(root), attributes={"halfstep_trajectories": FORMAT_VERSION})
    store = TrajectoryStore.open(root)
    recovered: dict[str, int] = {}
    lost: list[str] = []
    with file_errors(root):
        _finish_interrupted_repair(root)
        for key in store.keys():
            if is_being_written(root / key / JOURNAL_NAME):
                continue
            for leftover in (root / key).rglob(".*.tmp"):
                leftover.unlink()
            try:
                read_run(root, key)  # its metadata is sound
                if damaged := _damaged_groups(root, key):  # before its journal, which goes on behind what is whole
                    lost.append(_drop_groups(root, key, sorted(damaged)))
                count, line = recover_run(root, key)
                if count:
                    recovered[key] = count
                if line is not None:
                    lost.append(f"{root}/{key}: {line}")
            except HalfstepError as error:
                lost.append(str(error))
    return TrajectoryRepairReport(recovered, lost)


def _miscounted(root: Path | UPath, key: str, run: Run) -> list[str]:
    """A line when the chunks of a run hold more steps than its metadata counts, but for those that a crash kept from
    counting: they are in the journal too."""
    reader = StepReader(root, key)
    stored, held = reader.stored, reader.held
    if held <= stored:
        return []
    labels: Any = zarr.open_array(readable(root), path=f"{key}/steps", mode="r")
    if np.array_equal(labels[stored:held], run.steps[stored:held]):
        return []
    return [f"damaged: its chunks hold {held} steps, latents/zarr.json counts {stored}; read another copy of it"]


def _damaged_groups(root: Path | UPath, key: str) -> dict[int, str]:
    """Groups of steps of a run that cannot be read, and why."""
    damaged: dict[int, str] = {}
    reader = StepReader(root, key)
    for number in range(reader.groups):
        try:
            reader.read_group(number)
        except HalfstepError as error:
            damaged[number] = str(error)
    return damaged


def _finish_interrupted_repair(root: Path) -> None:
    for leftover in (*root.glob(".*.repair"), *root.glob(".*.gone")):
        shutil.rmtree(leftover)
    for started in root.glob(".*.new"):  # a recording that was killed before its first step, if it is not alive
        if not is_being_written(started / JOURNAL_NAME):
            shutil.rmtree(started)
    for old in root.glob(".*.old"):
        key = old.name.removeprefix(".").removesuffix(".old")
        if (root / key).exists():
            shutil.rmtree(old)
        else:  # the copy had not taken its place
            old.rename(root / key)
    fsync_path(root)


def _drop_groups(root: Path, key: str, damaged: list[int]) -> str:
    """Replace the run by a copy without the chunks that damaged groups lie in, made aside and put in its place by
    renaming. Of the last chunk, the groups before the first damaged one stay as they are."""
    run = read_run(root, key)
    copy = root / f".{key}.repair"
    shutil.copytree(root / key, copy)
    group: Any = zarr.open_group(DurableStore(root), path=copy.name, mode="r+")
    array = group["latents"]
    size, stored, dimensions = array.chunks[0], array.shape[0], len(array.shape)
    first_damaged: dict[int, int] = {}  # by chunk, the place in it
    for number in reversed(damaged):
        chunk, place = divmod(number * StepReader(root, key).group, size)
        first_damaged[chunk] = place
    last = (stored - 1) // size
    kept = {chunk: place if chunk == last else 0 for chunk, place in first_damaged.items()}
    keep = np.array([k % size < kept.get(k // size, size) for k in range(stored)])
    places = iter(range(last + 1))
    for chunk in range(last + 1):
        path = chunk_path(copy, chunk, dimensions)
        if kept.get(chunk, size):
            if chunk in kept:
                write_durably(path, first_groups(path.read_bytes(), kept[chunk]))
            path.rename(chunk_path(copy, next(places), dimensions))
        else:
            path.unlink(missing_ok=True)
    array.resize((int(keep.sum()), *array.shape[1:]))
    for name in LABELS:
        values = np.asarray(group[name][:stored])[keep]
        group[name].resize((len(values),))
        group[name][:] = values
    dropped = run.steps[:stored][~keep]
    line = f"damaged: steps {dropped[0]} to {dropped[-1]} ({len(dropped)}) could not be read and were dropped"
    add_problem(group, line)
    for path in [*copy.rglob("*"), copy]:
        fsync_path(path)
    old = root / f".{key}.old"
    (root / key).rename(old)
    copy.rename(root / key)
    fsync_path(root)
    shutil.rmtree(old)
    return f"{root}/{key}: {line}"
