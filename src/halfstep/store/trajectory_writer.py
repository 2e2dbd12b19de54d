"""RunWriter: record one run into a store, a step at a time; each step is durable on its own."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from halfstep.errors import InputError, StoreError
from halfstep.files import file_errors, fsync_path, write_durably
from halfstep.store.formats import to_storage
from halfstep.store.journal import NAME as JOURNAL_NAME
from halfstep.store.journal import Journal, JournalEntry, is_being_written, read_journal, read_values, steps_after
from halfstep.store.predictive import Accuracy, Noise, first_groups
from halfstep.store.run import Float32
from halfstep.store.trajectory_layout import (
    LABEL_CHUNK,
    LABELS,
    DurableStore,
    TrajectoryFormat,
    check_key,
    chunk_path,
    sealed,
    with_crc32c,
)

# Names of the axes of a step, by the axis of its channels.
_DIMENSIONS = {
    ("token", "channel"): 1,
    ("channel", "height", "width"): 0,
    ("channel", "frame", "height", "width"): 0,
    ("frame", "channel", "height", "width"): 1,
}


class RunWriter:
    """Writes the run `key` of the store at `root`. Not safe for several threads.

    `append` makes a step durable in the journal; `pack` moves full groups from there to the arrays. After `finish` the
    run is complete; `close` alone leaves it incomplete, with every step that was appended. The order of writes is
    labels, latents, shape of `latents` (from here on the steps count), journal: whenever it stops, readers see each
    step once. Raises InputError when the name is taken or an attribute is no JSON.
    """

    def __init__(self, root: Path, key: str, format: TrajectoryFormat, attributes: dict[str, Any]) -> None:
        check_key(key)
        try:
            json.dumps(attributes, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"{root}/{key}: attributes must be JSON ({error})") from error
        self._folder, self._format = root / key, format
        self._noise = Noise.of(attributes)
        self._problems: list[str] = []
        self._finished = False
        self._shape: tuple[int, ...] | None = None
        self._labels = _Labels()
        self._waiting: list[JournalEntry] = []
        self._last_step = -1
        # Under another name first, so that a folder with a run's name is a run, whenever a crash comes.
        made = root / f".{key}.{os.getpid()}.new"
        with file_errors(self._folder):
            if self._folder.exists():
                raise self._taken()
            made.mkdir()
            self._journal = Journal(made / JOURNAL_NAME)
            try:
                started = sealed({**attributes, "complete": False, "problems": []})
                zarr.create_group(DurableStore(root), path=made.name, attributes=started)
                made.rename(self._folder)
            except OSError as error:
                self._journal.close()
                shutil.rmtree(made)
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # someone was faster
                    raise self._taken() from None
                raise
            self._journal.path = self._folder / JOURNAL_NAME
            fsync_path(root)
            self._group = zarr.open_group(DurableStore(root), path=key, mode="r+")

    def _taken(self) -> InputError:
        alive = is_being_written(self._folder / JOURNAL_NAME)
        state = "being recorded by another process" if alive else "in the store"
        return InputError(
            f"{self._folder}: a run of this name is already {state}; choose another name, or delete that folder"
        )

    def append(self, step: int, timestep: float, sigma: float, latents: Float32) -> None:
        """Add the state `latents` [C, (T,) H, W], or packed [tokens, C], at noise level `sigma`; when this returns, it
        is durable.

        Values that are not finite are kept as they are and noted among the run's problems, except that a format of
        fp16 raises NumericsError for them and for values beyond its range. Raises InputError when the shape is not
        that of the steps before, `step` does not grow, or a label is infinite; NaN is a label that is not known.
        """
        if self._shape is not None and latents.shape != self._shape:
            raise InputError(
                f"{self._folder}: step {step} has the shape {list(latents.shape)}, the steps before "
                f"{list(self._shape)}; record another shape as another run"
            )
        if step <= self._last_step:
            raise InputError(f"{self._folder}: got step {step} after step {self._last_step}; steps must grow")
        if np.isinf([timestep, sigma]).any():
            raise InputError(f"{self._folder}: step {step}: got timestep {timestep}, sigma {sigma}; expected numbers")
        if self._format.codec != "predictive" and self._format.storage == "fp16":
            latents = to_storage(latents, "fp16").astype(np.float32)
        unsound = latents.size - int(np.isfinite(latents).sum())
        with file_errors(self._folder):
            if self._shape is None:
                self._format = self._format.of_steps(latents.shape)
                self._create_arrays(latents.shape)
                self._shape = latents.shape
            self._waiting.append(self._journal.append(step, timestep, sigma, latents))
        self._last_step = step
        if unsound:
            self._problems.append(f"step {step}: {unsound} values are not finite")

    def pack(self) -> None:
        """Encode groups that are full. May be called after every step."""
        while len(self._waiting) >= self._format.group:
            self._pack(self._format.group)

    def finish(self, *, complete: bool = True, problems: Sequence[str] = (), **attributes: Any) -> None:
        """Encode what is left and mark the run complete, or not; add `problems` and `attributes` to it, and what its
        latents take and how far they are off."""
        self.pack()
        if self._waiting:
            self._pack(len(self._waiting))
        self._problems += problems
        with file_errors(self._folder):
            told = {**self._cost(), **attributes}
            update_attributes(self._group, {"complete": complete, "problems": self._problems, **told})
            self._journal.remove()
        self._finished = True

    def _cost(self) -> dict[str, Any]:
        """`latents_bytes`, and with a half type's error `latents_error`, as in Accuracy."""
        if self._shape is None:
            return {}
        dimensions, size = 1 + len(self._shape), self._format.states_a_chunk
        chunks = [
            chunk_path(self._folder, number, dimensions).read_bytes() for number in range(-(-len(self._labels) // size))
        ]
        cost: dict[str, Any] = {"latents_bytes": sum(map(len, chunks))}
        if self._format.codec == "predictive" and not np.isnan((worst := Accuracy.of(chunks)).all):
            cost["latents_error"] = {name: round(share, 4) for name, share in asdict(worst).items()}
        return cost

    def note(self, **attributes: Any) -> None:
        """Keep more attributes with the run."""
        with file_errors(self._folder):
            update_attributes(self._group, attributes)

    def note_problem(self, line: str) -> None:
        """Keep a line with the run, which stays incomplete."""
        self._problems.append(line)
        with file_errors(self._folder):
            update_attributes(self._group, {"problems": self._problems})

    def close(self) -> None:
        """Let go of the run; without `finish` it stays incomplete, and without a step nothing stays of it."""
        if self._shape is None and not self._finished:
            self.discard()
        self._journal.close()

    def discard(self) -> None:
        """Leave nothing of the run."""
        with file_errors(self._folder):
            remove_run(self._folder)
        self._journal.close()

    def _create_arrays(self, shape: tuple[int, ...]) -> None:
        for name, dtype in LABELS.items():
            self._group.create_array(
                name,
                shape=(0,),
                chunks=(LABEL_CHUNK,),
                dtype=dtype,
                compressors=[Crc32cCodec()],
                dimension_names=("step",),
            )
        axes = tuple(f"axis_{i}" for i in range(1, len(shape) + 1))
        named = (
            n for n, channels in _DIMENSIONS.items() if (len(n), channels) == (len(shape), self._format.channel_axis)
        )
        self._group.create_array(
            "latents",
            shape=(0, *shape),
            chunks=(self._format.states_a_chunk, *shape),
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=("step", *next(named, axes)),
            fill_value=0,
            **self._format.array_options(),
        )

    def _pack(self, count: int) -> None:
        with file_errors(self._folder):
            self._labels = _move_to_arrays(self._folder, self._format, self._waiting[:count], self._labels, self._noise)
            self._waiting = self._waiting[count:]
            if not self._waiting:
                self._journal.clear()


def update_attributes(group: Any, changed: dict[str, Any]) -> None:
    """Change attributes of a run's group, and their checksum."""
    group.update_attributes(sealed({**group.attrs.asdict(), **changed}))


def add_problem(group: Any, line: str) -> None:
    """Keep a line among the problems of a run's group."""
    update_attributes(group, {"problems": [*group.attrs.asdict().get("problems", []), line]})


def remove_run(folder: Path) -> None:
    """Delete the folder of a run, at once under its name, so that no part of a run is left there."""
    gone = folder.parent / f".{folder.name}.{os.getpid()}.gone"
    folder.rename(gone)
    fsync_path(folder.parent)
    shutil.rmtree(gone)


def recover_run(root: Path, key: str) -> tuple[int, str | None]:
    """Move what a crash left in the journal of run `key` to its arrays and remove the journal: the number of steps that
    lay there, and a line when others were damaged, which the run keeps too. Nobody may be recording the run."""
    path = root / key / JOURNAL_NAME
    if not path.exists():
        return 0, None
    journal = Journal(path)
    try:
        group: Any = zarr.open_group(DurableStore(root), path=key, mode="r+")
        entries, damaged = read_journal(path)
        waiting: list[JournalEntry] = []
        if "latents" in group:
            array = group["latents"]
            stored = array.shape[0]
            labels = _Labels(*(np.asarray(group[name][:stored]).tolist() for name in LABELS))
            waiting = steps_after(entries, labels.steps)
            form, done = TrajectoryFormat.of(array), 0
            while done < len(waiting):  # a group never goes beyond its chunk
                count = min(form.group, array.chunks[0] - len(labels) % array.chunks[0])
                noise = Noise.of(group.attrs.asdict())
                labels = _move_to_arrays(root / key, form, waiting[done : done + count], labels, noise)
                done += count
        line = None
        if damaged:
            line = "damaged: steps of the journal could not be read and were dropped"
            add_problem(group, line)
        journal.remove()
    finally:
        journal.close()
    return len(waiting), line


@dataclass(frozen=True)
class _Labels:
    """The labels of all steps in the arrays."""

    steps: list[int] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)
    sigmas: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.steps)

    def extended(self, entries: list[JournalEntry]) -> _Labels:
        return _Labels(
            [*self.steps, *(entry.step for entry in entries)],
            [*self.timesteps, *(entry.timestep for entry in entries)],
            [*self.sigmas, *(entry.sigma for entry in entries)],
        )


def _move_to_arrays(
    folder: Path, format: TrajectoryFormat, entries: list[JournalEntry], labels: _Labels, noise: Noise | None
) -> _Labels:
    """Write journal `entries` into the run's arrays, behind the steps of `labels`; the labels of all. `entries` lie in
    one chunk and make up a group. They count from the moment `latents` has its new shape."""
    start, together = len(labels), labels.extended(entries)
    metadata = json.loads((folder / "latents" / "zarr.json").read_bytes())
    step_shape = tuple(metadata["shape"][1:])
    values = [read_values(folder / JOURNAL_NAME, entry, step_shape) for entry in entries]
    if any(value is None for value in values):
        raise StoreError(f"{folder}: its journal was changed by someone else; record the run again")
    latents = np.stack([value for value in values if value is not None])
    number, place = divmod(start, metadata["chunk_grid"]["configuration"]["chunk_shape"][0])
    chunk = chunk_path(folder, number, 1 + len(step_shape))
    content = _grown(chunk, place, latents, format, None if start else noise)
    for name, dtype in LABELS.items():
        column = np.array(getattr(together, name), dtype)
        (folder / name / "c").mkdir(exist_ok=True)
        for number in range(start // LABEL_CHUNK, -(-len(column) // LABEL_CHUNK)):
            padded = np.zeros(LABEL_CHUNK, dtype)
            part = column[number * LABEL_CHUNK : (number + 1) * LABEL_CHUNK]
            padded[: len(part)] = part
            write_durably(folder / name / "c" / str(number), with_crc32c(padded.tobytes()))
        fsync_path(folder / name)
        _set_length(folder / name, len(column))
    write_durably(chunk, content)
    _set_length(folder / "latents", len(together))
    return together


def _grown(chunk: Path, place: int, latents: Float32, format: TrajectoryFormat, noise: Noise | None) -> bytes:
    """The bytes of a chunk with `latents` behind its first `place` steps. A crash may have come after they were written
    and before they counted: then they are there already. Raises StoreError when something else is."""
    there = chunk.read_bytes() if chunk.exists() else b""
    before = first_groups(there, place) if place else b""
    grown = format.encode_chunk(latents, before, noise)
    if there not in (before, grown):
        raise StoreError(
            f"{chunk}: holds other steps than those of the journal, behind {place}; nothing was changed, move the file "
            "or the journal away"
        )
    return grown


def _set_length(array: Path, length: int) -> None:
    """Give the Zarr array in folder `array` a new length of its first axis."""
    metadata = json.loads((array / "zarr.json").read_bytes())
    metadata["shape"][0] = length
    write_durably(array / "zarr.json", json.dumps(metadata, indent=2).encode())
