"""The predictive codec: its promise holds for anything, its size on real trajectories, and damage is never wrong
numbers."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from halfstep.errors import InputError, StoreError
from halfstep.store.codecs import decode_trajectory, encode_trajectory
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
    decoded = decode_trajectory(encode_trajectory(values, max_error=bound, group=group))
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
    assert keeps_its_promise(path, decode_trajectory(encode_trajectory(path, max_error=bound)), bound)


def test_without_a_bound_everything_is_exact() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, (5, 3, 400), dtype=np.uint32)
    values = bits.view(np.float32)  # any bits: subnormals, every NaN
    for options in ({"fidelity": None}, {"max_error": 0.0}):
        assert decode_trajectory(encode_trajectory(values, **options)).view(np.uint32).tolist() == bits.tolist()


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values.astype(np.float64) ** 2)))


@pytest.mark.parametrize(
    ("name", "group", "most"),
    [("ode_trajectory_20", 16, 0.135), ("ode_trajectory_20", 21, 0.115), ("sde_trajectory_12", 16, 0.34)],
)
def test_sampling_trajectories_at_the_error_of_fp16(name: str, group: int, most: float) -> None:
    latents = np.load(GOLDEN / f"{name}.npz")["latents"]
    blob = encode_trajectory(latents, group=group)
    decoded = decode_trajectory(blob)
    cast = latents.astype(np.float16).astype(np.float32)
    assert rms(decoded - latents) <= rms(cast - latents)
    assert len(blob) <= most * latents.nbytes
    assert len(blob) < len(encode_trajectory(latents, group=1))  # prediction never costs more than none


def test_bf16_fidelity_is_coarser_and_smaller() -> None:
    latents = np.load(GOLDEN / "sde_trajectory_12.npz")["latents"]
    fine, coarse = encode_trajectory(latents), encode_trajectory(latents, fidelity="bf16")
    assert len(coarse) < 0.8 * len(fine)
    # bf16 has three bits of fraction less, so eight times the error.
    ratio = rms(decode_trajectory(coarse) - latents) / rms(decode_trajectory(fine) - latents)
    assert 6 < ratio < 10


def test_noise_costs_no_more_than_plain_quantization() -> None:
    noise = np.random.default_rng(0).standard_normal((12, 4, 2000)).astype(np.float32)
    assert len(encode_trajectory(noise)) <= 1.005 * len(encode_trajectory(noise, group=1))


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
    with pytest.raises(StoreError, match="follow its last group"):
        decode_trajectory(blob + b"more")


@pytest.mark.parametrize(
    ("values", "options", "named"),
    [
        (np.zeros((2, 3)), {}, "got float64"),
        (np.zeros((0, 3), np.float32), {}, r"\[0, 3\]"),
        (np.zeros((2, 3), np.float32), {"max_error": -1.0}, "max_error: got -1.0"),
        (np.zeros((2, 3), np.float32), {"max_error": np.nan}, "max_error: got nan"),
        (np.zeros((2, 3), np.float32), {"fidelity": "fp8"}, "fidelity: got 'fp8'"),
        (np.zeros((2, 3), np.float32), {"group": 0}, "group: got 0"),
    ],
)
def test_bad_arguments_are_named(values: np.ndarray, options: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        encode_trajectory(values, **options)


@pytest.mark.parametrize("options", [{"max_error": 1e-3}, {}, {"fidelity": None}])
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
    assert np.array_equal(zarr.open(str(tmp_path / "a"), mode="r")[20], read[20])
    with pytest.raises(InputError, match="got an array of float64; expected float32"):
        zarr.create_array(str(tmp_path / "b"), shape=(2,), dtype="float64", serializer=PredictiveCodec())
