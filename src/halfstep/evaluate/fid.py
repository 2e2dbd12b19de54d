"""Fréchet inception distance (Heusel et al. 2017) of two sets of pictures, by torchmetrics and torch-fidelity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import nn

from halfstep.data.base import Array
from halfstep.data.pictures import EXTENSIONS, load_picture
from halfstep.errors import InputError
from halfstep.machine import open_device

_BATCH = 32
_FEATURES = 2048


@dataclass(frozen=True)
class FidReport:
    """The distance, and the number of pictures on each side."""

    fid: float
    pictures_a: int
    pictures_b: int


def fid(
    a: Path, b: Path, *, weights: Path | None = None, device: str = "auto", features: nn.Module | None = None
) -> FidReport:
    """FID between the pictures of `a` and `b`, each a folder of pictures or an `.npz` with uint8 `arr_0` [N, H, W, 3].

    Features are those of the Inception network of the published FID (`weights`: its file, where it cannot be
    downloaded), or of `features`, a module from uint8 [N, 3, H, W] to [N, F]. Means and covariances are fp64 (so
    torchmetrics keeps them). Raises InputError when there are fewer than two pictures, or the network or its weights
    are not there.
    """
    sides = {path: _Pictures(path) for path in (a, b)}
    place = open_device(device)
    metric = _metric(weights, features).to(place)
    for path, real in ((a, True), (b, False)):
        for batch in sides[path]:
            metric.update(torch.from_numpy(batch).permute(0, 3, 1, 2).to(place), real=real)
    return FidReport(float(metric.compute()), len(sides[a]), len(sides[b]))


class _Pictures:
    """uint8 [n, H, W, 3] in batches."""

    def __init__(self, path: Path) -> None:
        self._array: Array | None = None
        self._files: list[Path] = []
        if path.is_dir():
            # A folder of samples has a sheet of them all, which is none.
            named = (p for p in sorted(path.rglob("*")) if p.suffix.lower() in EXTENSIONS)
            self._files = [p for p in named if p.name != "contact_sheet.png"]
        elif path.suffix == ".npz" and path.exists():
            array = _array_of(path)
            if array is None or array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
                found = "nothing of that name" if array is None else f"{array.dtype} {list(array.shape)}"
                raise InputError(f"{path}: arr_0: got {found}; expected uint8 [N, H, W, 3]")
            self._array = array
        else:
            raise InputError(f"{path}: expected a folder of pictures or an .npz with arr_0")
        if len(self) < 2:
            raise InputError(f"{path}: holds {len(self)} pictures; a covariance needs two, a meaningful FID thousands")

    def __len__(self) -> int:
        return len(self._files) if self._array is None else len(self._array)

    def __iter__(self) -> Iterator[Array]:
        if self._array is not None:
            for first in range(0, len(self), _BATCH):
                yield self._array[first : first + _BATCH]
            return
        shape = np.asarray(load_picture(self._files[0])).shape
        for first in range(0, len(self), _BATCH):
            pictures = [np.asarray(load_picture(path)) for path in self._files[first : first + _BATCH]]
            for path, picture in zip(self._files[first:], pictures, strict=False):
                if picture.shape != shape:
                    (height, width), (other, wide) = shape[:2], picture.shape[:2]
                    raise InputError(f"{path}: is {wide}x{other}, others are {width}x{height}; resize them to one size")
            yield np.stack(pictures)


def _array_of(path: Path) -> Array | None:
    try:
        with np.load(path) as arrays:
            return arrays.get("arr_0")  # type: ignore[no-any-return]
    except (OSError, EOFError, ValueError, TypeError, BadZipFile) as error:
        raise InputError(f"{path}: cannot be read as an .npz ({error})") from error


def _metric(weights: Path | None, features: nn.Module | None) -> Any:
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise InputError(f"eval fid: torchmetrics cannot be imported ({error}); pip install 'halfstep[fid]'") from error
    if features is not None:
        return FrechetInceptionDistance(features)
    try:
        return FrechetInceptionDistance(
            _FEATURES, feature_extractor_weights_path=None if weights is None else str(weights)
        )
    except ImportError as error:
        raise InputError("eval fid: torch_fidelity is not installed; pip install 'halfstep[fid]'") from error
    except OSError as error:
        raise InputError(
            f"fid: the Inception weights are not there and cannot be downloaded ({error}); fetch "
            "pt_inception-2015-12-05-6726825d.pth from torch-fidelity's releases and name it with --weights"
        ) from error
