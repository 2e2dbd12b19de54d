"""Peaks of masks against plain oracles: the origin's loop over labels, and every way to pair."""

from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy import ndimage

from halfstep.errors import InputError
from halfstep.stream.peaks import find_peaks, match_peaks, measure_peaks

Array = np.ndarray[Any, np.dtype[Any]]
masks = arrays(bool, array_shapes(min_dims=3, max_dims=3, min_side=0, max_side=9))


def by_the_label(mask: Array, values: Array) -> list[tuple[float, float, float, float]]:
    """Image, center of mass and sum, each label looked for in the whole image."""
    peaks = []
    for number, image in enumerate(mask):
        labels, count = ndimage.label(image, np.ones((3, 3)))
        for label in range(1, count + 1):
            y, x = np.nonzero(labels == label)
            peaks.append((number, y.mean(), x.mean(), values[number][labels == label].astype(float).sum()))
    return peaks


def check(mask: Array, values: Array) -> None:
    peaks, intensities = measure_peaks(mask, values)
    assert (peaks.dtype, intensities.dtype) == (np.float32, np.float32)
    expected = np.array(by_the_label(mask, values)).reshape(-1, 4)
    assert peaks.shape == (len(expected), 3)
    np.testing.assert_allclose(peaks, expected[:, :3], rtol=1e-6)
    np.testing.assert_allclose(intensities, expected[:, 3], rtol=1e-6)
    np.testing.assert_array_equal(find_peaks(mask), peaks)


@settings(max_examples=300, deadline=None)
@given(masks, st.sampled_from(["u1", "u2", "i4", "<u8", ">u2", ">f4", "f2", "f8"]))
@example(np.zeros((0, 4, 4), bool), "u2")
@example(np.zeros((2, 0, 4), bool), "u2")
@example(np.zeros((2, 4, 0), bool), "u2")
@example(np.ones((3, 1, 1), bool), "u2")
@example(np.ones((2, 3, 5), bool), "u2")
def test_any_mask_and_type(mask: Array, kind: str) -> None:
    values = np.random.default_rng(mask.sum()).integers(0, 200, mask.shape).astype(kind)
    check(mask, values)


@settings(max_examples=100, deadline=None)
@given(masks, st.permutations([0, 1, 2]), st.tuples(*[st.sampled_from([1, -1, 2, -2])] * 3))
def test_masks_that_are_not_contiguous(mask: Array, axes: list[int], steps: tuple[int, ...]) -> None:
    values = np.arange(mask.size).reshape(mask.shape)
    turned = tuple(slice(None, None, step) for step in steps)
    check(mask.transpose(axes)[turned], values.transpose(axes)[turned])


@pytest.mark.parametrize("density", [0.02, 0.3, 0.5, 0.9])
def test_larger_masks(density: float) -> None:
    """Components that wind and meet again far below, in images next to each other."""
    rng = np.random.default_rng(0)
    check(rng.random((3, 40, 61)) < density, rng.normal(size=(3, 40, 61)))


def test_the_order_is_that_of_the_first_pixels() -> None:
    """The arm of a component that reaches highest counts, though another one lies further to the left."""
    picture = ["....#", "#...#", "..#.#", "..###"]
    mask = np.array([[[pixel == "#" for pixel in row] for row in picture]])
    np.testing.assert_allclose(find_peaks(mask), [[0, 2, 23 / 7], [0, 1, 0]], rtol=1e-6)


def test_corners_touch_and_borders_do_not() -> None:
    corners = np.eye(4, dtype=bool)[None] | np.eye(4, dtype=bool)[None, ::-1]
    assert find_peaks(corners).tolist() == [[0, 1.5, 1.5]]
    ends = np.zeros((2, 3, 4), bool)
    ends[0, 0, -1] = ends[0, 1, 0] = ends[0, -1, -1] = ends[1, 0, 0] = ends[1, 0, -1] = True
    assert find_peaks(ends).tolist() == [[0, 0, 3], [0, 1, 0], [0, 2, 3], [1, 0, 0], [1, 0, 3]]


@pytest.mark.parametrize("columns", [slice(None), slice(None, None, 2)])
def test_a_frame_full_of_peaks(columns: slice) -> None:
    """1920^2 pixels that are one peak, or lines of the width of a pixel; exact, because a half is."""
    mask = np.zeros((1, 1920, 1920), bool)
    mask[..., columns] = True
    peaks, intensities = measure_peaks(mask, np.full(mask.shape, 65535, np.uint16))
    lines = len(peaks)
    assert lines == (1 if columns.step is None else 960)
    x = [959.5] if columns.step is None else np.arange(0, 1920, 2)
    np.testing.assert_array_equal(peaks, np.stack([np.zeros(lines), np.full(lines, 959.5), x], axis=1))
    np.testing.assert_array_equal(intensities, np.float32(mask.sum() / lines * 65535))


def test_sums_are_in_float64() -> None:
    """One more than fp32 can add to."""
    mask, values = np.ones((1, 1, 3), bool), np.array([[[2**24, 1, 1]]], np.float32)
    assert measure_peaks(mask, values)[1] == 2**24 + 2


@pytest.mark.parametrize("mask", [np.zeros((2, 2), bool), np.zeros((1, 2, 2), np.uint8), [[[True]]], None])
def test_other_masks_are_refused(mask: Any) -> None:
    for find in (find_peaks, lambda mask: measure_peaks(mask, mask)):
        with pytest.raises(InputError, match=r"mask: got .*; expected a numpy array of bool \[N, H, W\]"):
            find(mask)


@pytest.mark.parametrize(
    "values", [np.zeros((1, 2, 3)), np.zeros((1, 2, 2), bool), np.zeros((1, 2, 2), complex), np.full((1, 2, 2), "1")]
)
def test_other_values_are_refused(values: Array) -> None:
    with pytest.raises(InputError, match=r"values: got .*; expected real numbers of the mask's shape \[1, 2, 2\]"):
        measure_peaks(np.ones((1, 2, 2), bool), values)


points = arrays(np.int8, st.tuples(st.integers(0, 5), st.just(2)), elements=st.integers(0, 6))


@settings(max_examples=200, deadline=None)
@given(points, points, st.sampled_from([0.0, 1.0, 2.0, 5.0]))
def test_as_many_pairs_as_can_be(found: Array, truth: Array, radius: float) -> None:
    few, many = sorted((found.astype(float), truth.astype(float)), key=len)
    near = np.hypot(*(few[:, None] - many).transpose(2, 0, 1)) <= radius
    ways = permutations(range(len(many)), len(few))
    assert match_peaks(found, truth, radius) == max(near[range(len(few)), list(way)].sum() for way in ways)


def test_a_pair_each() -> None:
    """The nearest first would leave one of them alone."""
    assert match_peaks(np.array([[0.0, 0.0], [0.0, 1.5]]), np.array([[0.0, 1.0], [0.0, 3.0]])) == 2
    assert match_peaks(np.array([[0.0, 0.0], [0.0, 0.1]]), np.array([[0.0, 0.0]])) == 1
    assert match_peaks(np.array([[0.0, 0.0]]), np.array([[0.0, 2.1]])) == 0
