"""A decoded frame as players show it: its pixels made square, turned and mirrored as the file says."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
from av.sidedata.sidedata import SideData
from PIL import Image

from halfstep.data.base import Array
from halfstep.data.pictures import fit
from halfstep.spec import PixelSpec

# A pixel that is longer than this is a slip of the writer, not a shape.
_LONGEST_PIXEL = 8


def fit_frame(frame: av.VideoFrame, pixel_shape: Fraction, pixels: PixelSpec) -> Array:
    """The frame as uint8 [height, width, 3] of `pixels`; a pixel of the film is `pixel_shape` times as wide as high."""
    values = _squared(frame.to_ndarray(format="rgb24"), pixel_shape)
    return fit(Image.fromarray(_turned(values, _display_matrix(frame))), pixels)


def _squared(values: Array, pixel_shape: Fraction) -> Array:
    """The smallest picture with square pixels that loses none of them."""
    height, width = values.shape[:2]
    if not Fraction(1, _LONGEST_PIXEL) <= pixel_shape <= _LONGEST_PIXEL:
        return values
    size = (round(width * pixel_shape), height) if pixel_shape > 1 else (width, round(height / pixel_shape))
    if size == (width, height):
        return values
    return np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BICUBIC))


def _display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """(a, b, c, d): what is at (x, y) in the frame is shown at (ax + cy, bx + dy), y downwards."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if not isinstance(data, SideData):
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
    return a, b, c, d


def _turned(values: Array, matrix: tuple[int, int, int, int]) -> Array:
    """`values` in that of the eight positions which is nearest to the matrix."""
    a, b, c, d = matrix
    if abs(b) + abs(c) > abs(a) + abs(d):
        values, a, d = values.swapaxes(0, 1), c, b
    if a < 0:
        values = values[:, ::-1]
    if d < 0:
        values = values[::-1]
    return np.ascontiguousarray(values)
