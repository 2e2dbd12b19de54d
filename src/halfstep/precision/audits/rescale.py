"""Streams that a half type cannot hold, made smaller by powers of two without changing what fp32 computes.

A residual stream is read by norms, which do not see its scale, and by linear layers. Divide what is added to it by a
power of two: weights and biases of the layers that make it, biases of linear layers that carry it on, the square of it
for a norm's eps. Powers of two only move exponents, so that fp32 gives the same bits.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from halfstep.errors import InputError
from halfstep.precision.arithmetic import Target, moves_values
from halfstep.precision.audits.calls import Call
from halfstep.precision.audits.trace import largest_of
from halfstep.precision.cast import map_tensors, tensors_of
from halfstep.precision.policy import torch_dtype
from halfstep.precision.watch import Place

_LINEAR = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
# f(s x) = s f(x) for s > 0; with several operands all have to have the same scale.
_HOMOGENEOUS = frozenset({
    "add", "sub", "neg", "abs", "relu", "leaky_relu", "mean", "sum", "avg_pool2d", "max_pool2d_with_indices",
    "upsample_nearest2d", "upsample_bilinear2d", "constant_pad_nd", "native_dropout", "clone", "_to_copy", "copy",
})  # fmt: skip
_SPARE = 8.0  # how far below the type's limit a stream is brought


@dataclass(frozen=True)
class Rescaling:
    """Exponents of two. weights and biases: by which a layer's are multiplied. eps: by which a norm's is."""

    weights: Mapping[str, int] = field(default_factory=dict)
    biases: Mapping[str, int] = field(default_factory=dict)
    eps: Mapping[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.weights or self.biases or self.eps)

    def inverse(self) -> Rescaling:
        """What undoes it."""
        return Rescaling(*({name: -e for name, e in part.items()} for part in (self.weights, self.biases, self.eps)))


def rescale(module: nn.Module, rescaling: Rescaling) -> None:
    """Apply a rescaling in place. Raises InputError when a name is no layer of the module."""
    named = dict(module.named_modules())
    parts = [("weight", rescaling.weights), ("bias", rescaling.biases), ("eps", rescaling.eps)]
    for attribute, exponents in parts:
        for name in exponents:
            if getattr(named.get(name), attribute, None) is None:
                raise InputError(f"rescale: {name!r} has no {attribute}; expected a module like the audited one")
    with torch.no_grad():
        for attribute, exponents in parts:
            for name, exponent in exponents.items():
                value = getattr(named[name], attribute)
                if attribute == "eps":
                    named[name].eps = math.ldexp(value, exponent)
                else:
                    value.mul_(2.0**exponent)


@contextmanager
def rescaled(module: nn.Module, rescaling: Rescaling) -> Iterator[None]:
    """Rescaled within the block; the same bits as before behind it."""
    kept = [(parameter, parameter.detach().clone()) for parameter in module.parameters()]
    rescale(module, rescaling)
    try:
        yield
    finally:
        rescale(module, rescaling.inverse())
        with torch.no_grad():
            for parameter, value in kept:
                parameter.copy_(value)


def find_rescaling(module: nn.Module, calls: Sequence[Call], target: Target, place: Place) -> tuple[Rescaling, str]:
    """The rescaling that brings all streams within the target's type, which may be none, and why a stream that is
    beyond it was left. fp32 is bit for bit the same with it on `calls`."""
    streams = _Streams(module, place)
    for call in calls:
        streams.follow(call)
    found = streams.rescaling(torch.finfo(torch_dtype(target.type)).max)
    if not found:
        return found, streams.why
    with torch.no_grad():
        before = [tensors_of(call.on(module)) for call in calls]
        with rescaled(module, found):
            after = [tensors_of(call.on(module)) for call in calls]
    pairs = [pair for outputs in zip(after, before, strict=True) for pair in zip(*outputs, strict=True)]
    if not all(torch.equal(ours, theirs) for ours, theirs in pairs):
        return Rescaling(), "with the streams rescaled fp32 would not give the same bits"
    return found, streams.why


class _Streams(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Which tensors must have the same scale. Every tensor has a number; sets of numbers are joined."""

    def __init__(self, module: nn.Module, place: Place) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.why = ""
        self._module, self._place = module, place
        self._modules = dict(module.named_modules())
        self._joined: list[int] = [0]  # number 0: what cannot be rescaled
        self._largest: dict[int, float] = defaultdict(float)
        self._linear: dict[str, tuple[int, int]] = {}
        self._norms: dict[str, int] = {}
        self._entered: list[int] = []

    def follow(self, call: Call) -> None:
        args, kwargs = map_tensors(torch.clone, call.args), map_tensors(torch.clone, dict(call.kwargs))
        for tensor in (*tensors_of((args, kwargs)), *self._module.parameters(), *self._module.buffers()):
            self._pin(tensor)
        with torch.no_grad(), self._place.watched(self._enters, self._leaves), self:
            output = self._module(*args, **kwargs)
        for tensor in tensors_of(output):
            self._pin(tensor)
        for tensor in (*self._module.parameters(), *self._module.buffers()):
            del tensor._halfstep_number  # type: ignore[attr-defined]

    def rescaling(self, limit: float) -> Rescaling:
        largest: dict[int, float] = defaultdict(float)
        for number, value in self._largest.items():
            root = self._root(number)
            largest[root] = max(largest[root], value)
        exponents = {
            root: -math.ceil(math.log2(value * _SPARE / limit))
            for root, value in largest.items()
            if limit / 2 < value < float("inf")
        }
        if self._root(0) in exponents:
            self.why = "values beyond the type pass through operations that see their scale"
            del exponents[self._root(0)]
        of = {number: exponents.get(self._root(number), 0) for number in range(len(self._joined))}
        weights = {name: of[out] - of[given] for name, (given, out) in self._linear.items()}
        biases = {
            name: of[out]
            for name, (_, out) in self._linear.items()
            if getattr(self._modules[name], "bias", None) is not None
        }
        eps = {name: 2 * of[given] for name, given in self._norms.items()}
        return Rescaling(*({name: e for name, e in part.items() if e} for part in (weights, biases, eps)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._known_leaf() is not None:
            return result  # joined as a whole when it is left
        given = [t for t in tensors_of((args, kwargs or {})) if t.is_floating_point()]
        made = [t for t in tensors_of(result) if t.is_floating_point()]
        name = func.overloadpacket.__name__.removesuffix("_")
        scalars = [value for value in (*args, *(kwargs or {}).values()) if isinstance(value, (int, float))]
        if func.is_view or moves_values(func) or name in _HOMOGENEOUS:
            if name in ("add", "sub") and len(given) < 2:
                self._pin(*given, *made)  # x + 1 sees the scale
            else:
                self._join(*given, *made)
        elif name in ("mul", "div") and len(given) == 1 and len(scalars) == 1:
            self._join(*given, *made)
        elif made:
            self._pin(*given, *made)
        return result

    def _known_leaf(self) -> str | None:
        leaf = self._place.leaf
        return leaf if leaf is not None and isinstance(self._modules[leaf], (*_LINEAR, *_NORMS)) else None

    def _enters(self, name: str, args: Any) -> None:
        if name == self._known_leaf():
            self._entered = [self._number(t) for t in tensors_of(args)]
            self._rounds(tensors_of(args))

    def _leaves(self, name: str, result: Any) -> None:
        if name != self._known_leaf():
            return
        (given, *more), made = self._entered, tensors_of(result)
        if more or len(made) != 1:
            self._unite(0, given, *more, *(self._number(t) for t in made))
            return
        self._rounds(made)
        if isinstance(self._modules[name], _NORMS):
            self._pin(*made)
            if self._modules[name].eps is None:  # the type's own, which nothing can rescale
                self._unite(0, given)
                return
            if name in self._norms:
                self._unite(self._norms[name], given)
            self._norms[name] = given
            return
        out = self._number(made[0])
        if name in self._linear:  # called again: with the same scales
            self._unite(self._linear[name][0], given)
            self._unite(self._linear[name][1], out)
        self._linear[name] = given, out

    def _join(self, *tensors: torch.Tensor) -> None:
        if not tensors:
            return
        self._unite(*(self._number(tensor) for tensor in tensors))
        self._rounds(tensors)

    def _pin(self, *tensors: torch.Tensor) -> None:
        self._unite(0, *(self._number(tensor) for tensor in tensors))
        self._rounds(tensors)

    def _rounds(self, tensors: Sequence[torch.Tensor]) -> None:
        """Note how large they are; weights do not count, which are not in the stream."""
        for tensor in tensors:
            if tensor.dtype is torch.float32 and not isinstance(tensor, nn.Parameter):
                number = self._number(tensor)
                self._largest[number] = max(self._largest[number], largest_of(tensor))

    def _number(self, tensor: torch.Tensor) -> int:
        number: int | None = getattr(tensor, "_halfstep_number", None)
        if number is None:
            number = len(self._joined)
            self._joined.append(number)
            tensor._halfstep_number = number  # type: ignore[attr-defined]
        return number

    def _root(self, number: int) -> int:
        while self._joined[number] != number:
            self._joined[number] = self._joined[self._joined[number]]
            number = self._joined[number]
        return number

    def _unite(self, first: int, *others: int) -> None:
        for other in others:
            self._joined[self._root(other)] = self._root(first)
