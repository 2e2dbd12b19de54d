"""halfstep bench trajectory: ways to keep sampling trajectories, and what recording costs a sampler."""

from __future__ import annotations

import gzip
import io
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zarr
from pcodec import ChunkConfig, standalone
from zarr.codecs import BloscCodec

from halfstep.bench.compare import Timing, busy_processes, document, in_turn
from halfstep.errors import InputError
from halfstep.machine import cores, open_device
from halfstep.sampling import MemoryRecorder, NullRecorder, Recorder, Step, StoreRecorder, drive
from halfstep.sampling.toy_flow import ToyFlow, smooth_field
from halfstep.store import TrajectoryStore
from halfstep.store.predictive import GROUP, Noise, Promise, decode_states, decode_trajectory, encode_trajectory

Float32 = npt.NDArray[np.float32]
SHAPE = (16, 8, 40, 64)  # latents of 29 frames of 512 x 320 pixels, a video autoencoder's: 1.3 MB a state in fp32
STATES = 32
SMALL = (16, 32, 32)  # 64 kB a state
SEED = 0
_LEAST_STEP = 0.05  # seconds of a sampler's step beside which recording is measured


@dataclass(frozen=True)
class Keeper:
    """One way to keep a trajectory: `encode` all of it, `decode` all of it, decode `step` k alone."""

    encode: Callable[[Float32], Any]
    decode: Callable[[Any], Float32]
    step: Callable[[Any, int], Float32]
    size: Callable[[Any], int]


def bench_trajectory(*, files: Sequence[Path] = (), rounds: int = 5, recorder: bool = True) -> dict[str, Any]:
    """Size, error, rates and random access of each way to keep trajectories: one sampled here, and those in `files`
    (`.npz` with `latents` [S, ...] in float32); then a sampler's time with recording on and off.

    Rates are in MB of fp32 a second, in memory, and a second of processor time; seconds are for a whole trajectory. All
    ways take turns in each round. `worst_channel_error`: of a channel of a state, as a share of casting it to fp16.
    """
    sampled = {"sampled": sampled_trajectory(SHAPE), "small": sampled_trajectory(SMALL)}
    trajectories = {**sampled, **{path.stem: _load(path) for path in files}}
    keepers, absent = _keepers()
    timings: dict[str, Timing] = {}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="halfstep-bench-") as scratch:
        for name, latents in trajectories.items():
            own = {**keepers, **_zarr_keepers(Path(scratch)), **_equal_error_keepers(latents, absent)}
            kept = {case: keeper.encode(latents) for case, keeper in own.items()}
            encode = in_turn({case: partial(_discard, keeper.encode, latents) for case, keeper in own.items()}, rounds)
            decode = in_turn({case: partial(_discard, own[case].decode, kept[case]) for case in own}, rounds)
            places = np.random.default_rng(0).integers(len(latents), size=8).tolist()
            step = in_turn({case: partial(_steps, own[case], kept[case], places) for case in own}, rounds)
            megabytes = latents.nbytes / 1e6
            cpu = {
                case: (_cpu_seconds(keeper.encode, latents), _cpu_seconds(keeper.decode, kept[case]))
                for case, keeper in own.items()
            }
            results[name] = {"shape": list(latents.shape), "megabytes": round(megabytes, 2), "ways": {}}
            for case in own:
                decoded = own[case].decode(kept[case])
                error = decoded.astype(np.float64) - latents
                results[name]["ways"][case] = {
                    "share_of_fp32": round(own[case].size(kept[case]) / latents.nbytes, 4),
                    "rms_error": float(f"{np.sqrt(np.mean(error**2)):.4g}"),
                    "worst_channel_error": _worst_channel(decoded, latents),
                    "encode_mb_per_s": round(megabytes / encode[case].median, 1),
                    "decode_mb_per_s": round(megabytes / decode[case].median, 1),
                    "encode_mb_per_cpu_s": round(megabytes / cpu[case][0], 1),
                    "decode_mb_per_cpu_s": round(megabytes / cpu[case][1], 1),
                    "random_step_ms": round(1e3 * step[case].median / len(places), 3),
                }
            timings |= {f"{name}: encode, {case}": timing for case, timing in encode.items()}
            timings |= {f"{name}: decode, {case}": timing for case, timing in decode.items()}
    cost = bench_recorder(rounds=2 * rounds) if recorder else None
    return document("trajectory", timings, trajectories=results, not_measured=absent, recorder=cost)


def _cpu_seconds(call: Callable[[Any], Any], argument: Any) -> float:
    start = time.process_time()
    call(argument)
    return time.process_time() - start


def _worst_channel(decoded: Float32, latents: Float32) -> float:
    """The largest error of a channel of a state, as a share of that of casting it to fp16."""
    ours, casting = (
        np.square(other.astype(np.float64) - latents).reshape(*latents.shape[:2], -1).mean(axis=2)
        for other in (decoded, latents.astype(np.float16))
    )
    rounds = casting > 0
    return round(float(np.sqrt((ours[rounds] / casting[rounds]).max(initial=0.0))), 3)


def sampled_trajectory(shape: tuple[int, ...]) -> Float32:
    """States of a toy flow, float32 [33, *shape]."""
    generator = torch.Generator().manual_seed(0)
    flow = ToyFlow(torch.stack([smooth_field(shape, generator) for _ in range(4)]), spread=0.3)
    memory = MemoryRecorder()
    drive(flow.sample(SEED, steps=STATES), [memory])
    return np.stack([step.latent.numpy() for step in memory.steps])


@torch.random.fork_rng(devices=[])
def bench_recorder(*, rounds: int, steps: int = 24) -> dict[str, Any]:
    """A sampler whose network takes 50 ms a step or more, with recording off and on in turn, from the same seed.

    Latents are [16, 3, 32, 32] (0.2 MB), a convolutional network stands for the model, called as often in a step as
    that takes. `overhead` is what recording
    adds to the sampling itself, `overhead_with_finish` also counts the wait at the end, until all is encoded;
    `overhead_beside_others`: the first beside as many busy processes as there are cores.
    """
    torch.manual_seed(0)
    width = 160
    network = torch.nn.Sequential(
        torch.nn.Conv3d(16, width, 3, padding=1),
        torch.nn.SiLU(),
        torch.nn.Conv3d(width, width, 3, padding=1),
        torch.nn.SiLU(),
        torch.nn.Conv3d(width, 16, 3, padding=1),
    ).eval()
    model = _Network(network.to(open_device("auto")), steps, 1)
    model.sample(NullRecorder())
    started = time.perf_counter()
    model.sample(NullRecorder())
    step = (time.perf_counter() - started) / steps
    model = replace(model, calls=max(1, math.ceil(_LEAST_STEP / step)))
    samples: dict[str, torch.Tensor] = {}
    finished: dict[str, list[float]] = {"off": [], "on": []}
    with tempfile.TemporaryDirectory(prefix="halfstep-bench-") as scratch:
        store = TrajectoryStore.create(Path(scratch) / "runs")
        count = iter(range(10**6))

        def run(case: str) -> float:
            recorder: Recorder = NullRecorder() if case == "off" else StoreRecorder(store, f"r{next(count)}")
            start = time.perf_counter()
            samples[case] = model.sample(recorder)
            sampled = time.perf_counter() - start
            recorder.finish()
            finished[case].append(time.perf_counter() - start)
            return sampled

        for case in ("off", "on"):  # warm up
            run(case)
            finished[case].clear()
        cases: dict[str, Callable[[], float | None]] = {"off": partial(run, "off"), "on": partial(run, "on")}
        timings = in_turn(cases, rounds)
        with_finish = float(np.median(finished["on"])) / float(np.median(finished["off"]))
        with busy_processes(cores()):
            beside = in_turn(cases, rounds)
    return {
        "steps": steps,
        "step_ms": round(1e3 * timings["off"].median / steps, 1),
        "seconds": {case: asdict(timing) for case, timing in timings.items()},
        "overhead": round(timings["on"].median / timings["off"].median - 1, 4),
        "overhead_with_finish": round(with_finish - 1, 4),
        "overhead_beside_others": round(beside["on"].median / beside["off"].median - 1, 4),
        "seconds_beside_others": {case: asdict(timing) for case, timing in beside.items()},
        "same_samples": bool(torch.equal(samples["off"], samples["on"])),
    }


@dataclass(frozen=True)
class _Network:
    """A sampler around a network: Euler steps along what it returns."""

    network: torch.nn.Module
    steps: int
    calls: int  # of the network in a step

    def sample(self, recorder: Recorder) -> torch.Tensor:
        x = torch.randn((16, 3, 32, 32), generator=torch.Generator().manual_seed(0))
        x = x.to(next(self.network.parameters()).device)
        recorder.record(Step(0, 1000.0, 1.0, x))
        with torch.inference_mode():
            for k in range(1, self.steps + 1):
                for _ in range(self.calls):
                    x = x + self.network(x[None])[0] / (self.steps * self.calls)
                sigma = 1 - k / self.steps
                recorder.record(Step(k, 1000 * sigma, sigma, x))
        return x.cpu()


def _load(path: Path) -> Float32:
    try:
        latents: Float32 = np.load(path, allow_pickle=False)["latents"]
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected .npz with latents [S, ...] in float32") from error
    return latents


def _discard(work: Callable[[Any], Any], argument: Any) -> None:
    work(argument)  # what it returns would be taken for seconds


def _steps(keeper: Keeper, kept: Any, places: Sequence[int]) -> None:
    for k in places:
        keeper.step(kept, k)


def _each_step(encode: Callable[[Any], bytes], decode: Callable[[bytes], Any], dtype: str) -> Keeper:
    """A way that keeps every step on its own, in numpy type `dtype`."""
    return Keeper(
        lambda latents: [encode(step) for step in latents.astype(dtype)],
        lambda blobs: np.stack([decode(blob) for blob in blobs]).astype(np.float32),
        lambda blobs, k: np.asarray(decode(blobs[k])).astype(np.float32),
        lambda blobs: sum(map(len, blobs)),
    )


def _keepers() -> tuple[dict[str, Keeper], dict[str, str]]:
    keepers = {
        "halfstep, groups of 16": _halfstep(),
        "halfstep, strict": _halfstep(strict=True),
        "halfstep, whole run": _halfstep(1 << 15),
        "halfstep, seed known": _halfstep(noise=Noise(SEED)),
        "halfstep, born fp16": _halfstep(born=torch.float16),
        "halfstep, born bf16": _halfstep(born=torch.bfloat16),
        "npy.gz, fp32": _each_step(_npy_gz, _from_npy_gz, "float32"),
        "npy.gz, fp16": _each_step(_npy_gz, _from_npy_gz, "float16"),
        "torch.save, fp32": _each_step(_torch_save, _torch_load, "float32"),
        "torch.save, fp16": _each_step(_torch_save, _torch_load, "float16"),
    }
    absent = {}
    try:
        import blosc2

        keepers["blosc2 shuffle zstd-1, fp16"] = _each_step(
            lambda step: bytes(blosc2.pack_array2(step, cparams={"codec": blosc2.Codec.ZSTD, "clevel": 1})),
            blosc2.unpack_array2,
            "float16",
        )
    except ImportError as error:
        absent["blosc2"] = str(error)
    return keepers, absent


def _halfstep(
    group: int = GROUP, *, strict: bool = False, noise: Noise | None = None, born: torch.dtype = torch.float32
) -> Keeper:
    """The codec at the error of fp16, of latents that a sampler in the type `born` hands out. A state alone costs the
    decoding of those it was predicted from."""

    def encode(latents: Float32) -> list[bytes]:
        latents = torch.from_numpy(latents).to(born).float().numpy()
        return [encode_trajectory(latents, Promise(strict=strict), group=group, noise=noise)]

    return Keeper(
        encode,
        lambda blobs: decode_trajectory(blobs[0]),
        lambda blobs, k: decode_states(blobs[0], [k])[0],
        lambda blobs: sum(map(len, blobs)),
    )


def _equal_error_keepers(latents: Float32, absent: dict[str, str]) -> dict[str, Keeper]:
    """General compressors of floats, set to the root-mean-square error of casting to fp16."""
    keepers = {"pcodec, fp16": _each_step(_pcodec, partial(_from_pcodec, shape=latents.shape[1:]), "float16")}
    try:
        import zfpy
    except ImportError as error:
        absent["zfp"] = str(error)
        return keepers
    target = float(np.sqrt(np.mean((latents.astype(np.float16).astype(np.float64) - latents) ** 2)))
    tolerance = 64 * target
    while _zfp_error(zfpy, latents, tolerance) > target:
        tolerance /= 2  # zfp's own error is at steps of two
    keepers["zfp, fp32, at fp16's error"] = _each_step(
        lambda step: bytes(zfpy.compress_numpy(np.ascontiguousarray(step), tolerance=tolerance)),
        zfpy.decompress_numpy,
        "float32",
    )
    return keepers


def _zfp_error(zfpy: Any, latents: Float32, tolerance: float) -> float:
    step = np.ascontiguousarray(latents[len(latents) // 2])
    decoded = zfpy.decompress_numpy(zfpy.compress_numpy(step, tolerance=tolerance))
    return float(np.sqrt(np.mean((decoded.astype(np.float64) - step) ** 2)))


def _zarr_keepers(scratch: Path) -> dict[str, Keeper]:
    """Zarr arrays on disk, a chunk a step, with its own codecs."""
    codecs: dict[str, Any] = {
        "zarr raw, fp32": (None, "float32"),
        "zarr zstd (its default), fp16": ("auto", "float16"),
        "zarr blosc shuffle zstd-1, fp16": (BloscCodec(cname="zstd", clevel=1, shuffle="shuffle"), "float16"),
    }
    return {name: _zarr(scratch / f"z{i}", *options) for i, (name, options) in enumerate(codecs.items())}


def _zarr(path: Path, compressors: Any, dtype: str) -> Keeper:
    def encode(latents: Float32) -> Any:
        array = zarr.create_array(
            str(path),
            shape=latents.shape,
            chunks=(1, *latents.shape[1:]),
            dtype=dtype,
            compressors=compressors,
            overwrite=True,
        )
        array[:] = latents.astype(dtype)
        return array

    return Keeper(
        encode,
        lambda array: np.asarray(array[:]).astype(np.float32),
        lambda array, k: np.asarray(array[k]).astype(np.float32),
        lambda array: array.nbytes_stored(),
    )


def _npy_gz(step: npt.NDArray[Any]) -> bytes:
    plain = io.BytesIO()
    np.save(plain, step)
    return gzip.compress(plain.getvalue(), 9)


def _from_npy_gz(blob: bytes) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = np.load(io.BytesIO(gzip.decompress(blob)))
    return array


def _torch_save(step: npt.NDArray[Any]) -> bytes:
    file = io.BytesIO()
    torch.save(torch.from_numpy(np.ascontiguousarray(step)), file)
    return file.getvalue()


def _torch_load(blob: bytes) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = torch.load(io.BytesIO(blob), weights_only=True).numpy()
    return array


def _pcodec(step: npt.NDArray[Any]) -> bytes:
    return bytes(standalone.simple_compress(np.ascontiguousarray(step).reshape(-1), ChunkConfig()))


def _from_pcodec(blob: bytes, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    return np.asarray(standalone.simple_decompress(blob)).reshape(shape)
