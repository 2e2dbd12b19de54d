"""The small PeakNet that the package brings, on frames that it was not trained on."""

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch

from halfstep.data.diffraction import Frame, diffraction_frame
from halfstep.models import PeakNet
from halfstep.stream import Preparation
from halfstep.stream.events import Array
from halfstep.stream.peaks import find_peaks, match_peaks

WEIGHTS = Path(str(files("halfstep.demo") / "peaknet_small.safetensors"))
SIZES = [(256, 256)] * 16 + [(512, 512)] * 4 + [(192, 320)] * 4


@pytest.fixture(scope="module")
def network() -> PeakNet:
    return PeakNet.load(WEIGHTS)


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    return [diffraction_frame(np.random.default_rng(20_000 + seed), size) for seed, size in enumerate(SIZES)]


def peaks_of(fused: torch.nn.Module, frame: Frame) -> Array:
    """Places [P, 2]."""
    prepared = Preparation(mask=frame.mask, dtype=next(fused.parameters()).dtype)(frame.values[None])
    with torch.inference_mode():
        return find_peaks((fused(prepared)[0] > 0).numpy())[:, 1:]


def counts(fused: torch.nn.Module, frames: list[Frame]) -> tuple[int, int, int]:
    """Peaks that were found, all that were said to be, and all that there are."""
    found = [peaks_of(fused, frame) for frame in frames]
    right = sum(match_peaks(peaks, frame.peaks) for peaks, frame in zip(found, frames, strict=True))
    return right, sum(map(len, found)), sum(len(frame.peaks) for frame in frames)


def test_it_is_small(network: PeakNet) -> None:
    assert WEIGHTS.stat().st_size < 1_000_000
    assert sum(parameter.numel() for parameter in network.parameters()) < 250_000


def test_peaks_are_found_and_no_others(network: PeakNet, frames: list[Frame]) -> None:
    right, found, there = counts(network.fused(), frames)
    assert there > 500
    assert right >= 0.98 * there
    assert right >= 0.95 * found


@pytest.mark.parametrize(("gain", "pedestal"), [(1.0, 50.0), (2.5, 5000.0), (30.0, 0.0)])
def test_units_of_the_wire(network: PeakNet, gain: float, pedestal: float) -> None:
    frames = [
        diffraction_frame(np.random.default_rng(20_000 + seed), gain=gain, pedestal=pedestal) for seed in range(12)
    ]
    right, found, there = counts(network.fused(), frames)
    assert there > 100
    assert right >= 0.98 * there
    assert right >= 0.95 * found


def test_where_nothing_is_nothing_is_found(network: PeakNet) -> None:
    """Solvent alone: a peak in four frames at most. Frames of one value or without data: none."""
    fused = network.fused()
    solvent = [diffraction_frame(np.random.default_rng(20_000 + seed), hit=False) for seed in range(20)]
    assert counts(fused, solvent)[1] <= 5
    for frame in solvent[:6]:
        for value in (0, 1, 4711, 65535):
            flat = replace(frame, values=np.where(frame.mask, value, 0).astype(np.uint16))
            assert not len(peaks_of(fused, flat))
        assert not len(peaks_of(fused, replace(frame, mask=np.zeros_like(frame.mask))))


@pytest.mark.parametrize("size", [(32, 32), (64, 352), (1024, 1024)])
def test_constant_frames_of_other_sizes(network: PeakNet, size: tuple[int, int]) -> None:
    with torch.inference_mode():
        assert (network.fused()(torch.zeros(1, 1, *size)) < 0).all()


def test_the_fused_margin_is_the_difference_of_the_logits(network: PeakNet, frames: list[Frame]) -> None:
    with torch.inference_mode():
        prepared = Preparation(mask=frames[0].mask)(frames[0].values[None])
        logits, margin = network(prepared), network.fused()(prepared)
    exact = logits[:, 1:] - logits[:, :1]
    assert (margin - exact).abs().max() < 1e-4 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_finds_the_same(network: PeakNet, frames: list[Frame], dtype: torch.dtype) -> None:
    fused, half = network.fused(), network.fused().to(dtype)
    same = exact = halved = 0
    for frame in frames:
        one, other = peaks_of(fused, frame), peaks_of(half, frame)
        same += match_peaks(one, other)
        exact, halved = exact + len(one), halved + len(other)
    assert same >= 0.998 * max(exact, halved)
