"""From the pixels that a network marked to peaks: connected pixels are one peak, and its place is their center of mass.

Axes: N images, H W pixels, P peaks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components, maximum_bipartite_matching
from scipy.spatial import KDTree

from halfstep.errors import InputError

Array = np.ndarray[Any, np.dtype[Any]]


def find_peaks(mask: Array) -> Array:
    """Centers of mass, float32 [P, 3] rows (image, y, x) in pixels, of the 8-connected components of `mask`, bool
    [N, H, W]. None reaches from one image into another. The order is that of each component's first pixel, row by row
    and image by image, as `scipy.ndimage.label` counts them. Raises InputError for other than a bool array of three
    axes."""
    _, row, start, length, peak = _label(mask)
    return _centers(mask.shape[1], row, start, length, peak)


def measure_peaks(mask: Array, values: Array) -> tuple[Array, Array]:
    """The peaks of `find_peaks`, and the sum of `values`, numbers [N, H, W], over the pixels of each: float32 [P],
    added up in float64. Raises InputError also for values of another shape or that are no real numbers."""
    pixels, row, start, length, peak = _label(mask)
    if not isinstance(values, np.ndarray) or values.shape != mask.shape or values.dtype.kind not in "iuf":
        raise InputError(f"values: got {_kind(values)}; expected real numbers of the mask's shape {list(mask.shape)}")
    sums = np.bincount(np.repeat(peak, length), values.reshape(-1)[pixels])
    return _centers(mask.shape[1], row, start, length, peak), sums.astype(np.float32)


def match_peaks(found: Array, truth: Array, radius: float = 2.0) -> int:
    """How many peaks of `found` [P, 2] and `truth` [Q, 2], both (y, x) in pixels of one image, can be paired one to
    one with no more than `radius` pixels between them: the largest such number."""
    pairs = KDTree(found).sparse_distance_matrix(KDTree(truth), radius, output_type="ndarray")
    near = csr_array((np.ones(len(pairs), bool), (pairs["i"], pairs["j"])), shape=(len(found), len(truth)))
    return int((maximum_bipartite_matching(near) >= 0).sum())


def _label(mask: Array) -> tuple[Array, Array, Array, Array, Array]:
    """The numbers of the set pixels among all, and of the runs in which they lie side by side: row among the rows of
    all images, first column, length in pixels, and number of the peak."""
    if not isinstance(mask, np.ndarray) or mask.ndim != 3 or mask.dtype != np.bool_:
        raise InputError(f"mask: got {_kind(mask)}; expected a numpy array of bool [N, H, W]")
    _, height, width = mask.shape
    pixels = np.flatnonzero(mask)
    begins = np.ones(len(pixels), bool)
    begins[1:] = np.diff(pixels) > 1
    if mask.size:
        begins |= pixels % width == 0
    first = np.flatnonzero(begins)
    length = np.diff(first, append=len(pixels))
    row, start = np.divmod(pixels[first], max(width, 1))
    # Where each run begins and ends with an empty column and an empty row added to every image, so that runs which
    # touch, at corners too, are those that do so one row higher, and no others.
    stride = width + 1
    left = (row + row // max(height, 1)) * stride + start
    right = left + length
    above = np.searchsorted(right, left - stride)
    touching = np.searchsorted(left, right - stride, side="right") - above
    own = np.repeat(np.arange(len(first)), touching)
    other = np.arange(len(own)) + np.repeat(above - np.cumsum(touching) + touching, touching)
    graph = csr_array((np.ones(len(own), bool), (own, other)), shape=(len(first), len(first)))
    _, peak = connected_components(graph, directed=False)
    return pixels, row, start, length, peak


def _centers(height: int, row: Array, start: Array, length: Array, peak: Array) -> Array:
    image, y = np.divmod(row, max(height, 1))
    peaks = np.empty((peak.max(initial=-1) + 1, 3), np.float32)
    peaks[peak, 0] = image
    size = np.bincount(peak, length)
    peaks[:, 1] = np.bincount(peak, length * y) / size
    peaks[:, 2] = np.bincount(peak, length * (start + (length - 1) / 2)) / size
    return peaks


def _kind(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
