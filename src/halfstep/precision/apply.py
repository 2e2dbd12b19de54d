"""prepare(module, policy): make a module run in the formats of a policy, and keep it that way."""

from __future__ import annotations

import difflib
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from halfstep.errors import InputError
from halfstep.precision.cast import TensorMap, cast_to, map_tensors
from halfstep.precision.choose import resolve
from halfstep.precision.policy import PrecisionPolicy, torch_dtype
from halfstep.precision.probe import probe, tf32

_KEPT = "keep_in_fp32"


def prepare(module: nn.Module, policy: PrecisionPolicy, *, channels_last: bool | None = None) -> nn.Module:
    """Apply `policy` to `module` in place and return it.

    *true* policies cast weights, buffers and, at each call, inputs; *mixed* policies keep fp32 weights and run the call
    under autocast. Modules that match `policy.islands`, or that `module.keep_in_fp32` names (submodules, parameters and
    buffers that must not be half in any policy), keep fp32 weights and run in fp32 also under autocast, and
    return `policy.params`; where there are islands, inputs of at most one dimension (timesteps, sigmas) reach them
    unrounded. Results are cast to `policy.output`. Modules with 2-D convolutions use channels_last where `probe`
    measured it faster on the module's device, or as `channels_last` says.

    The formats are pinned: `.to(device)` moves the module, `.to(dtype)`, `.half()` and the like leave its types alone.
    They survive `deepcopy`, `pickle`, `state_dict` (same names) and `torch.compile`. `auto` is resolved for inference
    on the module's device. Raises InputError when a pattern of `islands` matches no module.
    """
    for child in module.modules():  # what an earlier call made of it is undone
        child.__class__ = _ORIGINALS.get(type(child), type(child))
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    policy = resolve(policy, device, "sample")
    islands = list(
        {id(child): child for child in _find_islands(module, policy.islands) + _own_islands(module)}.values()
    )
    inside_islands = {id(child) for island in islands for child in island.modules()}
    kept = {id(getattr(module, name)) for name in getattr(module, _KEPT, ())}

    def cast(child: nn.Module) -> TensorMap:
        to_its_type = cast_to(torch.float32 if id(child) in inside_islands else torch_dtype(policy.params))
        return lambda tensor: tensor if id(tensor) in kept else to_its_type(tensor)

    for child in module.modules():
        child._apply(cast(child), recurse=False)  # type: ignore[no-untyped-call]
    convolutions = [child for child in module.modules() if isinstance(child, (nn.Conv2d, nn.ConvTranspose2d))]
    memory_format = torch.contiguous_format
    if convolutions and channels_last is None:
        channels_last = probe(device).types[policy.compute].prefers_channels_last
    if convolutions and channels_last:
        memory_format = torch.channels_last
        for convolution in convolutions:
            convolution.to(memory_format=memory_format)  # type: ignore[call-overload]
    for island in islands:
        island.__class__ = _pinned_class(type(island), _Island)
        island._halfstep_policy = policy  # type: ignore[assignment]
    module.__class__ = _pinned_class(type(module), _Prepared)
    module._halfstep_policy = policy  # type: ignore[assignment]
    module._halfstep_exact_scalars = bool(islands)  # type: ignore[assignment]
    module._halfstep_memory_format = memory_format  # type: ignore[assignment]
    return module


def change_compute(module: nn.Module, policy: PrecisionPolicy) -> None:
    """Let a prepared module go on in another type of arithmetic; its weights stay as they are, so also in the hands of
    an optimizer or a distributed wrapper. Raises InputError when they would have to change."""
    pinned = [child for child in module.modules() if isinstance(child, _Pinned)]
    for child in pinned:
        if child._halfstep_policy.params != policy.params:
            raise InputError(f"precision: weights are {child._halfstep_policy.params}; {policy} needs {policy.params}")
        child._halfstep_policy = policy


def _find_islands(module: nn.Module, patterns: tuple[str, ...]) -> list[nn.Module]:
    named = dict(module.named_modules())
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in named if name):
            near = difflib.get_close_matches(pattern, named, n=3, cutoff=0.3)
            hint = f"; near it are {', '.join(near)}" if near else ""
            raise InputError(f"precision.islands: {pattern!r} matches no module of {type(module).__name__}{hint}")
    return [child for name, child in named.items() if name and any(fnmatchcase(name, p) for p in patterns)]


def _own_islands(module: nn.Module) -> list[nn.Module]:
    """The modules that a network itself wants kept."""
    named = [getattr(module, name) for name in getattr(module, _KEPT, ())]
    return [child for child in named if isinstance(child, nn.Module)]


class _Pinned(nn.Module):
    """A module whose floating-point types do not follow `.to(dtype)`."""

    _halfstep_policy: PrecisionPolicy

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        original = _ORIGINALS[type(self)]
        behavior = _Prepared if isinstance(self, _Prepared) else _Island
        return _new_pinned, (original, behavior), self.__dict__

    def _apply(self, fn: TensorMap, recurse: bool = True) -> nn.Module:
        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse=recurse)  # type: ignore[no-untyped-call,no-any-return]


class _Prepared(_Pinned):
    _halfstep_exact_scalars: bool
    _halfstep_memory_format: torch.memory_format

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        policy, memory_format = self._halfstep_policy, self._halfstep_memory_format
        dtype, output_dtype = torch_dtype(policy.params), torch_dtype(policy.output)

        def enter(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.is_floating_point() or (self._halfstep_exact_scalars and tensor.dim() <= 1):
                return tensor
            if tensor.dim() == 4 and memory_format is torch.channels_last:
                return tensor.to(dtype, memory_format=torch.channels_last)
            return tensor.to(dtype)

        args, kwargs = map_tensors(enter, args), map_tensors(enter, kwargs)
        device_type = _device_type(self, args, kwargs)
        if policy.is_mixed:
            # The cache keeps a half copy of every weight beside the fp32 one for the length of the call. Training needs
            # those copies for the backward pass anyway; inference would only pay for them.
            half = torch_dtype(policy.compute)
            with torch.autocast(device_type, half, cache_enabled=torch.is_grad_enabled()):
                result = super().forward(*args, **kwargs)
        elif device_type == "cuda" and policy.params == "fp32":
            with tf32(policy.compute == "tf32"):
                result = super().forward(*args, **kwargs)
        else:
            result = super().forward(*args, **kwargs)
        return map_tensors(cast_to(output_dtype), result)


class _Island(_Pinned):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = (map_tensors(cast_to(torch.float32), values) for values in (args, kwargs))
        with torch.autocast(_device_type(self, args, kwargs), enabled=False):
            result = super().forward(*args, **kwargs)
        return map_tensors(cast_to(torch_dtype(self._halfstep_policy.params)), result)


def _device_type(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    for tensor in (*module.parameters(), *args, *kwargs.values()):
        if isinstance(tensor, torch.Tensor):
            return tensor.device.type
    return "cpu"


def _new_pinned(original: type[nn.Module], behavior: type[_Pinned]) -> nn.Module:
    cls = _pinned_class(original, behavior)
    return cls.__new__(cls)


def _pinned_class(original: type[nn.Module], behavior: type[_Pinned]) -> type[nn.Module]:
    """`original` with `behavior` in front. A subclass instead of a wrapper keeps parameter names, and instead of hooks
    is safe when several threads call the module at once."""
    known = _GENERATED.get((original, behavior))
    if known is not None:
        return known
    generated = type(original.__name__, (behavior, original), {"__module__": original.__module__})
    _GENERATED[original, behavior] = generated
    _ORIGINALS[generated] = original
    return generated


_GENERATED: dict[tuple[type[nn.Module], type[_Pinned]], type[nn.Module]] = {}
_ORIGINALS: dict[type, type[nn.Module]] = {}
