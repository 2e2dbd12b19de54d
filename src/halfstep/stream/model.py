"""The network of a run: where it comes from, in which precision it runs, and what a lane makes of a batch.

Axes: B samples, C channels, H W pixels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from halfstep.engine import Checked, Gate, Ring
from halfstep.engine.graphs import Graphed
from halfstep.errors import InputError
from halfstep.files import sha256_of
from halfstep.models import PeakNet
from halfstep.opening import TORCH_FILES, open_model
from halfstep.precision import PrecisionPolicy, Trial, prepare, torch_dtype
from halfstep.stream.events import Array


@dataclass(frozen=True)
class ModelSpec:
    """`model`: a file of PeakNet weights, of `torch.export` (.pt2) or TorchScript (.ts, .torchscript), or
    `package.module:function`, which returns a module. `config` says what PeakNet's weights must agree with.
    `compile_mode` is one of torch.compile's; `warmup` batches are computed before the first that counts."""

    model: str
    config: Mapping[str, Any] = field(default_factory=dict)
    compile_mode: str | None = None
    warmup: int = 1


@dataclass(frozen=True)
class Computed:
    """Of the samples of a batch: `masks` [B, H, W] bool where the network tells two classes apart, else `outputs`
    [B, ...] float32; why those in `refused` cannot be used, which were computed again in fp32, and the seconds it
    took."""

    masks: Array | None
    outputs: Array | None
    refused: dict[int, str]
    retried: frozenset[int]
    seconds: float


def load_network(spec: ModelSpec) -> nn.Module:
    """The network in fp32, for inference; PeakNet in its fused form. Raises InputError when it cannot be had: there are
    no random weights."""
    path = Path(spec.model)
    if path.suffix in TORCH_FILES or (not path.exists() and ":" in spec.model):
        return open_model(spec.model).module
    return PeakNet.load(path, **spec.config).fused()


def multiple_of(spec: ModelSpec) -> int:
    """By what the sides of its samples must be divisible; others' networks take what comes."""
    is_peaknet = ":" not in spec.model and Path(spec.model).suffix not in TORCH_FILES
    return 32 if is_peaknet else 1


def network_name(spec: ModelSpec) -> str:
    """What to call a network for good: a file's name with the start of its SHA-256, or the function's."""
    path = Path(spec.model)
    return f"{path.name} {sha256_of(path)[:16]}" if path.is_file() else spec.model


class Inference:
    """What a lane does: samples [B, C, H, W] of the policy's type to Computed. One may serve several lanes. It can be
    sent to another process, where it loads the network anew."""

    def __init__(self, spec: ModelSpec, policy: PrecisionPolicy, device: str, copies: int = 4) -> None:
        self._spec, self._policy, self._device = spec, policy, torch.device(device)
        self._ring = Ring(copies, self._device)
        network = self._network(policy)
        self.weight_bytes = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))

        def margin(samples: torch.Tensor) -> torch.Tensor:
            return _margin(network(samples))

        self._graphed = Graphed(margin, self._device)
        # One that is compiled launches its kernels in its own way.
        half: Callable[[torch.Tensor], torch.Tensor] = margin if spec.compile_mode else self._graphed
        self._gate = Gate(lambda samples: (half(samples),), None if policy.compute == "fp32" else self._load_exact)

    def __reduce__(self) -> tuple[Callable[..., Inference], tuple[object, ...]]:
        return Inference, (self._spec, self._policy, str(self._device))

    @property
    def problem(self) -> str | None:
        """Why batches are not replayed from CUDA graphs, where they could have been."""
        return self._graphed.problem

    @torch.inference_mode()
    def __call__(self, samples: torch.Tensor) -> Computed:
        started = time.perf_counter()
        masks = outputs = None
        with self._graphed.stream():
            try:
                checked: Checked = self._gate(self._ring.upload(samples))
            except (RuntimeError, TypeError, ValueError, AssertionError, IndexError) as error:
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise InputError(
                    f"model: {self._spec.model}: cannot compute samples {list(samples.shape)}: {reason}"
                ) from error
            (values,) = checked.outputs
            if values.shape[:1] != samples.shape[:1] or (is_margin(values) and values.shape[2:] != samples.shape[2:]):
                raise InputError(
                    f"model: {self._spec.model}: made {list(values.shape)} of samples {list(samples.shape)}; expected "
                    "as many, and of two classes a mask of their height and width"
                )
            if is_margin(values):
                masks = self._ring.fetch((values[:, 0] > 0).to(torch.uint8)).numpy().view(np.bool_)
            else:
                outputs = self._ring.fetch(values.float()).numpy()
        refused = {sample: f"outputs {why}" for sample, why in checked.refused.items()}
        return Computed(masks, outputs, refused, checked.retried, time.perf_counter() - started)

    def _network(self, policy: PrecisionPolicy) -> nn.Module:
        network = prepare(load_network(self._spec).to(self._device), policy)
        mode = self._spec.compile_mode
        return torch.compile(network, mode=mode) if mode else network  # type: ignore[return-value]

    def _load_exact(self) -> Callable[[torch.Tensor], Sequence[torch.Tensor]]:
        network = self._network(PrecisionPolicy())
        return lambda samples: (_margin(network(samples)),)


def lane_trial(spec: ModelSpec, shape: tuple[int, ...], device: torch.device) -> Trial:
    """Of what a lane does with samples of this shape."""

    def make(policy: PrecisionPolicy) -> Callable[[], object]:
        inference = Inference(spec, policy, str(device), copies=1)
        samples = torch.zeros(shape, dtype=sample_type(policy))
        return lambda: inference(samples)

    return Trial(make, device, lane=True)


def is_margin(values: torch.Tensor) -> bool:
    """Whether an output tells two classes apart: [B, 1, H, W]."""
    return values.dim() == 4 and values.shape[1] == 1


def _margin(values: Any) -> torch.Tensor:
    """Of a network's output the first tensor; of two classes [B, 2, H, W] by how much the second is ahead."""
    while isinstance(values, (tuple, list, dict)):
        values = next(iter(values.values() if isinstance(values, dict) else values))
    if not isinstance(values, torch.Tensor):
        raise InputError(f"model: returned {type(values).__name__}; expected a tensor")
    return values[:, 1:] - values[:, :1] if values.dim() == 4 and values.shape[1] == 2 else values


def sample_type(policy: PrecisionPolicy) -> torch.dtype:
    """The type in which samples travel: that of the weights, and of the arithmetic where that is narrower."""
    return torch_dtype(policy.compute if policy.is_mixed else policy.params)
