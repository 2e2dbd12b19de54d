"""halfstep bench encode: against the plain fp32 loop that pre-encoding scripts use, with the same autoencoder."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halfstep.autoencoders import Autoencoder, load_autoencoder, to_pixels
from halfstep.bench.autoencoder import sd_vae_shaped
from halfstep.bench.cases import Case
from halfstep.bench.compare import document, in_turn, ratio
from halfstep.bench.timing import Call
from halfstep.data.pictures import load_fitted
from halfstep.data.sources import SourceConfig
from halfstep.data.toy_world import write_toy_world
from halfstep.encode import EncodeOptions, encode
from halfstep.encode.encoder import encoder_lanes
from halfstep.encode.runner import prepare_run
from halfstep.engine import TeamCrew
from halfstep.machine import open_device, peak_memory_mb
from halfstep.precision import PrecisionPolicy
from halfstep.spec import PixelSpec
from halfstep.store.dataset import DatasetStore

PLAIN_BATCH = 32
_BATCH = 4
_WALK = 32


def bench_encode(
    *, images: int = 64, size: int = 128, rounds: int = 3, autoencoder: str = "sd-vae-shaped", memory: bool = True
) -> dict[str, Any]:
    """Encode `images` pictures (640x480 JPEG, whole walks of 32) at `size` pixels by the plain loop and by `encode`.

    The plain loop: one process, fp32, batches of 32 within a walk, one `.pt` a frame. Times exclude loading the
    autoencoder, and include everything else. `sd-vae-shaped` is an AutoencoderKL of Stable Diffusion's size (83.7M
    parameters) with random weights. Also measured: the encoder alone on the same batches, and the peak memory of
    encoding four times as many pictures.
    """
    with tempfile.TemporaryDirectory(prefix="halfstep-bench-") as scratch:
        folder = Path(scratch)
        model = sd_vae_shaped(folder / "vae") if autoencoder == "sd-vae-shaped" else autoencoder
        walks = max(1, images // _WALK)
        write_toy_world(folder / "world", walks=walks, frames=_WALK, size=(640, 480))
        plain = load_autoencoder(model).prepared(open_device("auto"), PrecisionPolicy(), channels_last=False)
        stores = iter(range(10**6))
        measured: dict[str, DatasetStore] = {}

        def ours(precision: str) -> float:
            output = folder / f"store{next(stores)}"
            options = EncodeOptions(
                output, model, precision=precision, storage="fp16", size=(size, size), batch_size=_BATCH
            )
            report = encode([SourceConfig(path=folder / "world")], options)
            measured[precision] = DatasetStore.open(output)
            return report.seconds

        cases: dict[str, Callable[[], float | None]] = {
            "plain loop, fp32": partial(_plain_loop, plain, folder, size, stores),
            "halfstep, auto": partial(ours, "auto"),
            "halfstep, fp32": partial(ours, "fp32"),
            "encoder alone, auto": partial(_encoder_alone, folder, model, size, walks * _WALK),
        }
        timings = in_turn(cases, rounds)
        overhead = timings["halfstep, auto"].median / timings["encoder alone, auto"].median - 1
        facts = {
            "autoencoder": autoencoder,
            "images": walks * _WALK,
            "size": size,
            "policy": measured["auto"].manifest.policy,
            "speedup_over_plain_loop": ratio(timings, "plain loop, fp32", "halfstep, auto"),
            "speedup_in_fp32": ratio(timings, "plain loop, fp32", "halfstep, fp32"),
            "pipeline_over_encoder": round(overhead, 4),
            "relative_error_against_fp32": round(_relative_error(measured["auto"], measured["fp32"]), 5),
        }
        if memory:
            facts["peak_memory_mb"] = _peak_memory(folder)
        return document("encode", timings, **facts)


def call_of(case: Case, scratch: Path) -> Call:
    """Encode 32 pictures of a toy world with the built-in codec into a new store."""
    write_toy_world(scratch / "world", walks=1, frames=_WALK)

    def call() -> None:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            encode([SourceConfig(path=scratch / "world")], _options(case, Path(folder)))

    return call


def chosen(case: Case, scratch: Path) -> PrecisionPolicy:
    """What `call_of` encodes in."""
    write_toy_world(scratch / "world", walks=1, frames=1)
    return prepare_run([SourceConfig(path=scratch / "world")], _options(case, scratch), TeamCrew())[0].policy


def _options(case: Case, folder: Path) -> EncodeOptions:
    return EncodeOptions(
        folder / "store",
        precision=case.precision,
        storage="fp16",
        size=(case.size, case.size),
        batch_size=_BATCH,
        device=case.device,
    )


@torch.inference_mode()
def _plain_loop(autoencoder: Autoencoder, folder: Path, size: int, stores: Iterator[int]) -> None:
    """What a straightforward script does."""
    pixels = PixelSpec(size, size, "4:3")
    output = folder / f"pt{next(stores)}"
    for walk in sorted((folder / "world").iterdir()):
        (output / walk.name).mkdir(parents=True)
        pictures = sorted(walk.glob("*.jpg"), key=lambda path: int(path.stem))
        for start in range(0, len(pictures), PLAIN_BATCH):
            batch = [load_fitted(path, pixels) for path in pictures[start : start + PLAIN_BATCH]]
            # Contiguous [B, 3, H, W], as the usual transforms deliver it.
            values = to_pixels(torch.from_numpy(np.stack(batch))).contiguous().to(open_device("auto"))
            latents = autoencoder.scaled(autoencoder.encode(values).draw()).cpu()
            for path, latent in zip(pictures[start:], latents, strict=False):
                torch.save({"latent": latent.clone()}, output / walk.name / f"{path.stem}.pt")


def _encoder_alone(folder: Path, model: str, size: int, images: int) -> float:
    """The same batches through the same lanes, without reading, decoding or writing."""
    options = EncodeOptions(folder / "none", model, storage="fp16", size=(size, size), batch_size=_BATCH)
    job, autoencoder, _, _ = prepare_run([SourceConfig(path=folder / "world")], options, TeamCrew())
    batch = np.random.default_rng(0).integers(0, 256, (_BATCH, 1, size, size, 3), dtype=np.uint8)
    with encoder_lanes(job, autoencoder) as lanes:
        start = time.perf_counter()
        for future in [lanes.submit(batch) for _ in range(images // _BATCH)]:
            future.result()
        return time.perf_counter() - start


def _relative_error(ours: DatasetStore, exact: DatasetStore) -> float:
    pairs = [(ours.read(key), exact.read(key)) for key in exact.keys()]
    error = sum(float(((a - b) ** 2).sum()) for a, b in pairs)
    return float(np.sqrt(error / sum(float((b**2).sum()) for _, b in pairs)))


def _peak_memory(folder: Path) -> dict[str, float]:
    """Peak resident memory (MB) of encoding ever more pictures with the built-in codec, each in a fresh process."""
    peaks = {}
    for walks in (4, 16, 64):
        world = folder / f"memory{walks}"
        write_toy_world(world, walks=walks, frames=64)
        script = f"from halfstep.bench.encode import print_own_peak; print_own_peak({str(world)!r})"
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        peaks[f"{walks * 64} items"] = float(result.stdout)
    return peaks


def print_own_peak(world: str) -> None:
    """Encode `world` in this process and print the most memory it ever held, in MB (Linux)."""
    encode([SourceConfig(path=Path(world))], EncodeOptions(Path(f"{world}-store"), batch_size=_BATCH))
    sys.stdout.write(f"{peak_memory_mb(open_device('auto')):.1f}\n")
