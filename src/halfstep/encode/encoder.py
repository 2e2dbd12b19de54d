"""Batches of pixels to latents in their storage type: the functions of encode's lanes."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from halfstep.autoencoders import Autoencoder, encode_gate, to_pixels
from halfstep.data.base import Array
from halfstep.encode.job import EncodeJob
from halfstep.engine import Gate, Lanes, Ring, lane_count
from halfstep.precision import torch_dtype
from halfstep.store.formats import largest_finite

# On a CPU the rate hardly depends on the batch (within 10% from 1 to 8 pictures), so nothing is measured there: the
# same command gives the same bits on every run.
_BATCH_ON_CPU = 4
_MEASURED_BATCHES_ON_GPU = (8, 16, 32, 64, 128, 256)
_WORTH_DOUBLING = 1.05


@dataclass(frozen=True)
class Encoded:
    """Arrays [n, ...] in the storage type (bf16 as its bits), why the samples in `refused` must not be stored, and
    which samples had to be computed again in fp32."""

    arrays: dict[str, Array]
    refused: dict[int, str]
    retried: frozenset[int]


EncoderLanes = Lanes[Array, Encoded]


@contextmanager
def encoder_lanes(job: EncodeJob, autoencoder: Autoencoder | None, count: int | None = None) -> Iterator[EncoderLanes]:
    """Lanes for batches uint8 [B, T, H, W, 3]; with `autoencoder=None` for float32 latents [B, 1, C, H, W] that are
    only repacked. `count` lanes instead of as many as suit the device."""
    device = torch.device(job.device)
    reentrant = autoencoder is None or autoencoder.reentrant
    count = count or lane_count(device, shared=reentrant)
    ring = Ring(2 * count, device)
    functions: Sequence[Callable[[Array], Encoded]]
    if autoencoder is None:
        functions = [_Repacking(job)] * count
    else:
        prepared = autoencoder.prepared(device, job.policy, channels_last=job.channels_last)
        copies = [copy.deepcopy(prepared) for _ in range(0 if reentrant else count - 1)]
        encoders = [_Encoder(job, model, device, ring) for model in (prepared, *copies)]
        functions = encoders * count if reentrant else encoders
    with Lanes.open(functions, "encode") as lanes:
        yield lanes


def measure_batch_size(job: EncodeJob, lanes: EncoderLanes) -> int:
    """The batch size for this device: fixed on a CPU; on a GPU doubled, on noise, while that pays and fits."""
    if job.device == "cpu":
        return _BATCH_ON_CPU
    pixels = job.spec.pixels
    assert pixels is not None
    best_size, best_rate = 1, 0.0
    for size in _MEASURED_BATCHES_ON_GPU:
        shape = (size, pixels.clip_length, pixels.height, pixels.width, 3)
        batch = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        try:
            lanes.submit(batch).result()
            start = time.perf_counter()
            for future in [lanes.submit(batch) for _ in range(2 * lanes.count)]:
                future.result()
        except torch.OutOfMemoryError:
            break
        rate = 2 * lanes.count * size / (time.perf_counter() - start)
        if rate < best_rate * _WORTH_DOUBLING:
            break
        best_size, best_rate = size, rate
    return best_size


class _Encoder:
    def __init__(self, job: EncodeJob, model: Autoencoder, device: torch.device, ring: Ring) -> None:
        self._job, self._ring = job, ring
        largest = largest_finite(job.storage)
        self._gate: Gate = encode_gate(model, job.policy, device, largest=largest, channels_last=job.channels_last)

    def __call__(self, batch: Array) -> Encoded:
        pixels = to_pixels(self._ring.upload(torch.from_numpy(batch)))  # [B, 3, T, H, W]
        if self._job.spec.temporal_factor == 1:
            pixels = pixels[:, :, 0]
        checked = self._gate(pixels)
        names = ("latents", "logvar") if self._job.moments else ("latents",)
        arrays = {
            name: _stored(tensor, self._job, self._ring) for name, tensor in zip(names, checked.outputs, strict=False)
        }
        return Encoded(arrays, {n: f"latents {why}" for n, why in checked.refused.items()}, checked.retried)


class _Repacking:
    def __init__(self, job: EncodeJob) -> None:
        self._job = job
        self._ring = Ring(0, torch.device("cpu"))

    def __call__(self, batch: Array) -> Encoded:
        latents = torch.from_numpy(batch)[:, 0]
        fits = (latents.abs() <= largest_finite(self._job.storage)).flatten(1).all(dim=1)
        reason = f"latents are not finite in {self._job.storage}; use another --storage, or make them again"
        refused = {sample: reason for sample, good in enumerate(fits.tolist()) if not good}
        return Encoded({"latents": _stored(latents, self._job, self._ring)}, refused, frozenset())


def _stored(tensor: torch.Tensor, job: EncodeJob, ring: Ring) -> Array:
    rounded = ring.fetch(tensor.to(torch_dtype(job.storage)))
    if rounded.dtype is torch.bfloat16:
        rounded = rounded.view(torch.uint16)
    array: Array = rounded.contiguous().numpy()
    return array
