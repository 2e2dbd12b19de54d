"""Simulated frames: what they promise of their peaks, their background and the pixels without data."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from halfstep.data.diffraction import SEPARATION_PX, Frame, diffraction_frame, truth_mask
from halfstep.errors import InputError

seeds = st.integers(0, 2**32 - 1)
sizes = st.tuples(st.integers(1, 300), st.integers(1, 300))


def frame_of(seed: int, size: tuple[int, int] = (256, 256), **how: float) -> Frame:
    return diffraction_frame(np.random.default_rng(seed), size, **how)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(seeds, sizes, st.booleans())
@example(0, (1, 1), True)
@example(1, (7, 7), True)
@example(2, (640, 64), True)
def test_what_every_frame_keeps(seed: int, size: tuple[int, int], hit: bool) -> None:
    frame, again = frame_of(seed, size, hit=hit), frame_of(seed, size, hit=hit)
    for name, value in vars(frame).items():
        np.testing.assert_array_equal(value, getattr(again, name))
    assert frame.values.shape == frame.mask.shape == frame.background.shape == size
    assert (frame.values.dtype, frame.mask.dtype) == (np.uint16, np.bool_)
    assert not frame.values[~frame.mask].any() and not frame.background[~frame.mask].any()
    assert frame.peaks.shape == (len(frame.widths), 2)
    assert hit or not len(frame.peaks)
    assert ((frame.peaks >= 3) & (frame.peaks <= np.array(size) - 4)).all()
    assert ((frame.widths > 0.6) & (frame.widths < 1.4)).all()
    distances = np.hypot(*(frame.peaks[:, None] - frame.peaks).transpose(2, 0, 1))
    assert (distances[~np.eye(len(distances), dtype=bool)] >= SEPARATION_PX).all()
    for y, x in frame.peaks.round().astype(int):
        assert frame.mask[y - 1 : y + 2, x - 1 : x + 2].all()


def test_other_seeds_make_other_frames() -> None:
    frames = [frame_of(seed).values for seed in range(5)]
    assert len({frame.tobytes() for frame in frames}) == 5


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_each_peak_is_marked_on_its_own(seed: int) -> None:
    frame = frame_of(seed)
    labels, count = ndimage.label(truth_mask(frame), np.ones((3, 3)))
    assert count == len(frame.peaks)
    centers = np.array(ndimage.center_of_mass(labels > 0, labels, range(1, count + 1))).reshape(-1, 2)
    nearest = np.hypot(*(centers[:, None] - frame.peaks).transpose(2, 0, 1)).min(axis=1, initial=np.inf)
    assert (nearest < 0.6).all()


@pytest.mark.parametrize("seed", range(12))
def test_the_background_is_what_was_expected(seed: int) -> None:
    """Of frames without peaks and of pixels that are not hot: the mean within five of its standard errors, the variance
    between that of the photons and that of photons and half a photon of readout noise."""
    frame = frame_of(seed, hit=False, gain=10, pedestal=200)
    photons = (frame.background[frame.mask] - 200) / 10
    off = (frame.values[frame.mask] - 200.0) / 10 - photons
    usual = off < 8 * np.sqrt(photons + 0.25)
    assert 1 - usual.mean() < 5e-4
    off, photons = off[usual], photons[usual]
    assert abs(off.sum()) < 5 * np.sqrt((photons + 0.25).sum())
    assert 0.9 * photons.sum() < (off**2).sum() < 1.1 * (photons + 0.26).sum()


def test_it_falls_off_from_the_beam() -> None:
    """With a ring or without, what is near the beam stop is brighter than what is furthest from it."""
    brighter = 0
    for seed in range(20):
        background = frame_of(seed, (512, 512), pedestal=0).background
        held = background[background > 0]
        brighter += np.percentile(held, 99) > 1.2 * np.percentile(held, 10)
    assert brighter >= 15


def test_peaks_are_where_and_as_bright_as_promised() -> None:
    """Their photons within three widths: few are less than four times their noise, and the middle of those of the
    bright ones is the place, to 0.02 pixels on average."""
    ratios, errors = [], []
    for seed in range(60):
        frame = frame_of(seed, gain=10, pedestal=100)
        y, x = np.indices(frame.values.shape)
        off = (frame.values - frame.background) / 10
        for place, width in zip(frame.peaks, frame.widths, strict=True):
            near = np.hypot(y - place[0], x - place[1]) <= 3 * width
            signal = off[near].sum()
            expected = ((frame.background[near] - 100) / 10 + 0.25).sum()
            ratios.append(signal / np.sqrt(max(signal, 0) + expected))
            if ratios[-1] > 30 and frame.mask[near].all() and frame.values[near].max() < 65535:
                errors.append([(off[near] * (axis[near])).sum() / signal for axis in (y, x)] - place)
    assert len(ratios) > 500 and len(errors) > 100
    assert np.mean(np.array(ratios) < 4) < 0.1
    assert (np.abs(np.mean(errors, axis=0)) < 0.02).all()


@settings(max_examples=20, deadline=None)
@given(seeds, st.floats(1, 5), st.floats(50, 500))
def test_units_change_nothing_else(seed: int, gain: float, pedestal: float) -> None:
    one, other = frame_of(seed, (64, 64), gain=10, pedestal=100), frame_of(seed, (64, 64), gain=gain, pedestal=pedestal)
    np.testing.assert_array_equal(one.peaks, other.peaks)
    inside = (one.values < 65535) & (other.values < 65535) & (one.values > 0) & (other.values > 0)
    photons, again = (one.values[inside] - 100.0) / 10, (other.values[inside] - pedestal) / gain
    assert np.abs(photons - again).max(initial=0) <= 0.5 / 10 + 0.5 / gain + 1e-6


@pytest.mark.parametrize("how", [{"size": (0, 4)}, {"gain": 0}, {"pedestal": -1}])
def test_what_is_refused(how: dict[str, float]) -> None:
    with pytest.raises(InputError, match="expected positive numbers"):
        frame_of(0, **how)
