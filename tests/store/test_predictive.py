"""The predictive codec: its promise holds for anything, its size on real trajectories, and damage is never wrong
numbers."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from halfstep.errors import InputError, StoreError
from halfstep.store.predictive import (
    Accuracy,
    Promise,
    count_states,
    decode_states,
    decode_trajectory,
    encode_trajectory,
    first_groups,
)
from halfstep.store.zarr_codec import PredictiveCodec
from tests.support.arrays import GOLDEN

anything = st.floats(width=32, allow_subnormal=True)
bounds = st.sampled_from([0.0, 1e-42, 1e-30, 1e-4, 0.01, 1.0, 1e10, 1e38])


def keeps_its_promise(original: np.ndarray, decoded: np.ndarray, bound: float) -> bool:
    finite = np.isfinite(original)
    error = np.abs(decoded[finite].astype(np.float64) - original[finite].astype(np.float64))
    same = decoded.view(np.uint32)[~finite] == original.view(np.uint32)[~finite]
    return decoded.shape == original.shape and bool((error <= bound).all()) and bool(same.all())


@settings(max_examples=150, deadline=None)
@given(
    arrays(np.float32, array_shapes(min_dims=1, max_dims=5, max_side=6), elements=anything), bounds, st.integers(1, 7)
)
def test_the_bound_holds_for_any_values(values: np.ndarray, bound: float, group: int) -> None:
    decoded = decode_trajectory(encode_trajectory(values, Promise(bound), group=group))
    assert keeps_its_promise(values, decoded, bound)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.sampled_from([1e-6, 1e-3, 0.1]), st.floats(0, 0.05))
def test_the_bound_holds_on_smooth_paths_with_disturbances(seed: int, steps: int, bound: float, share: float) -> None:
    """Long enough that channels have weights of their own; some values jump, some are not finite."""
    rng = np.random.default_rng(seed)
    time = np.linspace(0, 1, steps)[:, None, None]
    ends = rng.standard_normal((3, 2, 300))
    path = (ends[0] + time * ends[1] + time**2 * ends[2]).astype(np.float32)
    places = rng.random(path.shape) < share
    path[places] = rng.choice(np.array([np.nan, np.inf, -np.inf, 1e30, -1e-40, 0], np.float32), places.sum())
    assert keeps_its_promise(path, decode_trajectory(encode_trajectory(path, Promise(bound))), bound)


def test_without_a_bound_everything_is_exact() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, (5, 3, 400), dtype=np.uint32)
    values = bits.view(np.float32)  # any bits: subnormals, every NaN
    for promise in (Promise(fidelity=None), Promise(max_error=0.0)):
        assert decode_trajectory(encode_trajectory(values, promise)).view(np.uint32).tolist() == bits.tolist()


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values.astype(np.float64) ** 2)))


def cast(values: np.ndarray, fidelity: str) -> np.ndarray:
    """Through the half type by torch, which knows both."""
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}[fidelity]
    return torch.from_numpy(values).to(half).float().numpy()


def channel_errors(values: np.ndarray, original: np.ndarray) -> np.ndarray:
    """Root-mean-square errors [S, C]."""
    square = (values.astype(np.float64) - original) ** 2
    return np.sqrt(square.reshape(*square.shape[:2], -1).mean(axis=2))


@pytest.mark.parametrize(
    ("name", "group", "strict", "most"),
    [
        ("ode_trajectory_20", 16, False, 0.095),
        ("ode_trajectory_20", 21, False, 0.092),
        ("ode_trajectory_20", 16, True, 0.100),
        ("sde_trajectory_12", 16, False, 0.330),
        ("sde_trajectory_12", 16, True, 0.331),
    ],
)
def test_sampling_trajectories_at_the_error_of_fp16(name: str, group: int, strict: bool, most: float) -> None:
    latents = np.load(GOLDEN / f"{name}.npz")["latents"]
    blob = encode_trajectory(latents, Promise(strict=strict), group=group)
    decoded = decode_trajectory(blob)
    ours, theirs = channel_errors(decoded, latents), channel_errors(cast(latents, "fp16"), latents)
    shares = ours / theirs
    # The sums behind it are float32: right to a few digits.
    assert shares.max() <= (1.0 if strict else 1.5) * (1 + 1e-4)
    for start in range(0, len(latents), group):
        assert rms(ours[start : start + group]) <= rms(theirs[start : start + group]) * (1 + 1e-4)
    told = Accuracy.of([blob])
    states = [rms(a) / rms(b) for a, b in zip(ours, theirs, strict=True)]
    np.testing.assert_allclose([told.state, told.channel], [max(states), shares.max()], rtol=1e-3)
    assert abs(told.all - rms(ours) / rms(theirs)) < 0.05  # groups weigh alike in it, and their casting errors do not
    assert len(blob) <= most * latents.nbytes
    assert len(blob) < len(encode_trajectory(latents, Promise(strict=strict), group=1))


@pytest.mark.parametrize(
    ("name", "half", "most"),
    [
        ("ode_trajectory_20", "fp16", 0.145),
        ("ode_trajectory_20", "bf16", 0.106),
        ("sde_trajectory_12", "fp16", 0.382),
        ("sde_trajectory_12", "bf16", 0.289),
    ],
)
@pytest.mark.parametrize("fidelity", ["fp16", None])
def test_latents_born_half_come_back_bit_for_bit(name: str, half: str, most: float, fidelity: Any) -> None:
    latents = cast(np.load(GOLDEN / f"{name}.npz")["latents"], half)
    latents[3, 2].flat[:3] = [np.nan, np.inf, -0.0]
    blob = encode_trajectory(latents, Promise(fidelity=fidelity))
    assert decode_trajectory(blob).view(np.uint32).tolist() == latents.view(np.uint32).tolist()
    assert len(blob) <= most * latents.nbytes


def test_channels_of_any_scale_keep_the_promise() -> None:
    """One a fiftieth of the others, one of zeros, one of ones, one of a few numbers that fp16 holds, two far apart."""
    latents = np.load(GOLDEN / "ode_trajectory_20.npz")["latents"].copy()
    latents[:, 5] /= 50
    latents[:, 6], latents[:, 7] = 0, 1
    latents[:, 8] = np.random.default_rng(0).choice([0.5, 0.25, 3], latents[:, 8].shape)
    latents[:, 9] *= 5000
    latents[:, 10] /= 5000
    decoded = decode_trajectory(encode_trajectory(latents))
    assert np.array_equal(decoded[:, 6:9], latents[:, 6:9])
    ours, theirs = channel_errors(decoded, latents), channel_errors(cast(latents, "fp16"), latents)
    assert (ours <= 1.5 * (1 + 1e-4) * theirs).all()


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_channels_may_lie_on_any_axis(axis: int) -> None:
    """Packed latents have them last. What comes back lies as it was."""
    latents = np.load(GOLDEN / "ode_trajectory_20.npz")["latents"][:5].reshape(5, 16, 32, 32)
    moved = np.ascontiguousarray(np.moveaxis(latents, 1, axis + 1 if axis >= 0 else -1))
    blob = encode_trajectory(moved, channel_axis=axis)
    assert len(blob) == len(encode_trajectory(latents))
    back = np.moveaxis(decode_trajectory(blob), axis + 1 if axis >= 0 else -1, 1)
    assert np.array_equal(back, decode_trajectory(encode_trajectory(latents)))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 23), st.integers(1, 9), st.data())
def test_single_states_are_those_of_the_whole(steps: int, group: int, data: st.DataObject) -> None:
    values = np.cumsum(np.random.default_rng(steps).standard_normal((steps, 2, 300)), axis=0).astype(np.float32)
    blob = encode_trajectory(values, group=group)
    whole = decode_trajectory(blob)
    wanted = data.draw(st.lists(st.integers(0, steps - 1), max_size=5))
    assert np.array_equal(decode_states(blob, wanted), whole[wanted])
    assert count_states(blob) == steps
    for missing in (-1, steps):
        with pytest.raises(IndexError):
            decode_states(blob, [missing])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(1, 4))
def test_a_blob_that_grows_is_the_one_made_at_once(parts: list[int], group: int) -> None:
    """As long as what is added begins a group."""
    parts = [part * group for part in parts]
    values = np.cumsum(np.random.default_rng(0).standard_normal((sum(parts), 2, 300)), axis=0).astype(np.float32)
    blob, done = b"", 0
    for part in parts:
        blob = encode_trajectory(values[done : done + part], group=group, after=blob)
        done += part
        assert first_groups(blob, done - part) == (
            encode_trajectory(values[: done - part], group=group) if done > part else b""
        )
    assert blob == encode_trajectory(values, group=group)
    damaged = bytearray(blob)
    damaged[-1] ^= 1
    assert count_states(first_groups(bytes(damaged)) or blob) in (sum(parts) - group, sum(parts))
    with pytest.raises(StoreError, match="no whole groups"):
        first_groups(blob, sum(parts) + 1)
    with pytest.raises(InputError, match="after states of"):
        encode_trajectory(values[:, :1], after=blob)


def test_blobs_of_version_1_are_read_as_they_were() -> None:
    golden = np.load(GOLDEN / "predictive_version1.npz")
    for name in ("smooth", "odd", "exact", "few"):
        blob = golden[f"{name}_blob"].tobytes()
        decoded = decode_trajectory(blob)
        assert decoded.view(np.uint32).tolist() == golden[name].view(np.uint32).tolist()
        assert decode_states(blob, [2, 0]).view(np.uint32).tolist() == decoded[[2, 0]].view(np.uint32).tolist()
        assert count_states(blob) == len(decoded)
        with pytest.raises(StoreError, match="version 1"):
            encode_trajectory(decoded, after=blob)
        for place in (3, 8, len(blob) // 2):
            broken = bytearray(blob)
            broken[place] ^= 1
            with pytest.raises(StoreError, match="trajectory blob: damaged"):
                decode_trajectory(bytes(broken))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([0.0, 1e-30, 1e-6, 1.0, 1e12]),
    st.sampled_from([0.0, 1.0, -3.0]),
    st.integers(0, 3),
    st.sampled_from([(2, 300), (4, 32, 32), (7,)]),
    st.sampled_from([Promise(), Promise(strict=True), Promise(fidelity=None), Promise(1e-3)]),
)
def test_paths_without_anything_new_are_small(
    slope: float, start: float, degree: int, shape: tuple[int, ...], promise: Promise
) -> None:
    """Constant, or the same polynomial everywhere: directions that all say the same must not upset the weights."""
    time = np.linspace(0, 1, 40).reshape(-1, *[1] * len(shape))
    path = (start + slope * time**degree * np.ones(shape)).astype(np.float32)
    blob = encode_trajectory(path, promise)
    decoded = decode_trajectory(blob)
    casting = cast(path, "fp16") - path
    most = 0.0 if promise.fidelity is None else rms(np.where(np.isfinite(casting), casting, 0))
    assert rms(decoded - path) <= (promise.max_error or most * (1 + 1e-4))
    assert len(blob) < 0.5 * path.nbytes + 40 * 60


def test_bf16_fidelity_is_coarser_and_smaller() -> None:
    latents = np.load(GOLDEN / "sde_trajectory_12.npz")["latents"]
    fine, coarse = encode_trajectory(latents), encode_trajectory(latents, Promise(fidelity="bf16"))
    assert len(coarse) < 0.8 * len(fine)
    # bf16 has three bits of fraction less, so eight times the error.
    ratio = rms(decode_trajectory(coarse) - latents) / rms(decode_trajectory(fine) - latents)
    assert 6 < ratio < 10


def test_noise_costs_no_more_than_plain_quantization() -> None:
    noise = np.random.default_rng(0).standard_normal((12, 4, 2000)).astype(np.float32)
    independent = sum(len(encode_trajectory(state[None])) for state in noise)
    assert len(encode_trajectory(noise)) <= 1.005 * independent


def test_any_damage_is_an_error() -> None:
    latents = np.cumsum(np.random.default_rng(0).standard_normal((5, 2, 300)), axis=0).astype(np.float32)
    blob = encode_trajectory(latents, group=2)
    rng = np.random.default_rng(1)
    for bit in {*range(8 * 40), *rng.integers(8 * len(blob), size=200).tolist()}:
        damaged = bytearray(blob)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(StoreError, match="trajectory blob: damaged"):
            decode_trajectory(bytes(damaged))
    for cut in (0, 5, 30, len(blob) // 2, len(blob) - 1):
        with pytest.raises(StoreError, match="trajectory blob: damaged"):
            decode_trajectory(blob[:cut])
    with pytest.raises(StoreError, match="trajectory blob: damaged, 5 of its 5 states"):
        decode_trajectory(blob + b"more")


@pytest.mark.parametrize(
    ("values", "options", "named"),
    [
        (np.zeros((2, 3)), {}, "got float64"),
        (np.zeros((0, 3), np.float32), {}, r"\[0, 3\]"),
        (np.zeros((2, 3), np.float32), {"group": 0}, "group: got 0"),
    ],
)
def test_bad_arguments_are_named(values: np.ndarray, options: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        encode_trajectory(values, **options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_error": -1.0}, "max_error: got -1.0"),
        ({"max_error": np.nan}, "max_error: got nan"),
        ({"fidelity": "fp8"}, "fidelity: got 'fp8'"),
    ],
)
def test_promises_that_cannot_be_kept_are_named(options: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        Promise(**options)


@pytest.mark.parametrize("options", [{"max_error": 1e-3}, {}, {"fidelity": None}, {"strict": True, "channel_axis": -1}])
def test_zarr_finds_the_codec_by_itself(tmp_path: Path, options: dict) -> None:
    """A program that has never heard of halfstep opens the array; it is installed beside it, no more."""
    path = np.cumsum(np.random.default_rng(0).standard_normal((21, 2, 4, 80)), axis=0).astype(np.float32) / 9
    array = zarr.create_array(
        str(tmp_path / "a"),
        shape=path.shape,
        chunks=(8, 2, 4, 80),
        dtype="float32",
        serializer=PredictiveCodec(**options),
        compressors=None,
    )
    array[:] = path
    script = "import sys, zarr, numpy; assert 'halfstep' not in sys.modules; "
    script += "numpy.save(sys.argv[2], zarr.open(sys.argv[1], mode='r')[:])"
    subprocess.run([sys.executable, "-c", script, tmp_path / "a", tmp_path / "out.npy"], check=True)
    read = np.load(tmp_path / "out.npy")
    bound = options.get("max_error", 0.0 if "fidelity" in options else 2e-3)
    assert np.abs(read - path).max() <= bound
    opened = zarr.open_array(str(tmp_path / "a"), mode="r")
    for part in (20, -1, (slice(3, 20, 4),), (slice(None), 1), (5, 0, slice(2), 7), (slice(7, 9), slice(1), 3)):
        assert np.array_equal(opened[part], read[part]), part
    assert np.array_equal(opened.oindex[[1, 9, 20], :, [0, 3]], read[np.ix_([1, 9, 20], [0, 1], [0, 3])])
    assert np.array_equal(
        opened.vindex[[1, 9, 9], [0, 1, 0], [0, 3, 1], [7, 7, 0]], read[[1, 9, 9], [0, 1, 0], [0, 3, 1], [7, 7, 0]]
    )
    with pytest.raises(InputError, match="got an array of float64; expected float32"):
        zarr.create_array(str(tmp_path / "b"), shape=(2,), dtype="float64", serializer=PredictiveCodec())


def test_numcodecs_finds_the_codec_by_its_name(tmp_path: Path) -> None:
    path = np.cumsum(np.random.default_rng(0).standard_normal((21, 2, 4, 80)), axis=0).astype(np.float32) / 9
    script = """
import sys, numcodecs, numpy
codec = numcodecs.get_codec({"id": "halfstep.predictive", "strict": True})
assert numcodecs.get_codec(codec.get_config()) == codec
values = numpy.load(sys.argv[1])
numpy.save(sys.argv[2], codec.decode(codec.encode(values), out=numpy.empty_like(values)))
"""
    np.save(tmp_path / "in.npy", path)
    subprocess.run([sys.executable, "-c", script, tmp_path / "in.npy", tmp_path / "out.npy"], check=True)
    expected = decode_trajectory(encode_trajectory(path, Promise(strict=True)))
    assert np.array_equal(np.load(tmp_path / "out.npy"), expected)
    with pytest.raises(InputError, match=r"halfstep.predictive: got float64 \[3\]"):
        numcodecs.get_codec({"id": "halfstep.predictive"}).encode(np.zeros(3))
    with pytest.raises(StoreError, match="damaged"):
        numcodecs.get_codec({"id": "halfstep.predictive"}).decode(b"x" * 40)
