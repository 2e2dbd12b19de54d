"""From the paths a user names to sequences of frames: find out what a folder holds and list it, in a fixed order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field

from halfstep.config import Config
from halfstep.data import pictures, pt_tree
from halfstep.data.animations import AnimationSequence
from halfstep.data.base import FrameSequence, SourceError
from halfstep.data.guarded import Unusable
from halfstep.data.keys import name_to_key
from halfstep.data.listing import Kind, list_path, named
from halfstep.data.pictures import PictureSequence, class_folder
from halfstep.data.pt_tree import PtSequence, load_latent
from halfstep.data.videos import VideoSequence
from halfstep.data.walks import WalkSequence, numbered_files
from halfstep.errors import InputError
from halfstep.spec import PixelSpec

_VOTES = 9  # latents that are read to find out the shape of all


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
    """A place with frames of one kind. `files` are relative to `root`, sorted: see Listing."""

    root: Path
    kind: Kind
    files: tuple[str, ...]
    prefix: str = ""
    stride: int = 1
    fps: float | None = None
    lost: tuple[Unusable, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def find(cls, config: SourceConfig, prefix: str = "") -> Self:
        """Look at what is there. Raises InputError when the path is missing, empty, or holds several kinds."""
        found = list_path(config.path, config.kind)
        lost = tuple(
            Unusable(_key(prefix, name), found.root / name, reason, name in found.unlisted)
            for name, reason in found.lost.items()
        )
        return cls(found.root, found.kind, found.files, prefix, config.stride, config.fps, lost, found.notes)

    def sequences(self, pixels: PixelSpec, latent_shape: tuple[int, ...] | None = None) -> list[FrameSequence]:
        """All sequences, in the order of their names. A picture or video in a class folder carries its name as label.
        `latent_shape` is that which all latents must have, by default that of most."""
        if self.kind == "latents":
            shape = latent_shape or self.latent_shape()
            return [PtSequence(self._key(name), None, self.root / name, shape) for name in self.files]
        if self.kind == "walks":
            return [WalkSequence(self._key(name), None, self.root / name, pixels) for name in self.files]
        if self.kind == "videos" or pixels.clip_length > 1:
            return [self._moving(name, pixels) for name in self.files]
        return [PictureSequence(self.root, name, self.prefix, pixels) for name in self.files]

    def _moving(self, name: str, pixels: PixelSpec) -> FrameSequence:
        path = self.root / name
        sequence = AnimationSequence if path.suffix.lower() in pictures.EXTENSIONS else VideoSequence
        return sequence(self._key(name), class_folder(name_to_key(name)), path, pixels, self.stride, self.fps)

    def latent_shape(self) -> tuple[int, int, int]:
        """[C, h, w] of most of the first readable latents: one odd file does not decide. Raises InputError when none is
        readable."""
        shapes = Counter(islice(self._latent_shapes(), _VOTES)).most_common(1)
        if not shapes:
            raise InputError(f"{self.root}: no readable latent in it")
        return shapes[0][0]

    def _latent_shapes(self) -> Iterator[tuple[int, int, int]]:
        """Those of what can be read; what cannot is reported with its reason when its turn comes."""
        for name in self.files:
            try:
                paths = numbered_files(self.root / name, pt_tree.EXTENSIONS).values()
            except (SourceError, OSError):
                continue
            for path in paths:
                try:
                    channels, height, width = load_latent(path)[0].shape
                except SourceError:
                    continue
                yield channels, height, width

    def _key(self, name: str) -> str:
        return _key(self.prefix, name)


def _key(prefix: str, name: str) -> str:
    return f"{prefix}/{name_to_key(name)}" if prefix else name_to_key(name)


def find_sources(configs: list[SourceConfig]) -> list[Source]:
    """Sources with distinct key prefixes; a single one needs none. Raises InputError when two would share theirs."""
    if not configs:
        raise InputError("sources: the list is empty; name at least one")
    several = len(configs) > 1
    folders = [name_to_key(named(config.path).name) if several else "" for config in configs]
    prefixes = [folder if config.name is None else config.name for config, folder in zip(configs, folders, strict=True)]
    if several and len(set(prefixes)) < len(prefixes):
        raise InputError(f"sources: names {prefixes} repeat; give each a `name` in a YAML list of sources")
    return [Source.find(config, prefix) for config, prefix in zip(configs, prefixes, strict=True)]
