"""Gradients against the range of fp16: what a loss scale saves, and the scale to start from.

In fp16 training all numbers of the backward pass are fp16: too small a gradient is lost, too large a one overflows. The
loss is multiplied by a scale before the pass and gradients are divided after it (Micikevicius et al. 2018, "Mixed
Precision Training", section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from halfstep.errors import InputError
from halfstep.precision.arithmetic import moves_values
from halfstep.precision.audits.calls import calls_of
from halfstep.precision.cast import tensors_of
from halfstep.precision.policy import torch_dtype
from halfstep.precision.simulate import as_it_was, require_fp32

_LOWEST, _HIGHEST = -150, 129  # exponents of fp32
_SPARE_BITS = 3  # between the largest gradient and the limit: losses begin high, and grow at times


@dataclass(frozen=True)
class GradientReport:
    """scale: a power of two to start from, so that the largest gradient has three bits to spare; with bf16 it is 1.
    largest: absolute gradient of the pass without a scale. lost: by scale, the share of nonzero numbers of the backward
    pass that become zero, and overflows: those scales at which some become infinite. parameters: the largest absolute
    gradient of each, None without one."""

    scale: float
    largest: float
    lost: dict[float, float]
    overflows: tuple[float, ...]
    parameters: dict[str, float | None]


def audit_gradients(
    module: nn.Module, inputs: Any, loss: Callable[[Any], torch.Tensor] | None = None, *, type: str = "fp16"
) -> GradientReport:
    """One backward pass in fp32 over a call's arguments (or a list of such), all of whose numbers are counted.

    loss: of the module's output; the mean of its squares where there is none. Gradients that the parameters have are
    left as they are. Raises InputError when the loss is no finite scalar, or the weights are not fp32.
    """
    require_fp32(module)
    info = torch.finfo(torch_dtype(type))
    counts = _Exponents()
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not parameters:
        raise InputError("audit: no parameter requires a gradient; there is nothing to train")
    largest: dict[str, float | None] = dict.fromkeys(parameters)
    for call in calls_of(inputs):
        with as_it_was(module), counts, torch.enable_grad():
            output = call.on(module)
        for tensor in tensors_of(output):
            counts.tap(tensor)
        value = loss(output) if loss is not None else mean_square(output)
        if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.isfinite():
            raise InputError(f"audit: the loss is {value!r}; expected a finite scalar")
        if not value.requires_grad:
            raise InputError("audit: no gradient leads from the loss to the parameters (torch.no_grad in the module?)")
        found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                counts.add(gradient)
                largest[name] = max(largest[name] or 0.0, float(gradient.abs().max()))
    top = counts.highest
    if top is None:
        raise InputError("audit: all gradients are zero; there is nothing to scale")
    # The largest number is below 2^top.
    start = max(0, _exponent(info.max) - top - _SPARE_BITS) if type == "fp16" else 0
    scales = [2.0**k for k in range(0, max(18, start + 3), 2)]
    smallest = _exponent(info.smallest_normal * info.eps)
    return GradientReport(
        scale=2.0**start,
        largest=counts.largest,
        lost={scale: counts.share_below(smallest - 1, scale) for scale in scales},
        overflows=tuple(scale for scale in scales if counts.largest * scale > info.max),
        parameters=largest,
    )


def _exponent(value: float) -> int:
    """The e for which the value is below 2^e and not below 2^(e-1)."""
    return math.frexp(value)[1]


def mean_square(outputs: Any) -> torch.Tensor:
    """Of the numbers among the outputs that have a gradient, each tensor's added up: what stands for a loss, fp32.
    Raises InputError when there are none."""
    tensors = [tensor for tensor in tensors_of(outputs) if tensor.requires_grad]
    if not tensors:
        raise InputError("model: none of its outputs has a gradient; it cannot be trained")
    return torch.stack([tensor.float().square().mean() for tensor in tensors]).sum()


class _Exponents(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the exponents of the gradients of all that is computed within: x is below 2^e and not below 2^(e-1)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counts = torch.zeros(_HIGHEST - _LOWEST + 1, dtype=torch.int64)
        self.largest = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tensors_of((args, kwargs or {})):
            self.tap(tensor)
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_of(result):
            if tensor.dtype is torch.float32 and not moves_values(func):
                tensor._halfstep_counted = False  # type: ignore[attr-defined]
        return result

    def tap(self, tensor: torch.Tensor) -> None:
        """Count the gradient of a result; when it is used the graph knows it."""
        if tensor.requires_grad and getattr(tensor, "_halfstep_counted", True) is False:
            tensor._halfstep_counted = True  # type: ignore[attr-defined]
            tensor.register_hook(self.add)  # type: ignore[no-untyped-call]

    def add(self, gradient: torch.Tensor | None) -> None:
        if gradient is None or not gradient.numel():
            return
        values = gradient.detach().abs()
        exponents = torch.frexp(values[values > 0]).exponent.long().clamp(_LOWEST, _HIGHEST) - _LOWEST
        self._counts += torch.bincount(exponents.cpu(), minlength=len(self._counts))
        self.largest = max(self.largest, float(values.max()))

    @property
    def highest(self) -> int | None:
        found = self._counts.nonzero()
        return int(found[-1]) + _LOWEST if len(found) else None

    def share_below(self, exponent: int, scale: float) -> float:
        """Of all numbers those that, multiplied by a power of two, are below 2^exponent."""
        at = exponent - _exponent(scale) + 1 - _LOWEST
        total = int(self._counts.sum())
        return int(self._counts[: max(0, at + 1)].sum()) / total if total else 0.0
