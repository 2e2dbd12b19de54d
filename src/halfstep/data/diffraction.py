"""Simulated detector frames of serial crystallography, with the places of their Bragg peaks: demo, training and tests.

A crystal in a random orientation is cut by the Ewald sphere. Its reflections lie on what the solvent scatters, a halo
that falls off with the angle and a ring, and are counted photon by photon on panels with gaps and a beam stop, where
some pixels are dead or hot.

Axes: H W pixels, P peaks. Places are (y, x) in pixels; whole numbers are the middles of pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from halfstep.errors import InputError

Array = np.ndarray[Any, np.dtype[Any]]
Float = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]
Size = tuple[int, int]

SMALLEST_SNR = 6.0
SEPARATION_PX = 8.0
_REACH = 2.25  # standard deviations around a peak that are marked; 92% of its photons
_ROOM_PX = 3  # that a peak keeps from gaps and the frame's border
_LARGEST = 20_000.0  # photons of a reflection


@dataclass(frozen=True)
class Frame:
    """`values` uint16 [H, W] as a detector sends them, 0 where there is no data. `mask` bool [H, W] says where there
    is: not in gaps, behind the beam stop, and in pixels known to be dead. `peaks` float64 [P, 2] and `widths` float64
    [P], the standard deviation of each in pixels. `background` float64 [H, W]: what `values` would be on average
    without peaks and hot pixels."""

    values: Array
    mask: Bool
    peaks: Float
    widths: Float
    background: Float


def diffraction_frame(
    rng: np.random.Generator,
    size: Size = (256, 256),
    *,
    hit: bool = True,
    gain: float = 10.0,
    pedestal: float = 100.0,
) -> Frame:
    """A frame of `size` (H, W), of a crystal or, unless it is a `hit`, of solvent alone. The same state of `rng` makes
    the same frame. `gain` and `pedestal` are the wire's units for a photon and for none.

    Every peak can be seen: its signal is at least `SMALLEST_SNR` times the noise of all that is counted where it lies.
    With S photons in a Gaussian of width w, on B photons a pixel, with a readout noise of n photons, the ratio is
    S / sqrt(S + 4 pi (w^2 + 1/12) (B + n^2)): the pixels that count are those of the best linear filter. Reflections
    that are weaker, within 3 pixels of a gap or the border, next to a dead pixel, or within `SEPARATION_PX` of a
    stronger one, do not shine at all, so that there are no peaks about which one could differ. Raises InputError for
    sizes and units that are not positive.
    """
    if min(size) < 1 or gain <= 0 or pedestal < 0:
        raise InputError(f"diffraction: got size {size}, gain {gain}, pedestal {pedestal}; expected positive numbers")
    center = np.array(size) * rng.uniform(-0.1, 1.1, 2)  # where the beam would go through
    gaps, dead = _panels(rng, size, center)
    solvent = _solvent(rng, size, center)
    readout = rng.uniform(0.0, 0.5)
    peaks, signals, widths = _reflections(rng, size, center) if hit else (np.empty((0, 2)), np.empty(0), np.empty(0))
    noise = np.sqrt(signals + 4 * math.pi * (widths**2 + 1 / 12) * (_around(solvent, peaks, 0)[:, 0] + readout**2))
    seen = signals >= SMALLEST_SNR * noise
    seen &= ~_around(gaps, peaks, _ROOM_PX).any(axis=1) & ~_around(dead, peaks, 1).any(axis=1)
    seen[seen] = _apart(peaks[seen], signals[seen])
    photons = rng.poisson(solvent) + _crystal(rng, size, peaks[seen], signals[seen], widths[seen]) + _hot(rng, size)
    values = pedestal + gain * (photons + readout * rng.standard_normal(size))
    mask = ~(gaps | dead)
    return Frame(
        np.where(mask, values.round().clip(0, 65535), 0).astype(np.uint16),
        mask,
        peaks[seen],
        widths[seen],
        np.where(mask, pedestal + gain * solvent, 0.0),
    )


def truth_mask(frame: Frame) -> Bool:
    """The pixels [H, W] of the peaks, as a network shall mark them: those with their middle near enough to a peak's.
    No two peaks touch."""
    marked = np.zeros(frame.mask.shape, bool)
    side = np.arange(-_ROOM_PX, _ROOM_PX + 1)
    pixels = frame.peaks.round()[:, None] + np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    near = ((pixels - frame.peaks[:, None]) ** 2).sum(axis=-1) <= (_REACH * frame.widths[:, None]) ** 2
    y, x = pixels[near].astype(int).T
    marked[y, x] = True
    return marked


def _panels(rng: np.random.Generator, size: Size, center: Float) -> tuple[Bool, Bool]:
    """Pixels that are none or are behind the beam stop, and dead ones among the others."""
    gaps = _radius(size, center) < rng.uniform(6, 20)
    for axis, length in enumerate(size):
        panel, gap = rng.integers(80, 260), rng.integers(2, 13)
        between = (np.arange(length) + rng.integers(panel + gap)) % (panel + gap) >= panel
        gaps |= between[:, None] if axis == 0 else between
    return gaps, ~gaps & (rng.random(size) < rng.uniform(0, 1e-3))


def _solvent(rng: np.random.Generator, size: Size, center: Float) -> Float:
    """Photons [H, W] that are expected of everything but the crystal."""
    radius = _radius(size, center) / rng.uniform(120, 400)  # 1 in the middle of the ring
    halo = rng.uniform(0, 4) / (1 + (radius / rng.uniform(0.2, 0.5)) ** 2)
    ring = rng.uniform(0, 1.5) * np.exp(-0.5 * ((radius - 1) / rng.uniform(0.1, 0.25)) ** 2)
    level: float = 10 ** rng.uniform(-2, 1.5)
    return level * (0.2 + halo + ring)


def _reflections(rng: np.random.Generator, size: Size, center: Float) -> tuple[Float, Float, Float]:
    """Places in the frame, expected photons and widths of the lattice points that are close to the Ewald sphere. It has
    radius 1, and the beam goes along z. The intensities are those of Wilson (1949, Acta Cryst. 2, 318)."""
    distance = rng.uniform(500, 1500)  # from the crystal to the detector, in pixels
    lengths = rng.uniform(16, 45, 3) / distance  # of the axes of the reciprocal lattice
    axes = np.linalg.qr(rng.standard_normal((3, 3)))[0].T * lengths[:, None]
    a, b, c = axes[np.argsort(np.abs(axes[:, 2]) / lengths)]  # c is the nearest to the beam
    corner = np.hypot(*np.maximum(center, size - center))
    furthest = 2 * math.sin(math.atan(corner / distance) / 2)
    h, k = (np.arange(-n, n + 1) for n in (math.ceil(furthest / np.linalg.norm(axis)) for axis in (a, b)))
    rows = np.array([0, 0, 1]) + (h[:, None, None] * a + k[:, None] * b).reshape(-1, 3)  # of points, each along c
    along, beyond = rows @ c / (c @ c), ((rows**2).sum(axis=1) - 1) / (c @ c)
    meets = along**2 >= beyond
    rows, along, beyond = rows[meets], along[meets], beyond[meets]
    entry = -along + np.copysign(np.sqrt(along**2 - beyond), along)
    outgoing = (rows[:, None] + (np.floor(entry)[:, None] + [0, 1])[..., None] * c).reshape(-1, 3)
    outgoing = outgoing[outgoing[:, 2] > 0]
    peaks = center + distance * outgoing[:, :2] / outgoing[:, 2:]
    off = (np.linalg.norm(outgoing, axis=1) - 1) / np.linalg.norm(c)
    falloff = np.exp(-rng.uniform(0, 3) * ((outgoing - [0, 0, 1]) ** 2).sum(axis=1) / furthest**2)
    strength = 10 ** rng.uniform(2.3, 4) * rng.exponential(size=len(peaks))
    signals = strength * falloff * np.exp(-0.5 * (off / 10 ** rng.uniform(-1.8, -0.8)) ** 2)
    widths = rng.uniform(0.7, 1.2) * rng.uniform(0.9, 1.1, len(peaks))
    inside = ((peaks >= _ROOM_PX) & (peaks <= np.array(size) - 1 - _ROOM_PX)).all(axis=1) & (signals >= SMALLEST_SNR**2)
    return peaks[inside], signals[inside].clip(max=_LARGEST), widths[inside]


def _apart(peaks: Float, signals: Float) -> Bool:
    """Whether no stronger peak is too near to each."""
    near = ((peaks[:, None] - peaks) ** 2).sum(axis=-1) < SEPARATION_PX**2
    alone: Bool = ~(near & (signals > signals[:, None])).any(axis=1)
    return alone


def _crystal(rng: np.random.Generator, size: Size, peaks: Float, signals: Float, widths: Float) -> Array:
    """The photons [H, W] of the peaks, each where it fell."""
    counts = rng.poisson(signals)
    photons = np.repeat(peaks, counts, axis=0) + np.repeat(widths, counts)[:, None] * rng.standard_normal(
        (counts.sum(), 2)
    )
    y, x = photons.round().astype(np.int64).T
    inside = (y >= 0) & (x >= 0) & (y < size[0]) & (x < size[1])
    return np.bincount(y[inside] * size[1] + x[inside], minlength=size[0] * size[1]).reshape(size)


def _hot(rng: np.random.Generator, size: Size) -> Float:
    """Photons [H, W] that none sent: single pixels, of which the mask knows nothing."""
    hot = rng.random(size) < rng.uniform(0, 2e-4)
    photons = np.zeros(size)
    photons[hot] = 10 ** rng.uniform(1, 4, hot.sum())
    return photons


def _radius(size: Size, center: Float) -> Float:
    y, x = np.ogrid[: size[0], : size[1]]
    radius: Float = np.hypot(y - center[0], x - center[1])
    return radius


def _around(picture: Array, peaks: Float, reach: int) -> Array:
    """The pixels of the square [P, (2 reach + 1)^2] around each peak."""
    y, x = peaks.round().astype(np.int64).T
    side = np.arange(-reach, reach + 1)
    square: Array = picture[y[:, None, None] + side[:, None], x[:, None, None] + side]
    return square.reshape(len(peaks), (2 * reach + 1) ** 2)
