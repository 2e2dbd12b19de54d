"""Frames to train on, whatever holds them: a latent store, a `.pt` tree, or pictures that are not encoded yet."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from halfstep.data.base import Array
from halfstep.data.pickles import load_poses
from halfstep.data.pictures import EXTENSIONS as PICTURE_EXTENSIONS
from halfstep.data.pt_tree import EXTENSIONS as PT_EXTENSIONS
from halfstep.data.pt_tree import load_latent
from halfstep.data.sources import Kind, SourceConfig, find_sources
from halfstep.data.trajectories import POSES_FILE, numbered_files
from halfstep.errors import InputError
from halfstep.spec import PixelSpec
from halfstep.store.dataset import DatasetStore
from halfstep.store.manifest import NAME as MANIFEST_NAME

# Folder listings and poses are kept for this many trajectories.
_CACHED_FOLDERS = 4096


class FrameReader(Protocol):
    """Random access to the frames of named sequences. `read` gives float32 [n, C, H, W], model-ready: scaled latents,
    or pixels in [-1, 1]."""

    def keys(self) -> list[str]: ...
    def frames(self, key: str) -> int: ...
    def label(self, key: str) -> str | None: ...
    def read(self, key: str, start: int = 0, stop: int | None = None) -> Array: ...
    def numbers(self, key: str) -> Array:
        """The frames' numbers in the source; where they skip, frames are missing."""

    def poses(self, key: str) -> tuple[Array, Array]:
        """position [n, 2] metres and yaw [n] radians. Raises InputError when there are none."""


class StoreFrames:
    """The frames of a DatasetStore."""

    def __init__(self, store: DatasetStore) -> None:
        self.store = store

    def keys(self) -> list[str]:
        return self.store.keys()

    def frames(self, key: str) -> int:
        return self.store.frames(key)

    def label(self, key: str) -> str | None:
        return self.store.label(key)

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Array:
        return self.store.read(key, start, stop)

    def numbers(self, key: str) -> Array:
        if "frame" in self.store.arrays(key):
            return self.store.read_array(key, "frame")
        return np.arange(self.store.frames(key))

    def poses(self, key: str) -> tuple[Array, Array]:
        return self.store.read_array(key, "position"), self.store.read_array(key, "yaw")


class FolderFrames:
    """Folders of numbered files, one a frame: `.pt` latents, or pictures fitted to `pixels`."""

    def __init__(self, root: Path, pixels: PixelSpec | None) -> None:
        self.root, self.pixels = root, pixels
        kind: Kind = "latents" if pixels is None else "trajectories"
        (source,) = find_sources([SourceConfig(path=root, kind=kind)])
        self._keys = list(source.files)

    def keys(self) -> list[str]:
        return list(self._keys)

    def frames(self, key: str) -> int:
        return len(self._files(key))

    def label(self, key: str) -> str | None:
        return None

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Array:
        paths = list(self._files(key).values())
        if not 0 <= start <= (len(paths) if stop is None else stop) <= len(paths):
            raise InputError(f"{key}: frames [{start}, {stop}) asked for; the sequence has frames [0, {len(paths)})")
        return np.stack([self._load(path) for path in paths[start:stop]])

    def numbers(self, key: str) -> Array:
        return np.array(list(self._files(key)))

    def poses(self, key: str) -> tuple[Array, Array]:
        position, yaw = _cached_poses(self.root / key / POSES_FILE)
        numbers = self.numbers(key)
        return position[numbers], yaw[numbers]

    def _files(self, key: str) -> dict[int, Path]:
        """Files by frame number, without those that have no pose."""
        extensions = PT_EXTENSIONS if self.pixels is None else PICTURE_EXTENSIONS
        return _cached_files(self.root / key, extensions)

    def _load(self, path: Path) -> Array:
        if self.pixels is None:
            return load_latent(path)[0]
        from halfstep.data.pictures import load_fitted

        pixels: Array = load_fitted(path, self.pixels).astype(np.float32).transpose(2, 0, 1) / 127.5 - 1
        return pixels


@lru_cache(_CACHED_FOLDERS)
def _cached_files(folder: Path, extensions: frozenset[str]) -> dict[int, Path]:
    files = dict(sorted(numbered_files(folder, extensions).items()))
    if (folder / POSES_FILE).exists():
        posed = len(_cached_poses(folder / POSES_FILE)[0])
        files = {number: path for number, path in files.items() if number < posed}
    return files


@lru_cache(_CACHED_FOLDERS)
def _cached_poses(path: Path) -> tuple[Array, Array]:
    return load_poses(path)


def open_frames(folder: str | Path, pixels: PixelSpec | None = None) -> FrameReader:
    """A store (folder or fsspec URL), a tree of `.pt` latents, or, when `pixels` is given, a tree of pictures.

    Raises InputError when the folder holds none of them.
    """
    if "://" in str(folder) or (Path(folder) / MANIFEST_NAME).exists():
        return StoreFrames(DatasetStore.open(folder))
    return FolderFrames(Path(folder), pixels)
