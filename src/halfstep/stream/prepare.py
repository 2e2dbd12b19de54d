"""From the wire's values to what the network takes: masked, normalized in fp32, padded, cast.

Axes: C panels or channels of an event, H W pixels; N samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

from halfstep.errors import InputError
from halfstep.stream.events import Array, MessageError

PadStyle = Literal["center", "bottom-right"]
PAD_STYLES = get_args(PadStyle)
_EPS = 1e-6


@dataclass(frozen=True)
class Preparation:
    """How events become samples [N, channels, height, width] of `dtype`.

    With one channel each panel of an event is a sample; otherwise the event is one, and has as many panels. `size`
    (height, width) is what the network takes; None pads to the next multiples of `multiple`. Padding is zero, the mean,
    and the picture stands in the center or at the top left (`bottom-right` is where the padding goes). `normalized`:
    the producer did that already; else an event gets mean 0 and variance 1 over the pixels that hold data. `mask`
    [C, H, W] or [H, W] marks these, and those that are `no_data` are none, as detectors send gaps; what holds no data
    becomes zero. `scale` instead divides by a constant, for pictures.
    """

    channels: int = 1
    size: tuple[int, int] | None = None
    multiple: int = 32
    pad_style: PadStyle = "center"
    normalized: bool = False
    mask: Array | None = None
    no_data: float | None = None
    scale: float | None = None
    dtype: torch.dtype = torch.float32

    def __call__(self, data: Array) -> torch.Tensor:
        """The samples of one event's values [C, H, W]. Everything up to the cast is fp32: raw counts rounded to bf16
        would be 43% off. Raises MessageError when the event does not fit, or a pixel that holds data is not finite."""
        height, width = self.padded(data.shape)
        values = torch.from_numpy(data.astype(np.float32, order="C"))
        held = self._held(data)
        if held is not None:
            values = torch.where(held, values, 0.0)
        if not self.normalized and self.scale is None:
            values = _normalized(values, held)
        elif self.scale is not None:
            values /= self.scale
        if not bool(torch.isfinite(values.sum())):
            self._refuse(data, values, held)
        if (height, width) == tuple(values.shape[1:]):
            samples = values.to(self.dtype)
        else:
            samples = torch.zeros((len(values), height, width), dtype=self.dtype)
            top, left = self.offset(data.shape)
            samples[:, top : top + values.shape[1], left : left + values.shape[2]] = values
        return samples[:, None] if self.channels == 1 else samples[None]

    def padded(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Height and width of the samples of an event of `shape` [C, H, W]. Raises MessageError when it does not
        fit."""
        panels, height, width = shape
        if self.channels not in (1, panels):
            raise MessageError(f"event of {list(shape)}: got {panels} panels; the network takes {self.channels}")
        if self.size is None:
            return -(-height // self.multiple) * self.multiple, -(-width // self.multiple) * self.multiple
        if height > self.size[0] or width > self.size[1]:
            raise MessageError(
                f"event of {list(shape)}: panels are larger than {self.size[0]}x{self.size[1]}; set data.shape to what "
                "the detector sends, rounded up to multiples of 32"
            )
        return self.size

    def offset(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Row and column of a sample where the event's first pixel is."""
        height, width = self.padded(shape)
        if self.pad_style == "bottom-right":
            return 0, 0
        return (height - shape[1]) // 2, (width - shape[2]) // 2

    def _held(self, data: Array) -> torch.Tensor | None:
        """Which pixels hold data; None where all do."""
        held = None
        if self.mask is not None:
            if self.mask.shape not in (data.shape, data.shape[1:]):
                raise MessageError(
                    f"event of {list(data.shape)}: the mask is {list(self.mask.shape)}; give one of its size"
                )
            held = torch.from_numpy(self.mask).expand(data.shape)
        if self.no_data is not None:
            there = torch.from_numpy(data != self.no_data)
            held = there if held is None else held & there
        return held

    def _refuse(self, data: Array, values: torch.Tensor, held: torch.Tensor | None) -> None:
        unsound = ~np.isfinite(data.astype(np.float32))
        if held is not None:
            unsound &= held.numpy()
        count = int(unsound.sum())
        if count or not bool(torch.isfinite(values).all()):
            raise MessageError(
                f"event of {list(data.shape)}: {count or 'some'} pixels that hold data are not finite in fp32; mask "
                "them, or mend the producer"
            )


def load_mask(path: Path) -> Array:
    """A mask from a .npy file, True or not 0 where pixels hold data. Raises InputError when it is none."""
    try:
        mask = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: is no mask ({error}); expected a .npy file [H, W] or [panels, H, W]") from error
    if not isinstance(mask, np.ndarray) or mask.ndim not in (2, 3) or mask.dtype.kind not in "biu":
        raise InputError(f"{path}: is no mask; expected a .npy file [H, W] or [panels, H, W] of bool or whole numbers")
    return np.ascontiguousarray(mask != 0)


def _normalized(values: torch.Tensor, held: torch.Tensor | None) -> torch.Tensor:
    """Mean 0 and variance 1 of the pixels that hold data, and 0 in the others. What is constant becomes 0."""
    if held is None:
        variance, mean = torch.var_mean(values, correction=0)
        return (values - mean) * torch.rsqrt(variance + _EPS)
    chosen = values[held]
    if not len(chosen):
        return torch.zeros_like(values)
    variance, mean = torch.var_mean(chosen, correction=0)
    return torch.where(held, (values - mean) * torch.rsqrt(variance + _EPS), 0.0)
