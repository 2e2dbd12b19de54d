"""Datasets for torch's DataLoader over latents: pictures, clips, navigation samples.

An item depends on (seed, epoch, index) alone, so the number of workers changes nothing, and `SeededOrder` makes the
place
in an epoch an offset: training resumes in mid-epoch where it was. All datasets can be pickled to worker processes.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import torch
from pydantic import AfterValidator, Field, model_validator
from torch.utils.data import Dataset, Sampler

from halfstep.config import Config, load_yaml, validate
from halfstep.data.base import contiguous_runs
from halfstep.data.frames import FrameReader, StoreFrames, open_frames
from halfstep.data.navigation import METRIC_WAYPOINT_SPACING, goal_actions, relative_time, sample_index
from halfstep.errors import InputError
from halfstep.files import place
from halfstep.spec import PixelSpec
from halfstep.store.dataset import DatasetStore
from halfstep.store.manifest import NAME as MANIFEST_NAME

# A folder, or the URL of a store.
Place = Annotated[str | Path, AfterValidator(place)]  # str first: JSON has both alike


class SeededDataset(Dataset[Any], ABC):
    """Base: a random generator for each (seed, epoch, index). Call `set_epoch` before each epoch."""

    def __init__(self, seed: int = 0) -> None:
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Draw other goals, flips and samples from now on. Not seen by workers that live on (`persistent_workers`)."""
        self.epoch = epoch

    @abstractmethod
    def key(self, index: int) -> str:
        """The sequence that an item is of."""

    @abstractmethod
    def contents(self) -> Iterator[tuple[str, int]]:
        """What it is made of: each sequence and how many items, or places for one, are in it."""

    def generator(self, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, self.epoch, index))


class SeededOrder(Sampler[int]):
    """A shuffled order of `length` items that depends on (seed, epoch) alone, from item `start` on, every `size`-th
    item beginning at `rank`. Resuming an epoch after n items is `start=n`."""

    def __init__(
        self, length: int, *, seed: int = 0, epoch: int = 0, start: int = 0, rank: int = 0, size: int = 1
    ) -> None:
        self.length, self.seed, self.epoch, self.start, self.rank, self.size = length, seed, epoch, start, rank, size

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        return iter(order[self.start :][self.rank :: self.size].tolist())

    def __len__(self) -> int:
        return len(range(self.start + self.rank, self.length, self.size))


class ImageLatents(SeededDataset):
    """Frames on their own with class labels: items (float32 [C, h, w], label int).

    Labels number the class folders in alphabetical order (`classes`); without them all are 0. Where the flipped frames
    can be had one of the two is drawn; where the variance is kept, a fresh sample is. `frames` is a store, its path, or
    any FrameReader.
    """

    def __init__(self, frames: FrameReader | DatasetStore | str | Path, *, seed: int = 0) -> None:
        super().__init__(seed)
        self.reader = _reader(frames)
        self.keys = self.reader.keys()
        self.classes = _classes(self.reader, self.keys)
        counts = [self.reader.length(key) for key in self.keys]
        if empty := [key for key, count in zip(self.keys, counts, strict=True) if count == 0]:
            warnings.warn(
                f"frames: {len(empty)} of {len(self.keys)} sequences have none to read, {empty[0]!r} among them",
                stacklevel=2,
            )
        self._ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        place, key = self._place(index), self.key(index)
        frame = index - (int(self._ends[place - 1]) if place else 0)
        rng = self.generator(index)
        mirror = self.reader.has_mirror(key) and bool(rng.random() < 0.5)
        latent = self.reader.read(key, frame, frame + 1, noise=rng, mirror=mirror)[0]
        return torch.from_numpy(latent), _label_number(self.reader.label(key), self.classes)

    def key(self, index: int) -> str:
        return self.keys[self._place(index)]

    def contents(self) -> Iterator[tuple[str, int]]:
        return zip(self.keys, np.diff(self._ends, prepend=0).tolist(), strict=True)

    def _place(self, index: int) -> int:
        return int(np.searchsorted(self._ends, index, side="right"))


class ClipLatents(SeededDataset):
    """Clips of consecutive frames: items (float32 [C, T, h, w], label int).

    `clip_length` frames, each `stride` frames after the one before, from a random start in the sequence; one item a
    sequence that is long enough, the others are warned about. Missing frames are never inside a clip. Flips and samples
    are drawn as in ImageLatents, the flip for the whole clip. Raises InputError when no sequence is long enough, or
    when the latents are clips already (of an autoencoder over time: ImageLatents gives those).
    """

    def __init__(
        self,
        frames: FrameReader | DatasetStore | str | Path,
        clip_length: int,
        *,
        stride: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        self.reader = _reader(frames)
        if isinstance(self.reader, StoreFrames) and self.reader.store.spec.temporal_factor > 1:
            raise InputError(f"{self.reader.store.location}: its items are clips already; use ImageLatents")
        self.clip_length, self.stride = clip_length, stride
        span = (clip_length - 1) * stride + 1
        self._starts: list[tuple[str, list[tuple[int, int]]]] = []
        short: list[tuple[str, int]] = []
        for key in self.reader.keys():
            runs = contiguous_runs(self.reader.numbers(key))
            starts = [(first, last - span + 1) for first, last in runs if last - first >= span]
            if starts:
                self._starts.append((key, starts))
            else:
                short.append((key, max((last - first for first, last in runs), default=0)))
        if not self._starts:
            raise InputError(f"clips: no sequence has {span} consecutive frames; use shorter clips{_longest(short)}")
        if short:
            warnings.warn(
                f"clips: {len(short)} of {len(short) + len(self._starts)} sequences do not have {span} consecutive "
                f"frames and are left out: the first is {short[0][0]!r} with {short[0][1]}",
                stacklevel=2,
            )
        self.classes = _classes(self.reader, [key for key, _ in self._starts])

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        key, ranges = self._starts[index]
        choices = np.concatenate([np.arange(first, last) for first, last in ranges])
        rng = self.generator(index)
        start = int(rng.choice(choices))
        mirror = self.reader.has_mirror(key) and bool(rng.random() < 0.5)
        stop = start + (self.clip_length - 1) * self.stride + 1
        latents = self.reader.read(key, start, stop, noise=rng, mirror=mirror)[:: self.stride]
        clip = torch.from_numpy(np.ascontiguousarray(latents)).transpose(0, 1)
        return clip, _label_number(self.reader.label(key), self.classes)

    def key(self, index: int) -> str:
        return self._starts[index][0]

    def contents(self) -> Iterator[tuple[str, int]]:
        return ((key, sum(last - first for first, last in ranges)) for key, ranges in self._starts)


class NavigationLatents(SeededDataset):
    """Samples of a navigation world model: items (frames float32 [context + goals, C, h, w], actions float32
    [goals, 3], rel_t float32 [goals]).

    Context frames end at the current one; goal offsets are drawn uniformly from the range of `sample_index`. Poses give
    the actions (`goal_actions`). Where the variance is kept, each frame is a fresh sample. A missing frame ends a
    walk for sampling, as if it were two. `names` limits it to some walks (a list in `traj_names.txt`);
    those of them that are not there are warned about.
    """

    def __init__(
        self,
        frames: FrameReader,
        *,
        spacing: float,
        context_size: int,
        len_traj_pred: int,
        min_dist_cat: int,
        max_dist_cat: int,
        goals_per_obs: int = 1,
        names: list[str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        self.reader, self.spacing = frames, spacing
        self.context_size, self.goals_per_obs = context_size, goals_per_obs
        keys = frames.keys() if names is None else names
        if absent := set(keys) - set(frames.keys()):
            line = f"walks: {len(absent)} of {len(keys)} named ones are not there, {min(absent)!r} among them"
            if len(absent) == len(set(keys)):
                raise InputError(f"{line}; the names and the data do not belong together")
            warnings.warn(line, stacklevel=2)
        keys = [key for key in keys if key not in absent]
        self.runs = [(key, start, stop) for key in keys for start, stop in contiguous_runs(frames.numbers(key))]
        lengths = [stop - start for _, start, stop in self.runs]
        self.index = sample_index(lengths, context_size, len_traj_pred, min_dist_cat, max_dist_cat)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        run, current, smallest, largest = self.index[index].tolist()
        key, first, _ = self.runs[run]
        rng = self.generator(index)
        goals = current + rng.integers(smallest, largest + 1, self.goals_per_obs)
        context = self.reader.read(key, first + current - self.context_size + 1, first + current + 1, noise=rng)
        targets = [self.reader.read(key, first + goal, first + goal + 1, noise=rng) for goal in goals.tolist()]
        position, yaw = self.reader.poses(key)
        actions = goal_actions(position[first:], yaw[first:], current, goals, self.spacing)
        return (
            torch.from_numpy(np.concatenate([context, *targets])),
            torch.from_numpy(actions).float(),
            torch.from_numpy(relative_time(current, goals)).float(),
        )

    def key(self, index: int) -> str:
        return self.runs[int(self.index[index, 0])][0]

    def contents(self) -> Iterator[tuple[str, int]]:
        return ((key, stop - start) for key, start, stop in self.runs)


class Distance(Config):
    """Offsets of goals from the current frame, in frames, both included."""

    min_dist_cat: int
    max_dist_cat: int

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.min_dist_cat > self.max_dist_cat:
            raise ValueError(f"min_dist_cat {self.min_dist_cat} is above max_dist_cat {self.max_dist_cat}")
        return self


class NavigationDatasetConfig(Config):
    """One dataset of a navigation config: latents, or pictures while there are no latents yet; splits are folders
    with a list of walks, `traj_names`."""

    latent_folder: Place | None = None
    data_folder: Place | None = None
    train: Path | None = None
    test: Path | None = None
    traj_names: str = "traj_names.txt"
    goals_per_obs: Annotated[int, Field(ge=1)] = 1
    metric_waypoint_spacing: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


class NavigationConfig(Config):
    """The part of the published training configs that says what to sample."""

    context_size: int
    len_traj_pred: int
    distance: Distance
    image_size: int = 224
    datasets: dict[str, NavigationDatasetConfig]

    @classmethod
    def load(cls, path: Path) -> NavigationConfig:
        """Read `path`; keys that concern training alone are left to the trainer."""
        values: dict[str, Any] = load_yaml(path, dict[str, Any])
        return validate({name: value for name, value in values.items() if name in cls.model_fields}, cls, path)


def navigation_datasets(
    config: NavigationConfig, split: str = "train", *, seed: int = 0, pixels: PixelSpec | None = None
) -> dict[str, NavigationLatents]:
    """One dataset for each entry of the config: over `latent_folder` when it is given and there, else over the
    pictures of `data_folder`, fitted to `pixels` (by default squares of the config's `image_size`).

    Raises InputError when neither is there, or the spacing of a dataset is neither known nor given.
    """
    made = {}
    pixels = pixels or PixelSpec(config.image_size, config.image_size, "4:3")
    for name, entry in config.datasets.items():
        spacing = entry.metric_waypoint_spacing or METRIC_WAYPOINT_SPACING.get(name)
        if spacing is None:
            raise InputError(f"datasets.{name}.metric_waypoint_spacing: not given, and not known for this name")
        made[name] = NavigationLatents(
            _open_entry(name, entry, pixels),
            spacing=spacing,
            context_size=config.context_size,
            len_traj_pred=config.len_traj_pred,
            min_dist_cat=config.distance.min_dist_cat,
            max_dist_cat=config.distance.max_dist_cat,
            goals_per_obs=entry.goals_per_obs,
            names=_split_names(entry, split),
            seed=seed,
        )
    return made


def _open_entry(name: str, entry: NavigationDatasetConfig, pixels: PixelSpec) -> FrameReader:
    if entry.latent_folder is not None and (entry.data_folder is None or _has_latents(entry.latent_folder)):
        return open_frames(entry.latent_folder)
    if entry.data_folder is None:
        raise InputError(f"datasets.{name}: neither latent_folder nor data_folder is given")
    return open_frames(entry.data_folder, pixels)


def _has_latents(folder: Path | str) -> bool:
    """True for a folder that is there, for the name of a dataset inside a store, and for a URL, which nobody asks."""
    if isinstance(folder, str):
        return True
    return folder.is_dir() or any((parent / MANIFEST_NAME).exists() for parent in folder.parents)


def _split_names(entry: NavigationDatasetConfig, split: str) -> list[str] | None:
    folder = entry.train if split == "train" else entry.test
    if folder is None:
        return None
    return read_names(folder / entry.traj_names)


def read_names(path: Path) -> list[str]:
    """The walks of a split, a name a line. Raises InputError when there is no such file or it is no text."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; the walks of a split are listed in one, a name a line")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; save the names as UTF-8 text") from None
    return [name for line in text.splitlines() if (name := line.strip())]


def _longest(short: list[tuple[str, int]]) -> str:
    """Which of the sequences that are too short comes nearest."""
    if not short:
        return ""
    key, frames = max(short, key=lambda item: item[1])
    return f": the longest is {key!r} with {frames}"


def _reader(frames: FrameReader | DatasetStore | str | Path) -> FrameReader:
    if isinstance(frames, DatasetStore):
        return StoreFrames(frames)
    return open_frames(frames) if isinstance(frames, (str, Path)) else frames


def _classes(reader: FrameReader, keys: list[str]) -> list[str]:
    return sorted({label for key in keys if (label := reader.label(key)) is not None})


def _label_number(label: str | None, classes: list[str]) -> int:
    return bisect_left(classes, label) if label is not None else 0
