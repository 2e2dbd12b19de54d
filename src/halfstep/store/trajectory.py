"""TrajectoryStore: few large runs, written step by step while a sampler runs, read by step.

A Zarr v3 group with a group a run: `latents` [steps, C, (T,) H, W], `steps`, `timesteps`, `sigmas` [steps], and the
run's attributes. Steps that are durable but not yet in the arrays lie in the run's journal.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, Self

import numpy as np
import zarr
from upath import UPath
from zarr.errors import ContainsGroupError

from halfstep.errors import BusyError, HalfstepError, InputError, StoreError
from halfstep.files import claim, file_errors, located
from halfstep.store.journal import NAME as JOURNAL_NAME
from halfstep.store.journal import JournalEntry, is_being_written, read_journal, read_values, steps_after
from halfstep.store.predictive import GROUP, count_states
from halfstep.store.run import FP32, Float32, Latents, Rounding, Run
from halfstep.store.trajectory_layout import (
    CHECKSUM,
    FORMAT_VERSION,
    KEY,
    LABELS,
    RUN_PATTERN,
    DurableStore,
    TrajectoryFormat,
    check_key,
    chunk_path,
    readable,
    sealed,
)
from halfstep.store.trajectory_writer import RunWriter, remove_run

# Decoded groups of steps that are kept, over all runs that are open: enough to go through a few runs side by side.
_GROUPS_KEPT = 4

# What zarr and its codecs raise when bytes are damaged.
DAMAGE = (StoreError, ValueError, KeyError, TypeError, RuntimeError, OSError, EOFError)


class TrajectoryStore(Mapping[str, Run]):
    """The store in a folder: a mapping from the names of runs to `Run`. It is read behind any fsspec URL too.

    Looking at it takes no lock and needs no repair. Several processes may record different runs into one store at once.
    """

    def __init__(self, root: Path | UPath | str) -> None:
        self.root = located(root)
        try:
            attributes = zarr.open_group(readable(self.root), mode="r").attrs.asdict()
        except (FileNotFoundError, zarr.errors.GroupNotFoundError):
            advice = "; `halfstep store repair` writes it again" if any(self.root.glob(RUN_PATTERN)) else ""
            raise StoreError(f"{self.root}: no trajectories here (no zarr.json of a group){advice}") from None
        except DAMAGE as error:
            raise StoreError(f"{self.root}/zarr.json: cannot be read ({error}); read another copy") from error
        version = attributes.get("halfstep_trajectories")
        if version != FORMAT_VERSION:
            found = "a Zarr group of something else" if version is None else f"format {version!r}"
            raise StoreError(f"{self.root}: got {found}; expected halfstep trajectories of format {FORMAT_VERSION}")

    @classmethod
    def open(cls, root: Path | UPath | str) -> Self:
        """The store in folder `root`, or behind that URL. Raises StoreError when there is none."""
        return cls(root)

    @classmethod
    def create(cls, root: Path | str) -> Self:
        """The store in folder `root`, made when there is nothing. Raises InputError when something else is there."""
        root = _local(root)
        if not claim(root, "trajectory store", ("zarr.json",)):
            with file_errors(root), suppress(ContainsGroupError):  # another process was first
                zarr.create_group(DurableStore(root), attributes={"halfstep_trajectories": FORMAT_VERSION})
        return cls(root)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(path.parent.name for path in self.root.glob("[!.]*/zarr.json")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and KEY.fullmatch(key) is not None and (self.root / key / "zarr.json").exists()

    def __getitem__(self, key: str) -> Run:
        if key not in self:
            raise InputError(f"{self.root}: no run {key!r} (of {len(self)}); `.keys()` lists them")
        return read_run(self.root, key)

    def noted(self, key: str) -> dict[str, Any]:
        """The attributes of the run `key` alone, from one small file: a list of many runs needs no more. Raises
        StoreError when it cannot be read."""
        check_key(key)
        path = self.root / key / "zarr.json"
        try:
            attributes = json.loads(path.read_bytes())["attributes"]
            if not isinstance(attributes, dict):
                raise TypeError("no attributes")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path}: cannot be read ({error}); read another copy of it") from error
        return attributes

    def record(self, key: str, format: TrajectoryFormat | None = None, **attributes: Any) -> RunWriter:
        """Begin the run `key`, whose steps are given to the writer one by one. `attributes` are kept with it as JSON;
        `prompt`, `seed`, `guidance`, `model` and `policy` are the usual ones. Raises InputError when there is a run of
        that name, an attribute is one that the store keeps itself, or one of the usual ones is of another type."""
        _require_usual(f"{self.root}/{key}", attributes)
        return RunWriter(_local(self.root), key, format or TrajectoryFormat(), attributes)

    def add(
        self,
        key: str,
        latents: Sequence[Float32] | Float32,
        *,
        sigmas: Sequence[float],
        timesteps: Sequence[float] | None = None,
        steps: Sequence[int] | None = None,
        format: TrajectoryFormat | None = None,
        **attributes: Any,
    ) -> None:
        """Keep a whole run: `latents` [n, C, (T,) H, W] (or a sequence of steps, read one after the other) with the
        noise level of each. `timesteps` default to `sigmas`, `steps` to 0 ... n-1. Raises InputError when their numbers
        differ."""
        labels = {"sigmas": sigmas, "timesteps": timesteps, "steps": steps}
        for name, given in labels.items():
            if given is not None and len(given) != len(latents):
                raise InputError(f"{key}: got {len(given)} {name} for {len(latents)} steps; expected one a step")
        writer = self.record(key, format, **attributes)
        try:
            for k, latent in enumerate(latents):
                timestep = sigmas[k] if timesteps is None else timesteps[k]
                writer.append(k if steps is None else int(steps[k]), float(timestep), float(sigmas[k]), latent)
                writer.pack()
            writer.finish()
        finally:
            writer.close()

    def remove(self, key: str) -> None:
        """Delete the run `key`, whole or not. Raises BusyError when it is being recorded."""
        check_key(key)
        if self.is_being_recorded(key):
            raise BusyError(f"{self.root}/{key}: another process is recording this run; wait for it to end")
        root = _local(self.root)
        with file_errors(root):
            remove_run(root / key)

    def is_being_recorded(self, key: str) -> bool:
        """Whether a living process is recording the run."""
        return is_being_written(self.root / key / JOURNAL_NAME)


# Attributes that others rely on, and their types; booleans are no numbers here.
_USUAL: dict[str, type] = {"prompt": str, "seed": int, "noise_seed": int, "noise_index": int, "label": str,
                           "states": str, "dtype": str}  # fmt: skip
_OWN = ("complete", "problems", CHECKSUM, "latents_format", "latents_exact", "latents_bytes", "latents_error")


def _require_usual(where: str, attributes: Mapping[str, Any]) -> None:
    for name, value in attributes.items():
        if name in _OWN:
            raise InputError(f"{where}: {name!r} is an attribute that the store keeps itself; choose another name")
        if not _fits(name, value):
            expected = "text" if _USUAL[name] is str else "a whole number"
            raise InputError(f"{where}: got {name}={value!r}; expected {expected}")


def _fits(name: str, value: Any) -> bool:
    """Whether an attribute is of the type that others rely on."""
    if name == "latents_bytes":
        return type(value) is int
    if name == "latents_error":
        shares = value.values() if isinstance(value, dict) and {"all", "state", "channel"} <= value.keys() else [None]
        return all(type(share) in (int, float) for share in shares)
    return name not in _USUAL or value is None or (isinstance(value, _USUAL[name]) and not isinstance(value, bool))


def _usual(attributes: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """The attributes without those of another type than the usual one, which are named."""
    usual = {}
    for name, value in attributes.items():
        if _fits(name, value):
            usual[name] = value
        else:
            problems.append(f"odd: its {name} is {value!r}, which is left out")
    return usual


def _local(root: Path | UPath | str) -> Path:
    """A folder to write to. Raises InputError for a URL."""
    found = located(root)
    if not isinstance(found, Path):
        raise InputError(f"{found}: runs are recorded into a local folder; a URL can be read only")
    return found


def read_run(root: Path | UPath, key: str) -> Run:
    """The run `key` of the store at `root` as it is now. Raises StoreError when its metadata is damaged."""
    folder = root / key
    entries, damaged = read_journal(folder / JOURNAL_NAME)  # before the arrays: steps move from here to there
    try:
        group = zarr.open_group(readable(root), path=key, mode="r")
        attributes: dict[str, Any] = group.attrs.asdict()
        if "complete" not in attributes:
            raise StoreError("zarr.json says nothing of the run")
        array: Any = group.get("latents")
        if array is None and attributes.get("complete") and any((folder / name).exists() for name in LABELS):
            raise StoreError("latents/zarr.json is missing")
        stored = 0 if array is None else array.shape[0]
        columns: dict[str, Any] = {name: group[name] for name in LABELS} if stored else {}
        for name, column in columns.items():
            for number in range(-(-stored // column.chunks[0])):
                if not (folder / name / "c" / str(number)).exists():  # zarr would read zeros
                    raise StoreError(f"{name}/c/{number} is missing")
            if attributes.get("complete") and column.shape[0] != stored:
                raise StoreError(f"{column.shape[0]} {name} for {stored} steps")
        labels = {name: np.asarray(column[:stored]) for name, column in columns.items()}
    except DAMAGE as error:
        raise StoreError(f"{root}/{key}: its metadata cannot be read ({error}); read another copy of it") from error
    for name, values in labels.items():
        if len(values) != stored:
            raise StoreError(f"{root}/{key}: got {len(values)} {name} for {stored} steps; read another copy")
    waiting = steps_after(entries, labels["steps"].tolist() if stored else [])
    problems = _problems(attributes, folder)
    if CHECKSUM in attributes and sealed(attributes) != attributes:
        problems.append("damaged: its attributes do not match their checksum; its prompt, seed or others were changed")
    if damaged:
        problems.append("damaged: some steps of its journal cannot be read; `halfstep store repair` keeps the others")
    attributes = {name: value for name, value in attributes.items() if name not in ("problems", CHECKSUM)}
    attributes = _usual(attributes, problems)
    rounding = FP32
    if array is not None:
        form = TrajectoryFormat.of(array)
        attributes |= {"latents_format": str(form), "latents_exact": form.is_exact}
        rounding = _rounding(form, attributes)
    reader = StepReader(root, key, {stored + i: entry for i, entry in enumerate(waiting)})
    return Run(
        key=key,
        steps=np.array([*labels.get("steps", []), *(entry.step for entry in waiting)], np.int64),
        timesteps=np.array([*labels.get("timesteps", []), *(entry.timestep for entry in waiting)], np.float64),
        sigmas=np.array([*labels.get("sigmas", []), *(entry.sigma for entry in waiting)], np.float64),
        latents=Latents(stored + len(waiting), reader.step_shape, reader.read),
        prompt=attributes.get("prompt"),
        seed=attributes.get("seed"),
        attributes=attributes,
        problems=tuple(problems),
        rounding=rounding,
    )


def _rounding(form: TrajectoryFormat, attributes: Mapping[str, Any]) -> Rounding:
    casts = {"fp32": 1.0}
    if form.max_error is None and form.storage != "fp32":
        # Nothing was lost where the values were of this type from the start, and then the sampler rounded them.
        casts[form.storage] = attributes.get("latents_error", {}).get("all") or 1.0
    recorded = {"float16": "fp16", "bfloat16": "bf16"}.get(attributes.get("dtype", ""))
    if recorded is not None:
        casts[recorded] = 1.0
    return Rounding.of(casts, form.max_error or 0.0)


def _problems(attributes: dict[str, Any], folder: Path | UPath) -> list[str]:
    noted = attributes.get("problems", [])
    lines = isinstance(noted, list) and all(isinstance(line, str) for line in noted)
    problems = list(noted) if lines else [f"damaged: its problems are {noted!r}, which are no lines"]
    if not attributes.get("complete"):
        alive = is_being_written(folder / JOURNAL_NAME)
        problems.insert(0, "incomplete: " + ("it is being recorded" if alive else "its recording did not finish"))
    return problems


class _GroupCache:
    """The groups of steps that were read last, by reader and number."""

    def __init__(self) -> None:
        self._groups: OrderedDict[tuple[int, int], Float32] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, reader: int, number: int, read: Callable[[int], Float32]) -> Float32:
        with self._lock:
            group = self._groups.pop((reader, number), None)
            if group is None and len(self._groups) >= _GROUPS_KEPT:
                self._groups.popitem(last=False)  # before the new one is read, so that no more are in memory
        if group is None:
            group = read(number)
        with self._lock:
            self._groups[reader, number] = group
            while len(self._groups) > _GROUPS_KEPT:
                self._groups.popitem(last=False)
        return group


_cache = _GroupCache()
_reader_numbers = count()


def _number_of(folder: Path | UPath) -> int:
    """What tells a folder from another one of its name; behind a URL nothing does."""
    return folder.stat().st_ino if isinstance(folder, Path) else 0


class StepReader:
    """Reads single steps of one run; steps in a row cost one decoding of the group they lie in."""

    def __init__(self, root: Path | UPath, key: str, waiting: Mapping[int, JournalEntry] | None = None) -> None:
        self._root, self._key = root, key
        self._waiting = waiting or {}  # by place in the run
        self._folder_number = _number_of(root / key)
        self._array: Any = None
        self._number = next(_reader_numbers)
        if (root / key / "latents" / "zarr.json").exists():
            self._open()
        self.step_shape: tuple[int, ...] = () if self._array is None else self._array.shape[1:]

    def read(self, k: int) -> Float32:
        """Step `k` as float32, a copy of the caller's own. Raises StoreError when its bytes are damaged."""
        if k in self._waiting:
            values = read_values(self._root / self._key / JOURNAL_NAME, self._waiting[k], self.step_shape)
            if values is not None:
                return values
            self._open()  # it is in the arrays by now
        group = self.group
        step: Float32 = _cache.get(self._number, k // group, self.read_group)[k % group].copy()
        return step

    @property
    def group(self) -> int:
        """Steps that are read together: a group, or a chunk where that is smaller."""
        size: int = self._array.chunks[0]
        return min(size, GROUP)

    @property
    def stored(self) -> int:
        """Steps that count as being in the arrays."""
        return 0 if self._array is None else int(self._array.shape[0])

    @property
    def held(self) -> int:
        """Steps that the files of the arrays hold, whether they count or not."""
        if self._array is None:
            return 0
        chunk, dimensions = int(self._array.chunks[0]), len(self._array.shape)
        number = 0
        while chunk_path(self._root / self._key, number, dimensions).exists():
            number += 1
        if number == 0 or TrajectoryFormat.of(self._array).codec != "predictive":
            return number * chunk
        last = chunk_path(self._root / self._key, number - 1, dimensions).read_bytes()
        return (number - 1) * chunk + count_states(last)

    @property
    def groups(self) -> int:
        """How many groups count."""
        return 0 if self._array is None else -(-self.stored // self.group)

    def read_group(self, number: int) -> Float32:
        """All steps of one group, as float32."""
        start, stop = number * self.group, min((number + 1) * self.group, self._array.shape[0])
        path = chunk_path(self._root / self._key, start // self._array.chunks[0], len(self._array.shape))
        if not path.parent.exists() or _number_of(self._root / self._key) != self._folder_number:
            raise StoreError(f"{self._root}/{self._key}: was repaired or removed after it was opened; open it again")
        try:
            if start >= stop or not path.exists():  # zarr would read zeros
                raise StoreError(f"{path.name} is missing")
            values: Float32 = np.asarray(self._array[start:stop], np.float32)
        except DAMAGE as error:
            what = error.args[0] if isinstance(error, HalfstepError) else f"{type(error).__name__}: {error}"
            raise StoreError(
                f"{self._root}/{self._key}: steps {start} to {max(start, stop - 1)} are damaged ({what}); "
                f"`halfstep store repair {self._root}` drops them and keeps the others"
            ) from error
        return values

    def _open(self) -> None:
        try:
            self._array = zarr.open_array(readable(self._root), path=f"{self._key}/latents", mode="r")
        except DAMAGE as error:
            raise StoreError(
                f"{self._root}/{self._key}/latents/zarr.json: cannot be read ({error}); read another copy of it"
            ) from error
