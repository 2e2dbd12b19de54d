"""prepare(module, policy): make a module run in the formats of a policy, and keep it that way."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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
    under autocast. Islands keep fp32 weights and run in fp32 also under autocast: modules that match `policy.islands`,
    and those that a network itself names. They return `policy.params`, or fp32 where the pattern ends with `+`; then
    modules that need inputs of the type of their weights cast what they receive. Where there are islands, or the module
    says `exact_scalars`, inputs of at most one dimension (timesteps, sigmas) come in unrounded. Results are cast to
    `policy.output`. Modules with 2-D convolutions use channels_last where `probe` measured it faster on the module's
    device, or as `channels_last` says.

    A network names what it wants kept in `keep_in_fp32` (submodules, parameters and buffers, in every policy), or as
    transformers and diffusers do in `_keep_in_fp32_modules` (in fp16; diffusers in bf16 too) and
    `_keep_in_fp32_modules_strict`. Those modules hand on fp32, as they do there.

    The formats are pinned: `.to(device)` moves the module, `.to(dtype)`, `.half()` and the like leave its types alone.
    They survive `deepcopy`, `pickle`, `state_dict` (same names) and `torch.compile`. `auto` is resolved for inference
    on the module's device. Weights that an island shares with modules that are half are its own afterwards. Raises
    InputError when a pattern of `islands` matches no module.
    """
    for child in module.modules():  # what an earlier call made of it is undone
        child.__class__ = original_class(child)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    policy = resolve(policy, device, "sample")
    islands, kept = _find_kept(module, policy)
    inside_islands = {child for island in islands for child in island.modules()}
    nested = {child for island in islands for child in island.modules() if child is not island}
    hands_on = {island: wide or island in nested for island, wide in islands.items()}

    if policy.params != "fp32":
        _untie(module, inside_islands)

    def cast(child: nn.Module) -> TensorMap:
        to_its_type = cast_to(torch.float32 if child in inside_islands else torch_dtype(policy.params))
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
    if any(hands_on.values()) and policy.params != "fp32":
        for child in module.modules():
            if child is not module and child not in inside_islands and _needs_its_type(child):
                _pin(child, _Caster, policy)
    for island, wide in hands_on.items():
        _pin(island, _Island, policy)
        island._halfstep_hands_on_fp32 = wide  # type: ignore[assignment]
    _pin(module, _Prepared, policy)
    exact_scalars = bool(islands) or getattr(module, "exact_scalars", False)
    module._halfstep_exact_scalars = exact_scalars  # type: ignore[assignment]
    module._halfstep_plain_attention = policy.compute in ("fp16", "bf16") and any(  # type: ignore[assignment]
        isinstance(child, nn.MultiheadAttention) for child in module.modules()
    )
    module._halfstep_memory_format = memory_format  # type: ignore[assignment]
    return module


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before it was prepared."""
    return _ORIGINALS.get(type(module), type(module))


def change_compute(module: nn.Module, policy: PrecisionPolicy) -> None:
    """Let a prepared module go on in another type of arithmetic; its weights stay as they are, so also in the hands of
    an optimizer or a distributed wrapper. Raises InputError when they would have to change."""
    pinned = [child for child in module.modules() if isinstance(child, _Pinned)]
    for child in pinned:
        if child._halfstep_policy.params != policy.params:
            raise InputError(f"precision: weights are {child._halfstep_policy.params}; {policy} needs {policy.params}")
        child._halfstep_policy = policy


def _find_kept(module: nn.Module, policy: PrecisionPolicy) -> tuple[dict[nn.Module, bool], set[int]]:
    """The islands, each with whether it hands on fp32, and the ids of single tensors that stay fp32."""
    islands: dict[nn.Module, bool] = {}
    kept: set[int] = set()
    for child in module.modules():
        for name in getattr(child, "keep_in_fp32", ()):
            part = getattr(child, name)
            if isinstance(part, nn.Module):
                islands[part] = False
            else:
                kept.add(id(part))
        if patterns := _kept_by_library(child, policy):
            for name, part in child.named_modules():
                if part is not child and _has_part(name, patterns):
                    islands[part] = True
            for name, tensor in (*child.named_parameters(), *child.named_buffers()):
                if _has_part(name, patterns):
                    kept.add(id(tensor))
    for island, wide in _named_islands(module, policy.islands).items():
        islands[island] = wide or islands.get(island, False)
    return islands, kept


def _kept_by_library(module: nn.Module, policy: PrecisionPolicy) -> tuple[str, ...]:
    """What a network of transformers or diffusers wants kept: parts of dotted names."""
    names = [*(getattr(module, "_keep_in_fp32_modules_strict", None) or ())]
    if policy.compute == "fp16" or not hasattr(module, "_keep_in_fp32_modules_strict"):
        names += getattr(module, "_keep_in_fp32_modules", None) or ()
    return tuple(names) if policy.compute in ("fp16", "bf16") else ()


def _has_part(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(f".{name}.", f"*.{pattern}.*") for pattern in patterns)


def _named_islands(module: nn.Module, patterns: tuple[str, ...]) -> dict[nn.Module, bool]:
    named = {name: child for name, child in module.named_modules(remove_duplicate=False) if name}
    found: dict[nn.Module, bool] = {}
    for pattern in patterns:
        names = [name for name in named if fnmatchcase(name, pattern.removesuffix("+"))]
        if not names:
            near = difflib.get_close_matches(pattern, named, n=3, cutoff=0.3)
            hint = f"; near it are {', '.join(near)}" if near else ""
            raise InputError(f"precision.islands: {pattern!r} matches no module of {type(module).__name__}{hint}")
        for child in (part for name in names for part in _called(named[name])):
            found[child] = pattern.endswith("+") or found.get(child, False)
    return found


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """A module, or what a list of modules holds, which is not called itself."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        for child in module.children():
            yield from _called(child)
    else:
        yield module


def _untie(module: nn.Module, inside_islands: set[nn.Module]) -> None:
    """Give islands weights of their own where modules outside share them: one tensor has one type."""
    outside = {id(p) for child in module.modules() if child not in inside_islands for p in child._parameters.values()}
    for child in inside_islands:
        for name, parameter in child._parameters.items():
            if parameter is not None and id(parameter) in outside:
                child._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)


def _needs_its_type(module: nn.Module) -> bool:
    """Whether a module may fail on inputs of another type than its weights: torch's own, and single ones that multiply
    by a matrix. Others, as the norms of many networks, promote by themselves, and are more exact so."""
    if hasattr(module, "parametrizations"):
        return True
    own = list(module.parameters(recurse=False))
    if type(module).__module__.startswith("torch.nn."):
        return bool(own)
    return not any(module.children()) and any(parameter.dim() > 1 for parameter in own)


def _pin(module: nn.Module, behavior: type[_Pinned], policy: PrecisionPolicy) -> None:
    module.__class__ = _pinned_class(type(module), behavior)
    module._halfstep_policy = policy  # type: ignore[assignment]


class _Pinned(nn.Module):
    """A module whose floating-point types do not follow `.to(dtype)`."""

    _halfstep_policy: PrecisionPolicy

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new_pinned, (_ORIGINALS[type(self)], type(self).__bases__[0]), self.__dict__

    def _apply(self, fn: TensorMap, recurse: bool = True) -> nn.Module:
        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse=recurse)  # type: ignore[no-untyped-call,no-any-return]


class _Prepared(_Pinned):
    _halfstep_exact_scalars: bool
    _halfstep_plain_attention: bool
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
        with plain_attention() if self._halfstep_plain_attention else nullcontext():
            result = self._in_its_types(args, kwargs)
        return map_tensors(cast_to(output_dtype), result)

    def _in_its_types(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        policy, device_type = self._halfstep_policy, _device_type(self, args, kwargs)
        if policy.is_mixed:
            # The cache keeps a half copy of every weight beside the fp32 one for the length of the call. Training needs
            # those copies for the backward pass anyway; inference would only pay for them.
            half = torch_dtype(policy.compute)
            with torch.autocast(device_type, half, cache_enabled=torch.is_grad_enabled()):
                return super().forward(*args, **kwargs)
        if device_type == "cuda" and policy.params == "fp32":
            with tf32(policy.compute == "tf32"):
                return super().forward(*args, **kwargs)
        return super().forward(*args, **kwargs)


class _PlainAttention:
    """How many calls in all threads want torch's fused attention off."""

    lock = threading.Lock()
    calls = 0
    before = True


@contextmanager
def plain_attention() -> Iterator[None]:
    """Without torch's fused attention and encoder layers within the block: they leave out the modules within them,
    and so the types that these have."""
    state = _PlainAttention
    with state.lock:
        if state.calls == 0:
            state.before = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        state.calls += 1
    try:
        yield
    finally:
        with state.lock:
            state.calls -= 1
            if state.calls == 0:
                torch.backends.mha.set_fastpath_enabled(state.before)


class _Island(_Pinned):
    _halfstep_hands_on_fp32: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = (map_tensors(cast_to(torch.float32), values) for values in (args, kwargs))
        with torch.autocast(_device_type(self, args, kwargs), enabled=False):
            result = super().forward(*args, **kwargs)
        if self._halfstep_hands_on_fp32:
            return result
        return map_tensors(cast_to(torch_dtype(self._halfstep_policy.params)), result)


class _Caster(_Pinned):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        to_its_type = cast_to(torch_dtype(self._halfstep_policy.params))
        return super().forward(*map_tensors(to_its_type, args), **map_tensors(to_its_type, kwargs))


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
