"""How much memory a module takes in a precision, without its weights: it runs on tensors that have shapes and types, as
torch's FakeTensorMode makes them, and books are kept of what would be held. Sizes are bytes.

Not in the books: what libraries set up on their first call (code that they compile, a GPU's context and workspaces),
and what the C library keeps of buffers that were freed.
"""

from __future__ import annotations

import copy
import logging
import math
import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from halfstep.errors import InputError
from halfstep.precision.apply import prepare
from halfstep.precision.cast import TensorMap
from halfstep.precision.policy import PrecisionPolicy
from halfstep.precision.probe import probe

_UNITS = {"": 1, **{f"{prefix}B": 1000**power for power, prefix in enumerate(("", "K", "M", "G", "T"))}}
_UNITS |= {f"{prefix}iB": 1024**power for power, prefix in enumerate(("K", "M", "G", "T"), start=1)}
_MOST_SAMPLES = 2**20  # of a batch that is looked for
# NVIDIA, "Matrix Multiplication Background User's Guide", section 4.1: products are fastest on tensor cores where sizes
# are multiples of 16 bytes.
_TENSOR_CORE_BYTES = 16


@dataclass(frozen=True)
class Footprint:
    """`weights`: parameters and buffers. `gradients`, `activations`: the most of them; activations are all that is held
    for a while, the inputs among it. `optimizer`: moments, moving average and fp32 copies. `peak`: the most of all at
    once, which is less than their sum where they are not there at one time."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int


def forward_footprint(
    module: nn.Module, inputs: tuple[Any, ...] | dict[str, Any], policy: PrecisionPolicy, device: torch.device
) -> Footprint:
    """Of one forward call for inference, prepared for `policy`, which is not `auto`. Values of the module's tensors and
    of the inputs are not read, so all of them may be on the meta device. Raises InputError when the module cannot be
    called so, or its forward looks at values."""
    channels_last = prefers_channels_last(module, policy, device)
    with planning(module, device) as planned:
        given = planned.like(inputs)
        prepared = prepare(planned.module, policy, channels_last=channels_last)
        weights = [*prepared.parameters(), *prepared.buffers()]
        with torch.no_grad(), planned.books(weights=weights, activations=tree_leaves(given)) as books:
            planned.call(prepared, given)
        return books.footprint()


def prefers_channels_last(module: nn.Module, policy: PrecisionPolicy, device: torch.device) -> bool:
    """Whether `prepare` lays out the module's convolutions so on `device`; measured, when it has any."""
    has_convolutions = any(isinstance(child, (nn.Conv2d, nn.ConvTranspose2d)) for child in module.modules())
    return has_convolutions and probe(device).types[policy.compute].prefers_channels_last


def samples_of(inputs: tuple[Any, ...] | dict[str, Any]) -> int:
    """How many there are along the first axis of the first tensor that has axes. Raises InputError when none has."""
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor) and leaf.dim()]
    if not tensors:
        raise InputError("inputs: no tensor with axes is among them; expected samples along a first axis")
    return len(tensors[0])


def with_batch(inputs: tuple[Any, ...] | dict[str, Any], batch: int) -> Any:
    """Inputs of `batch` samples, on the meta device: all tensors that have as many along their first axis as
    `samples_of` says get the new number."""
    samples = samples_of(inputs)

    def resized(tensor: torch.Tensor) -> torch.Tensor:
        grows = tensor.dim() and len(tensor) == samples
        return torch.empty((batch, *tensor.shape[1:]) if grows else tensor.shape, dtype=tensor.dtype, device="meta")

    return tree_map_only(torch.Tensor, resized, inputs)


def largest(peak: Callable[[int], int], budget: int, what: str) -> int:
    """The largest number, from 1, for which `peak` is within the budget; it must not fall as the number grows. Raises
    InputError, naming the least that `what` needs, when that of 1 is not."""
    if (needed := peak(1)) > budget:
        raise InputError(f"budget: got {told(budget)}; {what} needs {told(needed)}, give that or more")
    below, above, at_below, at_above = 1, _MOST_SAMPLES + 1, needed, needed + (peak(2) - needed) * _MOST_SAMPLES
    halves = False
    while above - below > 1:
        # Memory is nearly a line, and each look at it takes a second; every other look halves what is left.
        share = 0.5 if halves or at_above <= budget else (budget - at_below) / (at_above - at_below)
        guess = min(max(below + int(share * (above - below)), below + 1), above - 1)
        if (at_guess := peak(guess)) <= budget:
            below, at_below = guess, at_guess
        else:
            above, at_above = guess, at_guess
        halves = not halves
    return below


def least(peak: Callable[[int], int], most: int, budget: int, what: str) -> int:
    """The least number, from 0 to `most`, for which `peak` is within the budget; it must not rise as the number grows.
    Raises InputError, naming the least that `what` needs, when that of `most` is not."""
    if peak(0) <= budget:
        return 0
    if (needed := peak(most)) > budget:
        raise InputError(f"budget: got {told(budget)}; {what} needs {told(needed)}, give that or more")
    below, above = 0, most
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (below, middle) if peak(middle) <= budget else (middle, above)
    return above


def parse_size(text: str) -> int:
    """Bytes of a size: `8GB`, `1.5 GiB`, `500MB`; K, M, G and T are thousands, with an i 1024. Raises InputError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    factor = {unit.lower(): size for unit, size in _UNITS.items()}.get(found[2].lower()) if found else None
    if found is None or factor is None or float(found[1]) == 0:
        raise InputError(f"memory: got {text!r}; expected a size such as 8GB, 8GiB or 500MB")
    return int(float(found[1]) * factor)


def told(size: int) -> str:
    """Bytes for people, rounded up in the last place, so that what is named as enough is."""
    unit, factor = ("GB", 10**9) if size >= 10**9 else ("MB", 10**6)
    return f"{math.ceil(100 * size / factor) / 100:.2f} {unit}" if size >= 10**5 else f"{size} bytes"


def round_channels(channels: int, policy: PrecisionPolicy) -> int:
    """The next number of channels for which a GPU's tensor cores run at full speed: a multiple of 16 bytes, which are 8
    channels of fp16 or bf16 and 4 of tf32 (NVIDIA, "Matrix Multiplication Background User's Guide"). fp32 runs
    elsewhere, and has no such multiple."""
    if policy.compute == "fp32":
        return channels
    multiple = _TENSOR_CORE_BYTES // (4 if policy.compute == "tf32" else 2)
    return math.ceil(channels / multiple) * multiple


def odd_layers(module: nn.Module, policy: PrecisionPolicy) -> dict[str, tuple[int, int]]:
    """Layers with a number of channels that `round_channels` would change: by name the number and the next one that is
    none, of what goes in where that is odd, else of what comes out. Depthwise convolutions run elsewhere."""
    found = {}
    for name, child in module.named_modules():
        if isinstance(child, nn.Linear):
            channels = [child.in_features, child.out_features]
        elif isinstance(child, nn.modules.conv._ConvNd) and child.groups == 1:
            channels = [child.in_channels, child.out_channels]
        else:
            continue
        odd = [number for number in channels if round_channels(number, policy) != number]
        if odd:
            found[name] = (odd[0], round_channels(odd[0], policy))
    return found


@contextmanager
def planning(module: nn.Module, device: torch.device) -> Iterator[Planned]:
    """Within, a copy of `module` whose tensors have no values, and whose operations are those of `device`. Raises
    InputError for one of TorchScript."""
    if any(isinstance(child, torch.jit.ScriptModule) for child in module.modules()):
        raise InputError("model: TorchScript cannot be planned; give the module that it was made from")
    with _without_values():
        tensors = [*module.parameters(), *module.buffers()]
        yield Planned(copy.deepcopy(module, {id(tensor): _empty(tensor, device) for tensor in tensors}), device)


@dataclass(frozen=True)
class Planned:
    """A module that is being planned: `module` has no values, and its operations are those of `device`."""

    module: nn.Module
    device: torch.device

    def like(self, values: Any) -> Any:
        """The same without values."""
        return tree_map_only(torch.Tensor, lambda tensor: _empty(tensor, self.device), values)

    def call(self, module: nn.Module, inputs: tuple[Any, ...] | dict[str, Any]) -> Any:
        """Call a module made from the planned one, as a tracer does, to which checks of values do not apply."""
        name = type(module).__name__
        try:
            with _traced():
                return module(**inputs) if isinstance(inputs, dict) else module(*inputs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise InputError(
                f"{name}: its forward looks at values of tensors ({error.func}), and a plan has shapes alone; "
                "measure it by running it"
            ) from error
        except InputError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(f"{name}: cannot be called with such inputs ({reason}); give others") from error

    @contextmanager
    def books(self, **held: Iterable[Any]) -> Iterator[Books]:
        """Books of what is held within, and of the tensors that are there already, by kind."""
        books = Books(self.device)
        for kind, tensors in held.items():
            books.hold(kind, tensors)
        with books:
            yield books


class Books(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts storages from the operation that makes them until nobody has them any more, each under a kind.

    `kind`: of those that are made now, "activations" at first.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kind = "activations"
        self._on_cpu = device.type == "cpu"
        self._storages: dict[int, tuple[str, int, Any]] = {}
        self._held = dict.fromkeys(("weights", "gradients", "optimizer", "activations"), 0)
        self._most = dict(self._held)
        self._peak = 0

    def hold(self, kind: str, tensors: Iterable[Any]) -> None:
        """Count tensors that are there under `kind`, also where they were counted under another."""
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                self._forget(id(tensor.untyped_storage()))
                self._count(tensor, kind)

    def footprint(self) -> Footprint:
        """The most that was held up to now."""
        return Footprint(**self._most, peak=self._peak)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in self._storages:
                self._count(tensor, self.kind)
        self._look(_held_within(func, args, result) if self._on_cpu else 0)
        return result

    def _count(self, tensor: torch.Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        self._storages[key] = kind, storage.nbytes(), weakref.ref(storage, lambda _: self._forget(key))
        self._held[kind] += storage.nbytes()

    def _forget(self, key: int) -> None:
        kind, size, _ = self._storages.pop(key, ("activations", 0, None))
        self._held[kind] -= size

    def _look(self, within: int) -> None:
        now = {**self._held, "activations": self._held["activations"] + within}
        self._most = {kind: max(size, self._most[kind]) for kind, size in now.items()}
        self._peak = max(self._peak, sum(now.values()))


def _held_within(func: Any, args: tuple[Any, ...], result: Any) -> int:
    """What kernels of torch's CPU hold while they run beside what they are given and return, as it was measured
    operation by operation (torch 2.13)."""
    aten = torch.ops.aten
    if torch.Tag.pointwise in func.tags:  # what is of another type than the arithmetic is copied first
        floats = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.is_floating_point() and arg.dim()]
        common = reduce(torch.promote_types, [arg.dtype for arg in floats], torch.bfloat16) if floats else None
        if len({arg.dtype for arg in floats}) > 1 and common is not None:
            return sum(arg.numel() * common.itemsize for arg in floats if arg.dtype != common)
    elif func is aten.bmm.default and args[0].dtype.itemsize == 2:  # a matrix for all is repeated for each
        return sum(arg.numel() * arg.element_size() for arg in args[:2] if 0 in arg.stride())
    elif func is aten.convolution.default:
        return _held_within_convolution(args[0], args[1], result, groups=args[8])
    elif func.overloadpacket in (aten.upsample_bilinear2d, aten.upsample_nearest2d):
        return 0 if _is_channels_last(args[0]) else int(args[0].nbytes + result.nbytes)
    elif func is aten._scaled_dot_product_flash_attention_for_cpu.default and args[0].dtype.itemsize == 2:
        return int(args[1].nbytes + args[2].nbytes)  # keys and values in blocks
    return 0


def _held_within_convolution(x: torch.Tensor, weight: torch.Tensor, result: torch.Tensor, *, groups: int) -> int:
    """oneDNN has a layout of its own, or channels last, and reorders what comes in another."""
    half, spatial = x.dtype.itemsize == 2, weight.shape[-1] > 1
    reordered = weight.nbytes if half or spatial else 0  # single pixels in fp32 are plain products
    if x.dim() != 4 or _is_channels_last(x):
        return reordered
    if _is_channels_last(weight) or (half and groups > 1):
        return reordered + x.nbytes
    if half:
        return reordered + x.nbytes + result.nbytes
    return reordered + (x.nbytes if spatial else 0)


def _is_channels_last(x: torch.Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _empty(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


@contextmanager
def _without_values() -> Iterator[None]:
    """Tensors that are made within have no values. Modules change types and devices there, and what torch would log of
    an error is left to the error."""
    log, apply = logging.getLogger("torch._subclasses.fake_tensor"), nn.Module._apply
    disabled = log.disabled
    replaced: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def replace(module: nn.Module, fn: TensorMap, recurse: bool = True) -> nn.Module:
        """As torch's, which exchanges the insides of tensors. Those without values have to be exchanged themselves,
        once where several modules share them."""
        for child in module.children() if recurse else ():
            child._apply(fn)  # type: ignore[no-untyped-call]
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                while id(tensor) in replaced:
                    tensor = replaced[id(tensor)][1]
                with torch.no_grad():
                    other = fn(tensor)
                if other is not tensor:
                    other = nn.Parameter(other, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else other
                    replaced[id(tensor)] = tensor, other
                tensors[name] = other  # type: ignore[assignment]
        return module

    try:
        log.disabled = True
        nn.Module._apply = replace  # type: ignore[method-assign]
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        log.disabled = disabled
        nn.Module._apply = apply  # type: ignore[method-assign]


@contextmanager
def _traced() -> Iterator[None]:
    """As torch.export calls a module: `torch.compiler.is_compiling()` is true."""
    compiler: Any = torch.compiler
    before = compiler._is_compiling_flag
    try:
        compiler._is_compiling_flag = True
        yield
    finally:
        compiler._is_compiling_flag = before
