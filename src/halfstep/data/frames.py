"""Frames to train on, whatever holds them: a latent store, a `.pt` tree, or pictures and videos not encoded yet."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from halfstep.autoencoders import to_pixels
from halfstep.data.base import Array, FrameSequence, contiguous_runs
from halfstep.data.guarded import Guarded
from halfstep.data.pickles import load_poses
from halfstep.data.pictures import EXTENSIONS as PICTURE_EXTENSIONS
from halfstep.data.pictures import load_fitted
from halfstep.data.pt_tree import EXTENSIONS as PT_EXTENSIONS
from halfstep.data.pt_tree import imported_spec, load_latent
from halfstep.data.sources import Source, SourceConfig
from halfstep.data.walks import POSES_FILE, numbered_files
from halfstep.errors import InputError
from halfstep.spec import LatentSpec, PixelSpec
from halfstep.store.dataset import DatasetStore
from halfstep.store.manifest import NAME as MANIFEST_NAME

# Folder listings and poses are kept for this many walks.
_KEPT_FOLDERS = 4096


class FrameReader(Protocol):
    """Random access to the frames of named sequences."""

    def keys(self) -> list[str]: ...
    def length(self, key: str) -> int: ...
    def label(self, key: str) -> str | None: ...
    def has_mirror(self, key: str) -> bool:
        """Whether the flipped frames can be had as well."""

    def read(
        self, key: str, start: int, stop: int, *, noise: np.random.Generator | None = None, mirror: bool = False
    ) -> Array:
        """Frames [start, stop) as float32 [n, C, H, W], model-ready: scaled latents, or pixels in [-1, 1].

        Where the variance of latents is kept and `noise` is given, a fresh sample `mean + std * noise`.
        """

    def numbers(self, key: str) -> Array:
        """The frames' numbers in the source; where they skip, frames are missing."""

    def poses(self, key: str) -> tuple[Array, Array]:
        """position [n, 2] meters and yaw [n] radians. Raises InputError when there are none."""


class StoreFrames:
    """The frames of a DatasetStore, or of its sequences below `prefix`, whose names then do without it."""

    def __init__(self, store: DatasetStore, prefix: str = "") -> None:
        self.store, self.prefix = store, prefix
        self._keys = [key.removeprefix(prefix) for key in store.keys() if key.startswith(prefix)]
        if prefix and not self._keys:
            raise InputError(
                f"{store.location}: no sequence below {prefix!r}; `halfstep store inspect` shows what is there"
            )

    def keys(self) -> list[str]:
        return list(self._keys)

    def length(self, key: str) -> int:
        return self.store.length(self.prefix + key)

    def label(self, key: str) -> str | None:
        return self.store.label(self.prefix + key)

    def has_mirror(self, key: str) -> bool:
        return "latents_mirror" in self.store.arrays(self.prefix + key)

    def read(
        self, key: str, start: int, stop: int, *, noise: np.random.Generator | None = None, mirror: bool = False
    ) -> Array:
        stored = self.prefix + key
        if noise is None or "logvar" not in self.store.arrays(stored):
            return self.store.read(stored, start, stop, name="latents_mirror" if mirror else "latents")
        return _drawn(*self.store.posterior(stored, start, stop, mirror=mirror), noise)

    def numbers(self, key: str) -> Array:
        if "frame" in self.store.arrays(self.prefix + key):
            return self.store.read_array(self.prefix + key, "frame")
        return np.arange(self.length(key))

    def poses(self, key: str) -> tuple[Array, Array]:
        stored = self.prefix + key
        if "position" not in self.store.arrays(stored):
            raise InputError(f"{self.store.location}: {stored} has no poses; navigation needs encoded walks")
        return self.store.read_array(stored, "position"), self.store.read_array(stored, "yaw")


class FolderFrames:
    """Folders of numbered files, one a frame: `.pt` latents, or with `pixels` pictures fitted to them.

    What a folder holds is found out once for a reader; a reader opened later sees what is there by then.
    """

    def __init__(self, root: Path, keys: list[str], pixels: PixelSpec | None) -> None:
        self.root, self.pixels, self._keys = root, pixels, keys
        self._folders: dict[str, _Folder] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_folders": {}}  # another process lists its share itself

    def keys(self) -> list[str]:
        return list(self._keys)

    def length(self, key: str) -> int:
        return len(self._folder(key).files)

    def label(self, key: str) -> str | None:
        return None

    def has_mirror(self, key: str) -> bool:
        return self.pixels is not None

    def read(
        self, key: str, start: int, stop: int, *, noise: np.random.Generator | None = None, mirror: bool = False
    ) -> Array:
        paths = list(self._folder(key).files.values())
        if not 0 <= start <= stop <= len(paths):
            raise InputError(f"{key}: frames [{start}, {stop}) asked for; the sequence has frames [0, {len(paths)})")
        if self.pixels is not None:
            return _to_pixels([load_fitted(path, self.pixels) for path in paths[start:stop]], mirror)
        return np.stack([_load_latent(path, noise) for path in paths[start:stop]])

    def numbers(self, key: str) -> Array:
        return np.array(list(self._folder(key).files))

    def poses(self, key: str) -> tuple[Array, Array]:
        poses = self._folder(key).poses
        position, yaw = load_poses(self.root / key / POSES_FILE) if poses is None else poses
        numbers = self.numbers(key)
        return position[numbers], yaw[numbers]

    def _folder(self, key: str) -> _Folder:
        if key not in self._folders:
            if len(self._folders) >= _KEPT_FOLDERS:
                del self._folders[next(iter(self._folders))]
            self._folders[key] = _look_into(
                self.root / key, PT_EXTENSIONS if self.pixels is None else PICTURE_EXTENSIONS
            )
        return self._folders[key]


class SequenceFrames:
    """Pictures and videos as pixels. A video is decoded from its beginning for each read: encode it first when that is
    too slow."""

    def __init__(self, sequences: list[FrameSequence]) -> None:
        self._sequences = {sequence.key: sequence for sequence in sequences}

    def keys(self) -> list[str]:
        return sorted(self._sequences)

    def length(self, key: str) -> int:
        return self._sequences[key].expected

    def label(self, key: str) -> str | None:
        return self._sequences[key].label

    def has_mirror(self, key: str) -> bool:
        return True

    def read(
        self, key: str, start: int, stop: int, *, noise: np.random.Generator | None = None, mirror: bool = False
    ) -> Array:
        pictures = []
        for number, load in self._sequences[key].frames(range(start, stop)):
            if start <= number < stop:
                pictures.append(load())
            if number >= stop - 1:
                break
        if len(pictures) != stop - start:
            raise InputError(f"{key}: frames [{start}, {stop}) asked for; only {len(pictures)} of them are there")
        return _to_pixels(pictures, mirror)

    def numbers(self, key: str) -> Array:
        return np.arange(self.length(key))

    def poses(self, key: str) -> tuple[Array, Array]:
        raise InputError(f"{key}: pictures and videos have no poses; navigation needs walks")


def open_frames(folder: str | Path, pixels: PixelSpec | None = None) -> FrameReader:
    """A store (folder or fsspec URL), the sequences below a folder's name in a store (`latents/recon`), a tree of `.pt`
    latents, or, when `pixels` is given, pictures, videos or walks.

    Warns of what is there and cannot be used. Raises InputError when the folder holds none of them.
    """
    if "://" in str(folder):
        return StoreFrames(DatasetStore.open(folder))
    path = Path(folder)
    for root in (path, *path.parents):
        if (root / MANIFEST_NAME).exists():
            below = path.relative_to(root).as_posix()
            return StoreFrames(DatasetStore.open(root), "" if root == path else f"{below}/")
    source = Source.find(SourceConfig(path=path, kind="latents" if pixels is None else None))
    for line in (*(lost.reason for lost in source.lost), *source.notes):
        warnings.warn(line, stacklevel=2)
    if source.kind == "latents":
        return FolderFrames(source.root, list(source.files), None)
    assert pixels is not None
    if source.kind == "walks":
        return FolderFrames(source.root, list(source.files), pixels)
    return SequenceFrames([Guarded(sequence) for sequence in source.sequences(pixels)])


def open_latents(folder: str | Path, channels: int, known: LatentSpec | None) -> tuple[FrameReader, LatentSpec]:
    """Latents for a network of `channels` channels that was trained on latents `known`, None where nobody knows.

    Raises InputError when they are of other channels or another kind.
    """
    reader = open_frames(folder)
    if not reader.keys():
        raise InputError(f"{folder}: holds no latents; encode something into it first")
    spec = latents_spec(reader)
    assert spec is not None  # without pixels only latents are found
    if spec.channels != channels:
        raise InputError(
            f"{folder}: has latents of {spec.channels} channels ({spec.autoencoder}); the model has {channels}"
        )
    if known is not None and (differences := spec.differences(known)):
        raise InputError(f"{folder}: holds other latents than the model was trained on: {'; '.join(differences)}")
    return reader, spec


def windows(reader: FrameReader, length: int, *, step: int = 1) -> list[tuple[str, int]]:
    """Key and first frame of the stretches of `length` frames without a gap, `step` frames apart.

    Raises InputError when there is none.
    """
    found = [
        (key, first)
        for key in reader.keys()
        for start, stop in contiguous_runs(reader.numbers(key))
        for first in range(start, stop - length + 1, step)
    ]
    if not found:
        raise InputError(f"latents: no sequence has {length} frames in a row; use less context or fewer frames")
    return found


def latents_spec(reader: FrameReader) -> LatentSpec | None:
    """What the latents of `reader` are, or None when it gives pixels."""
    if isinstance(reader, StoreFrames):
        return reader.store.spec
    if isinstance(reader, FolderFrames) and reader.pixels is None:
        key = reader.keys()[0]
        return imported_spec(reader.read(key, 0, 1).shape[1:])
    return None


def _to_pixels(pictures: list[Array], mirror: bool) -> Array:
    """uint8 [H, W, 3] each to float32 [n, 3, H, W] in [-1, 1]."""
    stacked = np.stack(pictures)
    pixels: Array = to_pixels(torch.from_numpy(stacked[:, :, ::-1].copy() if mirror else stacked)).contiguous().numpy()
    return pixels


def _load_latent(path: Path, noise: np.random.Generator | None) -> Array:
    mean, logvar = load_latent(path)
    return mean if noise is None or logvar is None else _drawn(mean, np.exp(0.5 * logvar), noise)


def _drawn(mean: Array, std: Array, noise: np.random.Generator) -> Array:
    """A fresh sample of a posterior."""
    drawn: Array = mean + std * noise.standard_normal(mean.shape, np.float32)
    return drawn


@dataclass(frozen=True)
class _Folder:
    """Files by frame number, without those that have no pose, and the poses where there are some."""

    files: dict[int, Path]
    poses: tuple[Array, Array] | None


def _look_into(folder: Path, extensions: frozenset[str]) -> _Folder:
    files = dict(sorted(numbered_files(folder, extensions).items()))
    if not (folder / POSES_FILE).exists():
        return _Folder(files, None)
    poses = load_poses(folder / POSES_FILE)
    return _Folder({number: path for number, path in files.items() if number < len(poses[0])}, poses)
