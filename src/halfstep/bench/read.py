"""halfstep bench read: random context windows from a store, from a `.pt` tree, from zarr and from streaming formats."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from halfstep.bench.compare import document, in_turn, ratio
from halfstep.data.base import Array
from halfstep.data.export import export
from halfstep.spec import LatentSpec
from halfstep.store import DatasetStore, DatasetWriter, Manifest

SHAPE = (4, 28, 28)  # an SD latent of 224 pixels
CONTEXT = 4
_SCALE = 0.18215


def bench_read(*, walks: int = 100, frames: int = 64, windows: int = 2000, rounds: int = 5) -> dict[str, Any]:
    """Time `windows` random reads of four consecutive [4, 28, 28] frames, delivered model-ready as float32.

    All formats hold the same latents, fp16 where the format allows it; `.pt` files hold one fp32 frame each, as the
    reference workflow writes them. Files are in the page cache for everyone. Seconds are for all windows of a round.
    """
    with tempfile.TemporaryDirectory(prefix="halfstep-bench-") as scratch:
        folder = Path(scratch)
        rng = np.random.default_rng(0)
        latents = rng.standard_normal((walks, frames, *SHAPE), np.float32) / np.float32(_SCALE)
        store = _write_store(folder / "store", latents)
        export(store, "pt-tree", folder / "pt")
        readers: dict[str, Callable[[int, int], Array]] = {
            "halfstep": lambda walk, start: store.read(f"t{walk:04d}", start, start + CONTEXT),
            "pt tree": partial(_read_pt, folder / "pt"),
            "zarr, sharded": _zarr_reader(folder / "zarr", latents),
        }
        absent = {}
        for name, module, make in (
            ("litdata", "litdata", _litdata_reader),
            ("mosaicml-streaming", "streaming", _mosaic_reader),
        ):
            try:
                import_module(module)
            except ImportError as error:
                absent[name] = str(error)
                continue
            with _stdout_to_stderr():
                readers[name] = make(folder / module, latents)
        which = rng.integers(walks, size=windows).tolist()
        starts = rng.integers(frames - CONTEXT, size=windows).tolist()
        places = list(zip(which, starts, strict=True))
        expected = store.read("t0003", 5, 5 + CONTEXT)
        for name, reader in readers.items():
            np.testing.assert_allclose(reader(3, 5), expected, rtol=2e-3, atol=1e-3, err_msg=name)
        timings = in_turn({name: partial(_read_all, reader, places) for name, reader in readers.items()}, rounds)
        return document(
            "read",
            timings,
            frames=walks * frames,
            windows=windows,
            frames_per_window=CONTEXT,
            latent_shape=list(SHAPE),
            microseconds_per_window={name: round(t.median / windows * 1e6, 1) for name, t in timings.items()},
            speedup_over={name: ratio(timings, name, "halfstep") for name in timings if name != "halfstep"},
            not_importable=absent,
        )


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Some libraries greet on stdout, their worker processes too; there belongs one JSON document and nothing else."""
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _read_all(reader: Callable[[int, int], Array], places: list[tuple[int, int]]) -> None:
    for walk, start in places:
        reader(walk, start)


def _write_store(path: Path, latents: Array) -> DatasetStore:
    spec = LatentSpec("random", SHAPE[0], 8, scale=(_SCALE,))
    with DatasetWriter(path, Manifest(spec, "fp16")) as writer:
        for number, walk in enumerate(latents):
            writer.append(f"t{number:04d}", walk)
    return DatasetStore.open(path)


def _read_pt(root: Path, walk: int, start: int) -> Array:
    folder = root / f"t{walk:04d}"
    paths = [folder / f"{number}.pt" for number in range(start, start + CONTEXT)]
    window: Array = torch.stack([torch.load(path, weights_only=True)["latent"] for path in paths]).numpy()
    return window


def _zarr_reader(path: Path, latents: Array) -> Callable[[int, int], Array]:
    import zarr

    array = zarr.create_array(
        str(path), shape=latents.shape, dtype="float16", chunks=(1, 1, *SHAPE), shards=(1, *latents.shape[1:])
    )
    array[:] = latents.astype(np.float16)
    opened: Any = zarr.open_array(str(path), mode="r")

    def read(walk: int, start: int) -> Array:
        window: Array = opened[walk, start : start + CONTEXT].astype(np.float32) * np.float32(_SCALE)
        return window

    return read


def _litdata_reader(path: Path, latents: Array) -> Callable[[int, int], Array]:
    import litdata

    frames = latents.shape[1]
    flat = latents.reshape(-1, *SHAPE).astype(np.float16)
    litdata.optimize(
        fn=partial(_nth_frame, flat),
        inputs=list(range(len(flat))),
        output_dir=str(path),
        chunk_bytes="64MB",
        num_workers=1,
    )
    dataset = litdata.StreamingDataset(str(path))

    def read(walk: int, start: int) -> Array:
        first = walk * frames + start
        window = np.stack([dataset[first + offset] for offset in range(CONTEXT)])
        return window.astype(np.float32) * np.float32(_SCALE)

    return read


def _nth_frame(flat: Array, index: int) -> Array:
    frame: Array = flat[index]
    return frame


def _mosaic_reader(path: Path, latents: Array) -> Callable[[int, int], Array]:
    import streaming

    frames = latents.shape[1]
    with streaming.MDSWriter(out=str(path), columns={"latent": "ndarray:float16:4,28,28"}) as writer:
        for frame in latents.reshape(-1, *SHAPE).astype(np.float16):
            writer.write({"latent": frame})
    dataset = streaming.LocalDataset(str(path))

    def read(walk: int, start: int) -> Array:
        first = walk * frames + start
        window = np.stack([dataset[first + offset]["latent"] for offset in range(CONTEXT)])
        return window.astype(np.float32) * np.float32(_SCALE)

    return read
