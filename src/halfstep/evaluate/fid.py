"""Fréchet inception distance (Heusel et al. 2017) of two sets of pictures, by torchmetrics and torch-fidelity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import torch
from torch import nn

from halfstep.data.base import Array
from halfstep.data.pictures import EXTENSIONS, load_picture
from halfstep.errors import InputError

_BATCH = 32
_FEATURES = 2048


@dataclass(frozen=True)
class FidReport:
    """The distance, and the number of pictures on each side."""

    fid: float
    pictures_a: int
    pictures_b: int


def fid(
    a: Path, b: Path, *, weights: Path | None = None, device: str = "cpu", features: nn.Module | None = None
) -> FidReport:
    """FID between the pictures of `a` and `b`, each a folder of pictures or an `.npz` with uint8 `arr_0` [N, H, W, 3].

    Features are those of the Inception network of the published FID (`weights`: its file, where it cannot be
    downloaded), or of `features`, a module from uint8 [N, 3, H, W] to [N, F]. Means and covariances are fp64 (so
    torchmetrics keeps them). Raises InputError when there are fewer than two pictures, or the network or its weights
    are not there.
    """
    sides = {path: _Pictures(path) for path in (a, b)}
    metric = _metric(weights, features).to(device)
    for path, real in ((a, True), (b, False)):
        for batch in sides[path]:
            metric.update(torch.from_numpy(batch).permute(0, 3, 1, 2).to(device), real=real)
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
            with np.load(path) as arrays:
                array = arrays.get("arr_0")
            if array is None or array.dtype != np.uint8 or array.ndim != 4:
                raise InputError(f"{path}: expected arr_0, uint8 [N, H, W, 3]")
            self._array = array
        else:
            raise InputError(f"{path}: expected a folder of pictures or an .npz with arr_0")
        if len(self) < 2:
            raise InputError(f"{path}: holds {len(self)} pictures; a covariance needs two, a meaningful FID thousands")

    def __len__(self) -> int:
        return len(self._files) if self._array is None else len(self._array)

    def __iter__(self) -> Iterator[Array]:
        for first in range(0, len(self), _BATCH):
            if self._array is not None:
                yield self._array[first : first + _BATCH]
                continue
            pictures = [np.asarray(load_picture(path)) for path in self._files[first : first + _BATCH]]
            if len({picture.shape for picture in pictures}) > 1:
                raise InputError(f"{self._files[first].parent}: pictures have several sizes; resize them to one")
            yield np.stack(pictures)


def _metric(weights: Path | None, features: nn.Module | None) -> Any:
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise InputError(f"fid: torchmetrics cannot be imported ({error}); pip install 'halfstep[eval]'") from error
    if features is not None:
        return FrechetInceptionDistance(features)
    try:
        return FrechetInceptionDistance(
            _FEATURES, feature_extractor_weights_path=None if weights is None else str(weights)
        )
    except (ModuleNotFoundError, ImportError) as error:
        raise InputError("fid: needs torch-fidelity beside torchmetrics; pip install torch-fidelity") from error
    except (URLError, OSError) as error:
        raise InputError(
            f"fid: the Inception weights are not there and cannot be downloaded ({error}); fetch "
            "pt_inception-2015-12-05-6726825d.pth from torch-fidelity's releases and name it with --weights"
        ) from error
