"""halfstep demo: make a toy world, encode it, check the store, look at what came back, train on it, sample, analyze,
and report what it saved and cost."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from halfstep.autoencoders import Autoencoder, load_autoencoder, to_pixels
from halfstep.data.base import Array
from halfstep.data.pictures import load_fitted
from halfstep.data.sources import SourceConfig
from halfstep.data.toy_world import PLAYGROUND_SIZE, write_toy_world
from halfstep.demo.learn import Learned, learn, worthwhile
from halfstep.demo.pictures import psnr
from halfstep.encode import EncodeOptions, EncodeReport, encode
from halfstep.encode.encoder import encoder_lanes
from halfstep.encode.runner import prepare_run
from halfstep.engine import TeamCrew
from halfstep.errors import StoreError
from halfstep.files import claim, file_errors
from halfstep.machine import open_device
from halfstep.precision import PRESETS, STORAGE_TYPES, PrecisionPolicy, ProbeResult, choose, probe, torch_dtype
from halfstep.progress import Progress
from halfstep.spec import PixelSpec
from halfstep.store import DatasetStore, VerifyReport, verify

_MARKER = ".halfstep-demo"
_SHOWN = 4
_SEED = 100  # of walks that the shipped models never saw
_SPEED_FRAMES = 64
_SPEED_ROUNDS = 3


@dataclass(frozen=True)
class Shown:
    """One frame: uint8 [H, W, 3] before and after, and their PSNR in dB."""

    name: str
    original: Array
    decoded: Array
    psnr: float


@dataclass(frozen=True)
class DemoResult:
    """Everything the report shows. PSNR in dB over all frames, sizes in bytes, speeds in frames a second."""

    encoded: EncodeReport
    verified: VerifyReport
    probed: ProbeResult
    policy: PrecisionPolicy
    frames: list[Shown]
    psnr_by_storage: dict[str, float]
    bytes_by_form: dict[str, int]
    speed_by_precision: dict[str, float]
    learned: Learned
    seconds: float


def run_demo(
    output: Path,
    progress: Progress,
    *,
    walks: int = 16,
    frames: int = 48,
    train_seconds: float = 60,
) -> DemoResult:
    """Run the whole way in `output`, replacing an earlier demo there. Raises InputError when it holds anything else."""
    started = time.monotonic()
    claim(output, "demo", (_MARKER,))
    for name in ("world", "latents", "runs", "clips", "walks", "analysis"):
        shutil.rmtree(output / name, ignore_errors=True)
    with file_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        (output / _MARKER).touch()

    progress.note(f"1/9 a toy world: {walks} walks of {frames} pictures")
    write_toy_world(output / "world", walks=walks, frames=frames, seed=_SEED, play=True)
    progress.note(
        "2/9 encode it with the autoencoder that knows it, in the precision that is measured to be fastest here"
    )
    options = EncodeOptions(output / "latents", "toy", size=PLAYGROUND_SIZE)
    encoded = encode([SourceConfig(path=output / "world")], options)
    store = DatasetStore.open(output / "latents")
    policy = choose(open_device("auto"), "encode")
    progress.note(f"    {encoded.items} frames at {encoded.items_per_second:.0f} a second in {encoded.policy}")
    progress.note("3/9 verify every byte of the store")
    verified = verify(output / "latents")
    if not verified.ok:
        raise StoreError(f"{output / 'latents'}: {verified.problems[0]}")
    progress.note("4/9 decode, compare with the pictures, and time each precision")
    autoencoder = load_autoencoder("toy")
    assert store.spec.pixels is not None
    originals = load_originals(output / "world", store, store.spec.pixels)
    shown = _show(autoencoder, store, originals)
    psnrs = psnr_by_storage(autoencoder, originals)
    speeds = speed_by_precision(options, output / "world", originals)
    return DemoResult(
        encoded=encoded,
        verified=verified,
        probed=probe("cpu"),
        policy=policy,
        frames=shown,
        psnr_by_storage=psnrs,
        bytes_by_form=_bytes_by_form(output / "world", store, len(originals)),
        speed_by_precision=speeds,
        learned=learn(output, progress, train_seconds),
        seconds=time.monotonic() - started,
    )


def load_originals(world: Path, store: DatasetStore, pixels: PixelSpec) -> dict[tuple[str, int], Array]:
    """What the autoencoder saw: uint8 [H, W, 3] by key and frame number."""
    return {
        (key, int(number)): load_fitted(world / key / f"{number}.jpg", pixels)
        for key in store.keys()
        for number in store.read_array(key, "frame")
    }


def psnr_by_storage(autoencoder: Autoencoder, originals: dict[tuple[str, int], Array]) -> dict[str, float]:
    """PSNR over all frames when the fp32 latents are rounded to each storage type before decoding."""
    result = {}
    for storage in STORAGE_TYPES:
        errors = []
        for picture in originals.values():
            pixels = to_pixels(torch.from_numpy(picture.copy())[None])  # of a file, it cannot be written to
            rounded = autoencoder.encode(pixels).mean.to(torch_dtype(storage)).float()
            decoded = autoencoder.decode(rounded).clamp(-1, 1)
            errors.append(float(((decoded - pixels) / 2).double().square().mean()))
        result[storage] = float(-10 * np.log10(np.mean(errors)))
    return result


def speed_by_precision(
    options: EncodeOptions, world: Path, originals: dict[tuple[str, int], Array]
) -> dict[str, float]:
    """Frames a second through the lanes in each preset that is not emulated here, taking turns; the best of a few
    rounds."""
    pictures = list(originals.values())[:_SPEED_FRAMES]
    best: dict[str, float] = {}
    for _ in range(_SPEED_ROUNDS):
        for name in worthwhile("encode", *(name for name in PRESETS if name != "auto")):
            job, autoencoder, _, _ = prepare_run(
                [SourceConfig(path=world)], replace(options, precision=name, batch_size=4), TeamCrew()
            )
            batches = [np.stack(pictures[i : i + 4])[:, None] for i in range(0, len(pictures) - 3, 4)]
            with encoder_lanes(job, autoencoder) as lanes:
                lanes.submit(batches[0]).result()
                start = time.perf_counter()
                for future in [lanes.submit(batch) for batch in batches]:
                    future.result()
            speed = 4 * len(batches) / (time.perf_counter() - start)
            best[name] = max(best.get(name, 0.0), speed)
    return best


def _show(autoencoder: Autoencoder, store: DatasetStore, originals: dict[tuple[str, int], Array]) -> list[Shown]:
    every = list(originals)
    chosen = [every[(2 * i + 1) * len(every) // (2 * _SHOWN)] for i in range(_SHOWN)]
    shown = []
    for key, number in chosen:
        place = int(np.flatnonzero(store.read_array(key, "frame") == number)[0])
        latents = torch.from_numpy(np.array(store.read(key, place, place + 1)))
        decoded = autoencoder.pictures(latents)[0]
        original = originals[key, number]
        shown.append(Shown(f"{key}, frame {number}", original, decoded, psnr(original, decoded)))
    return shown


def _bytes_by_form(world: Path, store: DatasetStore, frames: int) -> dict[str, int]:
    values = store.latent_bytes() // {"fp32": 4, "fp16": 2, "bf16": 2}[store.manifest.storage]
    pixels = store.spec.pixels
    assert pixels is not None
    return {
        "pixels, 8 bits": frames * pixels.width * pixels.height * 3,
        "latents, fp32": values * 4,
        f"latents, {store.manifest.storage} (this store)": store.latent_bytes(),
        "JPEG files": sum(path.stat().st_size for path in world.rglob("*.jpg")),
    }
