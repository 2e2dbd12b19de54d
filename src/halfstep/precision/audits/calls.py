"""What a module is audited on: calls, their outputs, and how far outputs are apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from halfstep.errors import InputError
from halfstep.precision.cast import HALF_TYPES, map_tensors, tensors_of


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a module."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def on(self, function: Any) -> Any:
        """Call it with copies, which it may write to."""
        return function(*map_tensors(torch.clone, self.args), **map_tensors(torch.clone, dict(self.kwargs)))

    def tensors(self) -> dict[str, torch.Tensor]:
        """By a name for messages."""
        named = {f"input {n}": value for n, value in enumerate(self.args)} | dict(self.kwargs)
        return {name: tensor for name, value in named.items() for tensor in tensors_of(value)}


def calls_of(inputs: Any) -> list[Call]:
    """One call's arguments (a tensor, a tuple, a dict of keywords), or a list of such."""
    if isinstance(inputs, list):
        return [call for item in inputs for call in calls_of(item)]
    if isinstance(inputs, Call):
        return [inputs]
    if isinstance(inputs, Mapping):
        return [Call(kwargs=dict(inputs))]
    return [Call(inputs if isinstance(inputs, tuple) else (inputs,))]


def floats_of(output: Any) -> list[torch.Tensor]:
    """The floating-point tensors of an output, as fp32."""
    return [tensor.float() for tensor in tensors_of(output) if tensor.is_floating_point()]


def relative_error(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Of outputs against those of fp32: the norm of the difference over the norm, of the output where it is largest.
    Infinite where one is finite and the other is not."""
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        if ours.shape != theirs.shape:
            return float("inf")
        finite = theirs.isfinite()
        if not finite.all():
            if not torch.equal(ours[~finite].nan_to_num(nan=0.5), theirs[~finite].nan_to_num(nan=0.5)):
                return float("inf")
            ours, theirs = ours[finite], theirs[finite]
        if not ours.isfinite().all():
            return float("inf")
        scale, apart = float(theirs.double().norm()), float((ours.double() - theirs.double()).norm())
        if apart:
            worst = max(worst, apart / scale if scale else float("inf"))
    return worst


def require_sound(module: nn.Module, calls: Sequence[Call]) -> None:
    """Raise InputError for weights or inputs that are not finite, and inputs on another device than the weights."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point() and tensor.isnan().any():
            raise InputError(f"{name}: has NaN; expected finite weights")
        if isinstance(tensor, nn.Parameter) and not tensor.isfinite().all():
            raise InputError(f"{name}: is not finite; expected finite weights")
    device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), None)
    if not calls:
        raise InputError("audit: got no inputs; expected the arguments of at least one call")
    for call in calls:
        for name, tensor in call.tensors().items():
            if device is not None and tensor.device != device:
                raise InputError(f"{name}: is on {tensor.device}, the module on {device}; move one to the other")
            if not tensor.numel():
                raise InputError(f"{name}: is empty, {list(tensor.shape)}; expected values")
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise InputError(f"{name}: is not finite; expected finite inputs")
            if tensor.dtype in HALF_TYPES:
                raise InputError(f"{name}: is {str(tensor.dtype).removeprefix('torch.')}; expected fp32 inputs")
