"""Trees of `.pt` latents as other tools wrote them: `<dataset>/<walk>/{0.pt, 1.pt, ...}`, with or without poses.

A file is a dict {"latent": [C, h, w]}, a bare tensor, an array, a list or tuple of one of these, or the parameters of a
posterior: a dict of `mean` with `std` or `logvar`. The values are taken as model-ready, as those tools left them; a
store keeps the mean of a posterior, training from the tree draws from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from halfstep.data.base import Array, Inspection, Problem, SourceError, digest, file_digest, one_line, reading
from halfstep.data.pickles import load_poses
from halfstep.data.walks import POSES_FILE, numbered_files
from halfstep.errors import InputError
from halfstep.spec import LatentSpec

EXTENSIONS = frozenset({".pt", ".pth"})
_KEYS = ("latent", "latents", "mean")

# A file may hold a numpy array; these are the only names that its pickle then needs. Registered once for the process,
# because torch's own context manager for it is not safe in threads.
_reconstruct: Any = np.empty(0).__reduce__()[0]
torch.serialization.add_safe_globals(
    [
        np.ndarray,
        np.dtype,
        _reconstruct,
        (_reconstruct, "numpy.core.multiarray._reconstruct"),
        *{type(np.dtype(code)) for code in ("f2", "f4", "f8")},
    ]
)


def load_latent(path: Path) -> tuple[Array, Array | None]:
    """Latent [C, h, w] as float32, and the log-variance when the file holds a posterior with one.

    Raises SourceError when the file is damaged, asks for code, or holds something else.
    """
    with reading(path):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, UnpicklingError) as error:
            raise SourceError(f"{path}: cannot be read as latents ({one_line(error)})") from error
        return _unwrap(content, path)


def _unwrap(content: Any, path: Path) -> tuple[Array, Array | None]:
    if isinstance(content, (list, tuple)):
        if len(content) != 1:
            raise SourceError(f"{path}: a list of {len(content)}; expected one latent")
        return _unwrap(content[0], path)
    if isinstance(content, dict):
        key = next((k for k in _KEYS if k in content), None)
        if key is None:
            raise SourceError(f"{path}: a dict with {sorted(map(str, content))}; expected {', '.join(_KEYS)}")
        logvar = None
        if "logvar" in content:
            logvar = _as_array(content["logvar"], path)
        elif "std" in content:
            logvar = 2 * np.log(np.maximum(_as_array(content["std"], path), np.finfo(np.float32).tiny))
        return _as_array(content[key], path), logvar
    return _as_array(content, path), None


def _as_array(value: Any, path: Path) -> Array:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        value = value.detach().float().numpy()
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
        found = f"{type(value).__name__}{f' of {value.dtype}' if hasattr(value, 'dtype') else ''}"
        raise SourceError(f"{path}: holds {found}; expected a floating-point tensor [C, h, w]")
    array = np.asarray(value, dtype=np.float32)
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim != 3:
        raise SourceError(f"{path}: a tensor of shape {list(array.shape)}; expected [C, h, w]")
    return array


@dataclass(frozen=True, slots=True)
class PtSequence:
    """One folder of numbered `.pt` files, with poses when `traj_data.pkl` is there."""

    key: str
    label: str | None
    source: Path
    shape: tuple[int, ...]

    @property
    def expected(self) -> int:
        return len(numbered_files(self.source, EXTENSIONS))

    def files(self) -> list[Path]:
        return list(numbered_files(self.source, EXTENSIONS).values())

    def inspect(self) -> Inspection:
        files = numbered_files(self.source, EXTENSIONS)
        numbers = tuple(sorted(files))
        problems: list[Problem] = []
        arrays = {}
        if (self.source / POSES_FILE).exists():
            try:
                position, yaw = load_poses(self.source / POSES_FILE)
            except InputError as error:
                raise SourceError(str(error)) from error
            problems = [Problem(f"{self.source}: latent {n} has no pose", n) for n in numbers if n >= len(position)]
            problems += [
                Problem(f"{self.source}: latent {n} is missing", n) for n in range(len(position)) if n not in files
            ]
            numbers = tuple(n for n in numbers if n < len(position))
            rows = np.array(numbers, dtype=np.int64)
            arrays = {"position": position[rows], "yaw": yaw[rows]}
        digests = tuple(file_digest(files[number]) for number in numbers)
        content = digest(*digests, *(values.tobytes() for values in arrays.values()), np.array(numbers).tobytes())
        return Inspection(content, numbers, digests, arrays, tuple(problems))

    def frames(self, numbers: Ordered[int]) -> Iterator[tuple[int, Callable[[], Array]]]:
        files = numbered_files(self.source, EXTENSIONS)
        for number in numbers:
            yield number, partial(_load_shaped, files[number], self.shape)


def _load_shaped(path: Path, shape: tuple[int, ...]) -> Array:
    latent, _ = load_latent(path)
    if latent.shape != shape:
        raise SourceError(f"{path}: latent of shape {list(latent.shape)}; the others have {list(shape)}")
    return latent


def imported_spec(shape: tuple[int, int, int]) -> LatentSpec:
    """The spec of latents that another tool made: model-ready as they are, by an autoencoder nobody noted down."""
    return LatentSpec("imported", channels=shape[0], spatial_factor=1, latent_shape=shape)
