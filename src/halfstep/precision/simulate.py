"""simulate(module, policy): what a module would compute under a policy on a device that is not here.

Its arithmetic is that of the device operation by operation, at the speed of fp32. It is a simulation until it was
verified there: what a program does only on that device (branches on `is_cuda`, other kernels) is not seen here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from halfstep.errors import InputError
from halfstep.precision.apply import original_class, prepare
from halfstep.precision.arithmetic import Arithmetic, HalfTensor, Observer, Simulated, Target
from halfstep.precision.cast import cast_to, map_tensors
from halfstep.precision.policy import PrecisionPolicy, torch_dtype
from halfstep.precision.watch import Place


@dataclass(frozen=True)
class SimulatedRun:
    """Calls the module as the target would compute it. Only within the block of `simulate`."""

    module: nn.Module
    policy: PrecisionPolicy
    target: Target
    arithmetic: Arithmetic

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What `prepare(module, policy)` returns; tensors of half types, where the policy's output is one, are real
        ones unless gradients are wanted."""
        try:
            result = self.module(*args, **kwargs)
        except RuntimeError as error:
            if not _reads_memory(error):
                raise
            result = self._with_opaque_modules(args, kwargs)
        return result if torch.is_grad_enabled() else map_tensors(_as_device_has_it, result)

    def _with_opaque_modules(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Again, with those modules in fp32 whose code reads memory, which is not that of a half type here."""
        place = Place(self.module)
        while True:
            try:
                with place.watched():
                    return self.module(*args, **kwargs)
            except RuntimeError as error:
                failed = place.of(error)
                label = f"module {failed or type(self.module).__name__}"
                if not _reads_memory(error) or label in self.arithmetic.opaque:
                    raise
                self.arithmetic.opaque.add(label)
                child = next(module for module, name in place.names.items() if name == failed)
                _make_opaque(child, self.policy, is_root=child is self.module)

    @property
    def opaque(self) -> tuple[str, ...]:
        """Operations of extensions and modules that read memory themselves, whose insides ran in fp32: what comes of
        them on the target cannot be known here."""
        return tuple(sorted(self.arithmetic.opaque))

    def gradients(self) -> dict[str, torch.Tensor]:
        """By the names of parameters, those of the calls so far as fp32 values. A mixed policy's are of fp32 weights,
        a true one's have been rounded as the weights were."""
        return {
            name: (parameter.grad.held if isinstance(parameter.grad, HalfTensor) else parameter.grad).clone()
            for name, parameter in self.module.named_parameters()
            if parameter.grad is not None
        }


def _reads_memory(error: RuntimeError) -> bool:
    return any(words in str(error) for words in ("not supported for tensor subclasses", "data is not allocated"))


def _make_opaque(module: nn.Module, policy: PrecisionPolicy, *, is_root: bool) -> None:
    """Let a prepared module compute with fp32 tensors that hold half values, and round what it returns."""
    for child in module.modules():
        child.__class__ = original_class(child)
        for name, parameter in child._parameters.items():
            if isinstance(parameter, HalfTensor):
                child._parameters[name] = nn.Parameter(parameter.held)
        for name, buffer in child._buffers.items():
            if isinstance(buffer, HalfTensor):
                child._buffers[name] = buffer.held
    forward, dtype = type(module).forward, torch_dtype(policy.params)
    output = cast_to(torch_dtype(policy.output)) if is_root else None

    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    def plain(tensor: torch.Tensor) -> torch.Tensor:
        half = rounded(tensor)
        return half.held if isinstance(half, HalfTensor) else half

    def opaque_forward(*args: Any, **kwargs: Any) -> Any:
        result = map_tensors(rounded, forward(module, *map_tensors(plain, args), **map_tensors(plain, kwargs)))
        return result if output is None else map_tensors(output, result)

    module.__dict__["forward"] = opaque_forward


def _as_device_has_it(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_half() if isinstance(tensor, HalfTensor) else tensor


@contextmanager
def simulate(
    module: nn.Module,
    policy: PrecisionPolicy | str,
    target: Target | str | None = None,
    *,
    observer: Observer | None = None,
) -> Iterator[SimulatedRun]:
    """Within the block the module computes as after `prepare(module, policy)` on a device whose half arithmetic is
    `target`'s, whatever this machine has; afterwards it is as it was. The run is called in the module's place:

        with simulate(module, "16-true") as run, torch.no_grad():
            output = run(inputs)

    Weights are rounded once. For gradients call `backward` within the block and read `run.gradients()`. Mixed policies
    use the autocast of the module's own device, whose lists of operations differ a little between CPU and CUDA. Without
    a target it is of the policy's type, with sums in fp32. `observer` sees every rounding. Raises InputError when the
    weights are not fp32, or the policy's type is another than the target's.
    """
    policy = PrecisionPolicy.parse(policy) if isinstance(policy, str) else policy
    target = Target.parse(target) if isinstance(target, str) else target
    if policy.is_auto:
        raise InputError("simulate: got policy auto, which is measured on a device; name one, such as 16-true")
    half = policy.compute if policy.compute in ("fp16", "bf16") else None
    target = target or Target(half or "fp16")
    if half not in (None, target.type):
        raise InputError(f"simulate: policy {policy} computes in {half}, the target in {target.type}; name one type")
    require_fp32(module)
    arithmetic = Arithmetic(target.accumulation, observer)
    with as_it_was(module), Simulated(arithmetic):
        with _new_parameters(module):
            prepare(module, policy, channels_last=False)
        yield SimulatedRun(module, policy, target, arithmetic)


def require_fp32(module: nn.Module) -> None:
    """Raise InputError unless all floating-point weights and buffers are fp32, and the module is not of TorchScript,
    whose classes cannot be others."""
    for name, child in module.named_modules():
        if isinstance(child, torch.jit.ScriptModule):
            raise InputError(f"{name or type(child).__name__}: is of TorchScript; expected the module it was made from")
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype is not torch.float32:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise InputError(f"{name}: is {kind}; expected fp32 weights, load the module in fp32 (or call .float())")


@contextmanager
def _new_parameters(module: nn.Module) -> Iterator[None]:
    """Within the block conversions make new parameters, because the module's own would lose their values. Behind it
    what was shared is shared again, and nothing is the module's own memory."""
    slots = [(child, name, p) for child in module.modules() for name, p in child._parameters.items() if p is not None]
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
    made: dict[tuple[int, torch.dtype], Any] = {}
    for child, name, own in slots:
        new: Any = child._parameters[name]
        if not isinstance(new, HalfTensor) and new.data_ptr() == own.data_ptr():
            new = nn.Parameter(own.detach().clone(), own.requires_grad)
        child._parameters[name] = made.setdefault((id(own), new.dtype), new)


@contextmanager
def as_it_was(module: nn.Module) -> Iterator[None]:
    """Puts back classes, weights, buffers, gradients and attributes of all submodules."""
    children = list(module.modules())
    tables = ("_parameters", "_buffers", "_modules")
    kept = [(c, c.__class__, dict(c.__dict__), {name: dict(getattr(c, name)) for name in tables}) for c in children]
    values = [(buffer, buffer.clone()) for child in children for buffer in child.buffers(recurse=False)]
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for child, cls, attributes, contents in kept:
            child.__class__ = cls
            child.__dict__.clear()
            child.__dict__.update(attributes)
            for name, content in contents.items():
                getattr(child, name).clear()
                getattr(child, name).update(content)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient
