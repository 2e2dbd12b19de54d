"""From the paths a user names to sequences of frames: find out what a folder holds and list it, in a fixed order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field

from halfstep.config import Config
from halfstep.data import pictures, pt_tree, videos
from halfstep.data.base import FrameSequence, SourceError
from halfstep.data.pictures import PictureSequence, class_folder
from halfstep.data.pt_tree import PtSequence, load_latent
from halfstep.data.trajectories import POSES_FILE, TrajectorySequence, numbered_files
from halfstep.data.videos import VideoSequence
from halfstep.errors import InputError
from halfstep.spec import PixelSpec

Kind = Literal["pictures", "videos", "trajectories", "latents"]


class SourceConfig(Config):
    """One entry of a YAML list of sources. `kind` is found out when not given; `name` goes before the keys, by default
    the folder's name when there are several sources (an empty name leaves them bare); `stride` or `fps` thin videos."""

    path: Path
    kind: Kind | None = None
    name: str | None = None
    stride: Annotated[int, Field(ge=1)] = 1
    fps: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


@dataclass(frozen=True)
class Source:
    """A place with frames of one kind. `files` are relative to `root`, sorted: pictures and videos themselves, and for
    trajectories and latents the folders that hold them."""

    root: Path
    kind: Kind
    files: tuple[str, ...]
    prefix: str = ""
    stride: int = 1
    fps: float | None = None

    @classmethod
    def find(cls, config: SourceConfig, prefix: str = "") -> Self:
        """Look at what is there. Raises InputError when the path is missing, empty, or holds several kinds."""
        path = config.path
        if not path.exists():
            raise InputError(f"{path}: no such file or folder")
        by_kind = _list_files(path)
        kind = config.kind or _only_kind(path, by_kind)
        files = by_kind[kind]
        if not files:
            raise InputError(f"{path}: no {kind} in it")
        root = path
        if path.is_file() or files == ["."]:  # the path itself is the picture, the video or the trajectory
            root, files = path.resolve().parent, [path.resolve().name]
        return cls(root, kind, tuple(files), prefix, config.stride, config.fps)

    def sequences(self, pixels: PixelSpec, latent_shape: tuple[int, ...] | None = None) -> list[FrameSequence]:
        """All sequences, in the order of their keys. A picture or video in a class folder carries its name as label.
        `latent_shape` is that which all latents must have, by default that of the first one."""
        if self.kind == "latents":
            shape = latent_shape or self.latent_shape()
            return [PtSequence(self._key(name), None, self.root / name, shape) for name in self.files]
        if self.kind == "trajectories":
            return [TrajectorySequence(self._key(name), None, self.root / name, pixels) for name in self.files]
        if self.kind == "videos":
            return [
                VideoSequence(self._key(name), class_folder(name), self.root / name, pixels, self.stride, self.fps)
                for name in self.files
            ]
        return [PictureSequence(self.root, name, self.prefix, pixels) for name in self.files]

    def latent_shape(self) -> tuple[int, int, int]:
        """[C, h, w] of the first readable latent. Raises InputError when none is."""
        for name in self.files:
            for path in numbered_files(self.root / name, pt_tree.EXTENSIONS).values():
                try:
                    channels, height, width = load_latent(path)[0].shape
                except SourceError:
                    continue  # reported with its reason when its turn comes
                return channels, height, width
        raise InputError(f"{self.root}: no readable latent in it")

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name


def find_sources(configs: list[SourceConfig]) -> list[Source]:
    """Sources with distinct key prefixes; a single one needs none. Raises InputError when two would share theirs."""
    if not configs:
        raise InputError("sources: the list is empty; name at least one")
    several = len(configs) > 1
    folders = [config.path.resolve().name if several else "" for config in configs]
    prefixes = [folder if config.name is None else config.name for config, folder in zip(configs, folders, strict=True)]
    if several and len(set(prefixes)) < len(prefixes):
        raise InputError(f"sources: names {prefixes} repeat; give each a `name` in a YAML list of sources")
    return [Source.find(config, prefix) for config, prefix in zip(configs, prefixes, strict=True)]


def _list_files(path: Path) -> dict[Kind, list[str]]:
    """Relative names by kind, sorted. A folder with poses and pictures is a trajectory, its pictures are not listed."""
    names = [path.name] if path.is_file() else sorted(_walk(path))
    posed = {name.rpartition("/")[0] for name in names if name.rpartition("/")[2] == POSES_FILE}
    found: dict[Kind, list[str]] = {"pictures": [], "videos": [], "trajectories": [], "latents": []}
    folders: dict[Kind, set[str]] = {"trajectories": set(), "latents": set()}
    for name in names:
        folder, _, file = name.rpartition("/")
        stem, dot, extension = file.rpartition(".")
        suffix = f"{dot}{extension}"
        if suffix.lower() in pictures.EXTENSIONS:
            if folder in posed:
                folders["trajectories"].add(folder or ".")
            else:
                found["pictures"].append(name)
        elif suffix.lower() in videos.EXTENSIONS:
            found["videos"].append(name)
        elif suffix.lower() in pt_tree.EXTENSIONS and stem.isdecimal():
            folders["latents"].add(folder or ".")
    for kind, parents in folders.items():
        found[kind] = sorted(parents)
    return found


def _walk(root: Path) -> Iterator[str]:
    """Relative names of all files, through symbolic links too, but not of hidden ones. Raises InputError for a folder
    that cannot be listed."""

    def stop(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be listed ({error.strerror})")

    seen = set()
    for folder, inner, files in os.walk(root, followlinks=True, onerror=stop):
        seen.add(os.path.realpath(folder))
        inner[:] = [n for n in inner if not n.startswith(".") and os.path.realpath(Path(folder) / n) not in seen]
        below = os.path.relpath(folder, root)
        prefix = "" if below == "." else f"{below}/"
        yield from (f"{prefix}{name}" for name in files if not name.startswith("."))


def _only_kind(path: Path, by_kind: dict[Kind, list[str]]) -> Kind:
    present = [kind for kind, files in by_kind.items() if files]
    if not present:
        raise InputError(f"{path}: no pictures, videos, trajectories or latents in it")
    if len(present) > 1:
        counts = " and ".join(f"{len(by_kind[kind])} {kind}" for kind in present)
        raise InputError(f"{path}: holds {counts}; name one `kind` in a YAML list of sources, or a folder of one kind")
    return present[0]
