"""Walk trees of the navigation world models: `<walk>/{0..T}.jpg` and `traj_data.pkl`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from halfstep.data.base import Array, Inspection, Problem, SourceError, digest, file_digest
from halfstep.data.pickles import load_poses
from halfstep.data.pictures import EXTENSIONS, load_fitted
from halfstep.data.tree import is_readable
from halfstep.errors import InputError
from halfstep.spec import PixelSpec

POSES_FILE = "traj_data.pkl"
_LARGEST = 2**31 - 1  # of the numbers that a store has room for


def numbered_files(folder: Path, extensions: frozenset[str]) -> dict[int, Path]:
    """Files named by an unpadded or padded number, by that number. Raises SourceError where two have the same one."""
    found: dict[int, Path] = {}
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            stem, dot, extension = entry.name.rpartition(".")
            if not (stem.isdecimal() and f"{dot}{extension}".lower() in extensions and is_readable(entry)):
                continue
            number = int(stem)
            if number in found:
                raise SourceError(
                    f"{folder}: {found[number].name} and {entry.name} are both number {number}; remove one"
                )
            if number > _LARGEST:
                raise SourceError(f"{folder}: {entry.name} is numbered above {_LARGEST}; number frames from 0")
            found[number] = folder / entry.name
    return found


@dataclass(frozen=True, slots=True)
class WalkSequence:
    """One walk. Frames without a pose, and poses without a picture, are left out and named as problems."""

    key: str
    label: str | None
    source: Path
    pixels: PixelSpec

    @property
    def expected(self) -> int:
        return len(numbered_files(self.source, EXTENSIONS))

    def files(self) -> list[Path]:
        return list(numbered_files(self.source, EXTENSIONS).values())

    def inspect(self) -> Inspection:
        try:
            position, yaw = load_poses(self.source / POSES_FILE)
        except InputError as error:
            raise SourceError(str(error)) from error
        pictures = numbered_files(self.source, EXTENSIONS)
        problems = [
            Problem(f"{self.source}: picture {n} is missing", n) for n in range(len(position)) if n not in pictures
        ]
        problems += [
            Problem(f"{self.source}: picture {n} has no pose ({len(position)} poses in {POSES_FILE})", n)
            for n in pictures
            if n >= len(position)
        ]
        numbers = tuple(sorted(n for n in pictures if n < len(position)))
        digests, readable = [], []
        for number in numbers:
            try:
                digests.append(file_digest(pictures[number]))
                readable.append(number)
            except SourceError as error:
                problems.append(Problem(str(error), number))
        rows = np.array(readable, dtype=np.int64)
        arrays = {"position": position[rows], "yaw": yaw[rows]}
        content = digest(*digests, *(values.tobytes() for values in arrays.values()), rows.tobytes())
        return Inspection(content, tuple(readable), tuple(digests), arrays, tuple(problems))

    def frames(self, numbers: Ordered[int]) -> Iterator[tuple[int, Callable[[], Array]]]:
        pictures = numbered_files(self.source, EXTENSIONS)
        for number in numbers:
            yield number, partial(load_fitted, pictures[number], self.pixels)
