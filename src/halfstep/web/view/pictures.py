"""Arrays as pictures and as counts: PNG files, grey channels, frames of detectors, histograms of values."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from halfstep.store.formats import largest_finite

Array = npt.NDArray[Any]
T = TypeVar("T")

_BINS = 48
_OCTAVES = (-30, 20)  # powers of two between which magnitudes are counted; what is beyond counts at the ends
_SMALLEST_NORMAL = {"fp16": -14, "bf16": -126, "fp32": -126}  # as powers of two
_SMALLEST = {"fp16": -24, "bf16": -133, "fp32": -149}
_WEAK, _STRONG = 20.0, 99.8  # percentiles of a detector's frame that are white and black


class Kept(Generic[T]):
    """The values used last, up to `most` of some size together. Of several threads that ask for the same at once, one
    makes it."""

    def __init__(self, most: int, size: Callable[[T], int] = lambda _: 1) -> None:
        self._most, self._size, self._total = most, size, 0
        self._values: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = threading.Lock()
        self._making: dict[Hashable, threading.Lock] = {}

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of `key`, made when it is not kept."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
            making = self._making.setdefault(key, threading.Lock())
        with making:
            with self._lock:
                if key in self._values:  # another thread made it meanwhile
                    return self._values[key]
            try:
                made = make()
                self._keep(key, made)
            finally:
                with self._lock:
                    self._making.pop(key, None)
        return made

    def _keep(self, key: Hashable, made: T) -> None:
        with self._lock:
            self._values[key] = made
            self._total += self._size(made)
            while self._total > self._most and len(self._values) > 1:
                self._total -= self._size(self._values.popitem(last=False)[1])


def png(pixels: Array) -> bytes:
    """uint8 [H, W, 3] or [H, W] as a PNG, made quickly rather than small."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def grey(channel: Array) -> Array:
    """A channel [H, W] as uint8 from its smallest value, black, to its largest; what is not finite is black."""
    finite = np.isfinite(channel)
    if not finite.any():
        return np.zeros(channel.shape, np.uint8)
    values = np.where(finite, channel, channel[finite].min()).astype(np.float64)
    low, high = values.min(), values.max()
    shares: Array = (values - low) / (high - low) if high > low else np.zeros_like(values)
    scaled: Array = np.rint(255 * shares).astype(np.uint8)
    return scaled


def exposure(frame: Array, longest: int) -> Array:
    """A detector's frame [H, W] of any type as uint8, dark on white and its weak values spread out, with no side above
    `longest`: of pixels that share one the strongest is kept, so that no peak is lost."""
    values = np.nan_to_num(frame.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    factor = -(-max(values.shape) // longest)
    if factor > 1:
        height, width = (-(-side // factor) * factor for side in values.shape)
        padded = np.full((height, width), values.min(), np.float32)
        padded[: values.shape[0], : values.shape[1]] = values
        values = padded.reshape(height // factor, factor, width // factor, factor).max(axis=(1, 3))
    low, high = np.percentile(values, (_WEAK, _STRONG))
    shares = np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros_like(values)
    return (255 - 255 * shares**0.7).round().astype(np.uint8)


def distribution(latent: Array, storage: str | None) -> dict[str, Any]:
    """How the values of a latent [C, ...] lie, by channel and in all, and how they lie in the type that keeps them:
    counts of values, counts of magnitudes by their power of two, and that type's limits."""
    flat = latent.reshape(len(latent), -1).astype(np.float64)
    finite = flat[np.isfinite(flat)]
    counts, edges = np.histogram(finite, _BINS) if finite.size else (np.zeros(_BINS), np.linspace(-1, 1, _BINS + 1))
    sizes = np.abs(finite[finite != 0])
    octaves = np.clip(np.floor(np.log2(sizes)), *_OCTAVES) if sizes.size else np.empty(0)
    by_octave = np.histogram(octaves, np.arange(_OCTAVES[0], _OCTAVES[1] + 2) - 0.5)[0]
    channels = [_statistics(channel[np.isfinite(channel)]) for channel in flat]
    found = {
        "channels": channels,
        "all": _statistics(finite),
        "not_finite": int(flat.size - finite.size),
        "zeros": int((finite == 0).sum()),
        "counts": counts.tolist(),
        "edges": [float(edges[0]), float(edges[-1])],
        "octaves": {"first": _OCTAVES[0], "counts": by_octave.tolist()},
        "limits": None,
    }
    if storage is not None:
        largest = largest_finite(storage)
        found["limits"] = {
            "storage": storage,
            "largest": largest,
            "largest_octave": float(np.log2(largest)),
            "smallest_normal_octave": _SMALLEST_NORMAL[storage],
            "smallest_octave": _SMALLEST[storage],
            "headroom": float(largest / sizes.max()) if sizes.size else None,
            "subnormal": int((sizes < 2.0 ** _SMALLEST_NORMAL[storage]).sum()),
        }
    return found


def _statistics(values: Array) -> dict[str, float | None]:
    if not values.size:
        return dict.fromkeys(("min", "max", "mean", "std"))
    return {name: float(getattr(values, name)()) for name in ("min", "max", "mean", "std")}
