"""How much each operation's rounding adds to the error of the output, to first order.

A rounding changes an operation's result by e. With J the derivative of the output by that result, the output changes by
J e, whose squared norm is the mean of (v . J e)^2 over random v of unit variance (Hutchinson 1990, doi:10.1080/
03610919008812866). One pass in fp32 and one backward pass for each of a few v give it for all operations at once;
roundings are independent, so contributions add in squares.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from halfstep.precision.arithmetic import Target, moves_values
from halfstep.precision.audits.calls import Call
from halfstep.precision.audits.trace import follows_operands, largest_of, local_error, name_of, returns_statistics
from halfstep.precision.cast import map_tensors, tensors_of
from halfstep.precision.policy import torch_dtype
from halfstep.precision.watch import Place, source_line

PROBES = 8


@dataclass(frozen=True)
class Range:
    """Of an operation in fp32. largest: absolute value of its result. typical: root of the mean square. born: relative
    error of rounding the result to the half type. reaches: what of it reaches the output, relative to its norm; None
    where no gradient tells."""

    module: str
    operation: str
    line: str
    largest: float
    typical: float
    born: float
    reaches: float | None


@dataclass(frozen=True)
class Contributions:
    """ranges: of every operation in the order of the pass. units: by the module that would have to be fp32, and hand on
    fp32, the squared relative error that comes of its roundings."""

    ranges: tuple[Range, ...]
    units: dict[str, float]


def contributions(
    module: nn.Module, call: Call, target: Target, place: Place, *, probes: int = PROBES
) -> Contributions:
    """Of `call` in the module's own fp32. Without `probes` only the ranges are found."""
    taps = _Taps(place, torch_dtype(target.type))
    leaves: list[torch.Tensor] = []
    passed: list[torch.Tensor] = []

    def enter(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor.clone()
        leaves.append(tensor.detach().clone().requires_grad_())
        passed.append(leaves[-1].clone())  # what the module may write to
        return passed[-1]

    parameters = [p for p in module.parameters() if p.is_floating_point()]
    kept = [(parameter, parameter.requires_grad) for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_()
        with torch.enable_grad():
            args, kwargs = map_tensors(enter, call.args), map_tensors(enter, dict(call.kwargs))
            taps.inputs = {id(tensor): "" for tensor in passed}
            with place.watched(), taps:
                output = module(*args, **kwargs)
        outputs = [t for t in tensors_of(output) if t.is_floating_point() and t.requires_grad]
        if outputs:
            owners = {id(p): name for child, name in place.names.items() for p in child.parameters(recurse=False)}
            owned = [(p, owners[id(p)]) for p in parameters]
            entered = [(leaf, taps.inputs[id(tensor)]) for leaf, tensor in zip(leaves, passed, strict=True)]
            taps.probe(outputs, [*owned, *entered])
    finally:
        for parameter, wanted in kept:
            parameter.requires_grad_(wanted)
    return taps.result()


class _Taps(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the rounding error of every result and hooks its gradient when the result is used."""

    def __init__(self, place: Place, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._place, self._dtype = place, dtype
        self._seen: list[tuple[str, str, str, float, float, float, str | None]] = []
        self._errors: list[torch.Tensor | None] = []
        self._reached: dict[int, float] = defaultdict(float)
        self._owners: dict[str, float] = defaultdict(float)
        self.inputs: dict[int, str] = {}
        self._order = 0
        self._probed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        sources = tensors_of((args, kwargs or {}))
        for tensor in sources:
            self._tap(tensor)
            if self.inputs.get(id(tensor)) == "":  # an input's rounding belongs to whatever uses it first
                self.inputs[id(tensor)] = self._place.module
        result = func(*args, **(kwargs or {}))
        leaf = self._place.leaf
        if leaf is not None:
            self._order += 1
            maker: tuple[int, str] | None = (self._order, leaf)
        else:
            maker = max((m for t in sources if (m := getattr(t, "_halfstep_maker", None)) is not None), default=None)
        name = name_of(func)
        for number, tensor in enumerate(tensors_of(result)):
            if tensor.dtype is not torch.float32 or (number and returns_statistics(name)):
                continue
            tensor._halfstep_maker = maker  # type: ignore[attr-defined]
            if not moves_values(func):
                self._look(name, tensor, maker)
        return result

    def probe(self, outputs: Sequence[torch.Tensor], owned: Sequence[tuple[torch.Tensor, str]]) -> None:
        """Backward passes from random combinations of the outputs. `owned`: weights and inputs, each with the module
        that its rounding belongs to."""
        generator = torch.Generator(outputs[0].device).manual_seed(0)
        scale = sum(float(tensor.detach().double().square().sum()) for tensor in outputs) ** 0.5
        if not 0 < scale < float("inf"):
            return
        for tensor in outputs:
            self._tap(tensor)
        self._probed = True
        wanted = [tensor for tensor, _ in owned]
        for _ in range(PROBES):
            directions = [torch.randn(t.shape, generator=generator, device=t.device) / scale for t in outputs]
            gradients = torch.autograd.grad(outputs, wanted, directions, retain_graph=True, allow_unused=True)
            for (tensor, owner), gradient in zip(owned, gradients, strict=True):
                if gradient is not None:
                    self._owners[owner] += self._share(gradient, self._rounding(tensor.detach()))

    def result(self) -> Contributions:
        units: dict[str, float] = defaultdict(float, self._owners)
        ranges = []
        for index, (module, operation, line, largest, typical, born, unit) in enumerate(self._seen):
            reached = self._reached[index]
            ranges.append(
                Range(module, operation, line, largest, typical, born, reached**0.5 if self._probed else None)
            )
            if unit is not None:
                units[unit] += reached
        return Contributions(tuple(ranges), dict(units))

    def _look(self, name: str, tensor: torch.Tensor, maker: tuple[int, str] | None) -> None:
        module = self._place.module
        unit: str | None = module
        if self._place.leaf is None and follows_operands(name):
            unit = maker[1] if maker else module
        exact = tensor.detach()
        held = exact.to(self._dtype).to(torch.float32)
        sample = exact.reshape(-1)[:: max(1, exact.numel() // 4096)]
        typical = float(sample.square().mean().sqrt()) if sample.numel() else 0.0
        largest = largest_of(exact)
        born = local_error(exact, held) if largest <= torch.finfo(self._dtype).max else float("inf")
        tensor._halfstep_tap = len(self._seen)  # type: ignore[attr-defined]
        self._seen.append((module, name, source_line(), largest, typical, born, unit))
        self._errors.append((held - exact).to(torch.bfloat16) if born < float("inf") else None)

    def _tap(self, tensor: torch.Tensor) -> None:
        index = getattr(tensor, "_halfstep_tap", None)
        if index is None or not tensor.requires_grad:
            return
        del tensor._halfstep_tap  # type: ignore[attr-defined]
        if self._errors[index] is not None:
            tensor.register_hook(partial(self._arrives, index))  # type: ignore[no-untyped-call]

    def _arrives(self, index: int, gradient: torch.Tensor | None) -> None:
        error = self._errors[index]
        if error is not None and gradient is not None:
            self._reached[index] += self._share(gradient, error)

    def _share(self, gradient: torch.Tensor, error: torch.Tensor) -> float:
        along = float((gradient * error.reshape(gradient.shape)).sum())
        return along**2 / PROBES if abs(along) < float("inf") else 0.0

    def _rounding(self, exact: torch.Tensor) -> torch.Tensor:
        error = exact.to(self._dtype).to(torch.float32) - exact
        return torch.where(error.isfinite(), error, 0.0)
