"""Trajectory trees of the navigation world models: `<trajectory>/{0..T}.jpg` and `traj_data.pkl`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from halfstep.data.base import Array, Inspection, Problem, SourceError, digest, file_digest
from halfstep.data.pickles import load_poses
from halfstep.data.pictures import EXTENSIONS, load_fitted
from halfstep.errors import InputError
from halfstep.spec import PixelSpec

POSES_FILE = "traj_data.pkl"


def numbered_files(folder: Path, extensions: frozenset[str]) -> dict[int, Path]:
    """Files named by an unpadded or padded number, by that number."""
    return {
        int(path.stem): path
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in extensions and path.stem.isdecimal()
    }


@dataclass(frozen=True, slots=True)
class TrajectorySequence:
    """One trajectory. Frames without a pose, and poses without a picture, are left out and named as problems."""

    key: str
    label: str | None
    source: Path
    pixels: PixelSpec

    @property
    def expected(self) -> int:
        return len(numbered_files(self.source, EXTENSIONS))

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
