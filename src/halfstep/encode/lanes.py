"""Run an autoencoder over batches on a device, several batches at once.

On a CPU each lane is one thread that computes on one core, with as many lanes as cores. Splitting single operations
over
cores instead is no faster for these networks, and sums in an order that depends on the number of cores: with lanes, a
latent is the same bit for bit whatever the machine's size and the number of processes.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from halfstep.autoencoders import Autoencoder, encode_gate, to_pixels
from halfstep.data.base import Array
from halfstep.encode.job import EncodeJob
from halfstep.precision import Gate, torch_dtype
from halfstep.store.formats import largest_finite
from halfstep.team import own_cores

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


class Lanes:
    """`submit` batches of fitted pixels; each future gives their Encoded. Use as a context manager."""

    def __init__(self, job: EncodeJob, autoencoder: Autoencoder | None, count: int | None = None) -> None:
        self.job = job
        self._device = torch.device(job.device)
        self.count = count or _lane_count(self._device, autoencoder)
        self._gates = self._make_gates(autoencoder)
        self._threads_before = torch.get_num_threads()
        initializer = (lambda: torch.set_num_threads(1)) if self._device.type == "cpu" else None
        self._pool = ThreadPoolExecutor(self.count, "encode", initializer=initializer)
        self._lane = threading.local()

    @classmethod
    @contextmanager
    def open(cls, job: EncodeJob, autoencoder: Autoencoder | None, count: int | None = None) -> Iterator[Lanes]:
        """`autoencoder=None` only repacks latents; `count` lanes instead of one a core."""
        lanes = cls(job, autoencoder, count)
        try:
            yield lanes
        finally:
            lanes._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(lanes._threads_before)

    def submit(self, batch: Array) -> Future[Encoded]:
        """`batch` is uint8 [B, T, H, W, 3], or float32 latents [B, 1, C, H, W] that are only repacked."""
        return self._pool.submit(self._encode, batch)

    def measure_batch_size(self) -> int:
        """The batch size for this device: fixed on a CPU; on a GPU doubled, on noise, while that pays and fits."""
        if self._device.type == "cpu":
            return _BATCH_ON_CPU
        pixels = self.job.spec.pixels
        assert pixels is not None
        best_size, best_rate = 1, 0.0
        for size in _MEASURED_BATCHES_ON_GPU:
            shape = (size, pixels.clip_length, pixels.height, pixels.width, 3)
            batch = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
            try:
                self.submit(batch).result()
                start = time.perf_counter()
                for future in [self.submit(batch) for _ in range(2 * self.count)]:
                    future.result()
            except torch.OutOfMemoryError:
                break
            rate = 2 * self.count * size / (time.perf_counter() - start)
            if rate < best_rate * _WORTH_DOUBLING:
                break
            best_size, best_rate = size, rate
        return best_size

    def _make_gates(self, autoencoder: Autoencoder | None) -> list[Gate]:
        if autoencoder is None:
            return []
        job = self.job
        prepared = autoencoder.prepared(self._device, job.policy, channels_last=job.channels_last)
        copies = 1 if autoencoder.reentrant else self.count
        models = [prepared, *(copy.deepcopy(prepared) for _ in range(copies - 1))]
        largest = largest_finite(job.storage)
        return [
            encode_gate(model, job.policy, self._device, largest=largest, channels_last=job.channels_last)
            for model in models
        ]

    def _encode(self, batch: Array) -> Encoded:
        values = torch.from_numpy(batch)
        return self._run(values) if self._gates else self._repack(values[:, 0])

    def _run(self, values: torch.Tensor) -> Encoded:
        if self._device.type == "cuda":
            values = values.pin_memory()
        pixels = to_pixels(values.to(self._device, non_blocking=True))  # [B, 3, T, H, W]
        if self.job.spec.temporal_factor == 1:
            pixels = pixels[:, :, 0]
        checked = self._gate()(pixels)
        names = ("latents", "logvar") if self.job.moments else ("latents",)
        arrays = {name: self._stored(tensor) for name, tensor in zip(names, checked.outputs, strict=False)}
        return Encoded(arrays, {n: f"latents {why}" for n, why in checked.refused.items()}, checked.retried)

    def _repack(self, latents: torch.Tensor) -> Encoded:
        fits = (latents.abs() <= largest_finite(self.job.storage)).flatten(1).all(dim=1)
        reason = f"latents are not finite in {self.job.storage}; use another --storage, or make them again"
        refused = {sample: reason for sample, good in enumerate(fits.tolist()) if not good}
        return Encoded({"latents": self._stored(latents)}, refused, frozenset())

    def _gate(self) -> Gate:
        if len(self._gates) == 1:
            return self._gates[0]
        if not hasattr(self._lane, "gate"):
            self._lane.gate = self._gates[int(threading.current_thread().name.rsplit("_", 1)[1])]
        gate: Gate = self._lane.gate
        return gate

    def _stored(self, tensor: torch.Tensor) -> Array:
        rounded = tensor.to(torch_dtype(self.job.storage)).cpu()
        if rounded.dtype is torch.bfloat16:
            rounded = rounded.view(torch.uint16)
        array: Array = rounded.contiguous().numpy()
        return array


def _lane_count(device: torch.device, autoencoder: Autoencoder | None) -> int:
    if device.type != "cpu":
        # One batch computes while the other is copied and converted; a second model in memory is not worth it.
        return 2 if autoencoder is None or autoencoder.reentrant else 1
    return own_cores()
