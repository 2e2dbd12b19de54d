"""One pass of a module in simulated half arithmetic that finds every operation the type has no room for.

What is found is healed: the pass goes on with the value that fp32 has, so that the first overflow does not hide all
that come after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from halfstep.errors import InputError
from halfstep.precision.arithmetic import HalfTensor, Rounded, Target, is_about_types
from halfstep.precision.audits.calls import Call
from halfstep.precision.cast import HALF_TYPES, tensors_of
from halfstep.precision.policy import PrecisionPolicy, torch_dtype
from halfstep.precision.simulate import simulate
from halfstep.precision.watch import Place, source_line

OVERFLOW, NOT_FINITE, LOST, WEIGHTS = "overflow", "not finite", "lost", "weights"
READS, MIXED, FAILS = "reads", "two types", "fails"
HEADROOM = 2.0  # other inputs have other extremes: a value within one bit of the limit counts as beyond it
_SAMPLE = 4096  # numbers looked at for a local error
_LOST = 2.0  # units of the type's precision by which a rounded tensor is off at most, unless its values underflow

# In the code of a container these follow the type of their operands, so that one fp32 operand is enough; all others,
# products and attention first of all, need operands of one type.
_FOLLOWING = frozenset({
    "add", "sub", "mul", "div", "neg", "abs", "exp", "exp2", "expm1", "log", "log2", "log1p", "log10", "sqrt",
    "rsqrt", "pow", "square", "reciprocal", "sigmoid", "tanh", "silu", "gelu", "relu", "softplus", "elu",
    "leaky_relu", "sin", "cos", "tan", "erf", "atan", "clamp", "clamp_min", "clamp_max", "maximum", "minimum",
    "where", "addcmul", "addcdiv", "lerp", "sum", "mean", "var", "std", "prod", "cumsum", "norm",
    "linalg_vector_norm", "amax", "amin", "max", "min", "logsumexp", "_softmax", "_log_softmax", "softmax",
    "rsub", "remainder", "round", "floor", "hardtanh", "sinh", "cosh", "var_mean", "native_dropout",
    "masked_fill", "fill", "avg_pool2d", "upsample_bilinear2d", "upsample_nearest2d", "cat", "stack",
    "logcumsumexp", "xlogy", "hypot", "mish", "hardswish", "log_sigmoid_forward", "cast", "dist",
    "true_divide",
})  # fmt: skip


# These look at shape and type alone.
_BLIND = frozenset(
    {"zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full"}
)
_STATISTICS = frozenset({"native_layer_norm", "native_group_norm", "native_batch_norm", "_native_batch_norm_legit"})


def returns_statistics(operation: str) -> bool:
    """Whether an operation returns statistics for its backward pass beside its result."""
    return operation in _STATISTICS


def name_of(func: Any) -> str:
    """What to call an operation."""
    name: str = func.overloadpacket.__name__.removesuffix("_")
    return "cast" if name == "_to_copy" else name


def follows_operands(operation: str) -> bool:
    """Whether an operation computes in fp32 as soon as one of its operands is fp32."""
    return operation in _FOLLOWING


@dataclass(frozen=True)
class Event:
    """Something that a half type cannot hold.

    kind: overflow (a value beyond the type is born of finite ones), not finite (another NaN or infinity is, as 0/0),
    lost (the result is smaller than the type resolves), weights (they overflow or are lost when they are cast), reads
    (the first operation of a module on values that do not fit, which are born elsewhere), two types (a product of fp32
    and half values), fails (code of the module raises an error that it does not raise in fp32). module: where,
    operation and line: which. producers: the modules that made its inputs last. largest: absolute value that fp32 has
    there; local_error: relative, of the rounding alone.
    """

    kind: str
    module: str
    operation: str
    line: str
    producers: tuple[str, ...]
    largest: float
    local_error: float


@dataclass
class Trace:
    """What a pass found: events in their order, modules whose results do not fit, and by the number of an event the
    leaf that its operand comes from, where that decides the type."""

    events: list[Event] = field(default_factory=list)
    unfit_results: set[str] = field(default_factory=set)
    followers: dict[int, str | None] = field(default_factory=dict)


def trace(
    module: nn.Module,
    call: Call,
    policy: PrecisionPolicy,
    target: Target,
    place: Place,
    *,
    headroom: float = HEADROOM,
) -> Trace:
    """Run `call` in healed half arithmetic under `policy`; a value overflows that is beyond the type's largest by
    `headroom`."""
    recorder = _Recorder(place, torch_dtype(target.type), headroom)
    with simulate(module, policy, target, observer=recorder) as run:
        recorder.running = True
        with place.watched(left=recorder.left), torch.no_grad():
            try:
                call.on(run)
            except (InputError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # noqa: BLE001 - the module's own code, which ran in fp32
                kind = MIXED if is_about_types(error) else FAILS
                operation = type(error).__name__
                event = Event(kind, place.of(error), operation, source_line(error), (), 0.0, 0.0)
                recorder.found.events.append(event)
    return recorder.found


@dataclass(frozen=True)
class Stressed:
    """An observer that takes a type's largest values away, so that what survives has room to spare."""

    limit: float
    mixed = None

    def __call__(self, func: Any, given: Sequence[Any], results: Sequence[Rounded]) -> list[torch.Tensor]:
        return [_beyond(entry, self.limit) for entry in results]


def _beyond(entry: Rounded, limit: float) -> torch.Tensor:
    low, high = entry.held.aminmax() if entry.held.numel() else (torch.zeros(()), torch.zeros(()))
    if max(-float(low), float(high)) <= limit:
        return entry.held
    too_large = entry.held.abs() > limit
    return torch.where(too_large, entry.held.sign() * float("inf"), entry.held)


class _Recorder:
    """Observes every rounding of a pass."""

    def __init__(self, place: Place, dtype: torch.dtype, headroom: float) -> None:
        self.found = Trace()
        self.running = False
        self._readers: set[str] = set()
        self._place = place
        self._limit = torch.finfo(dtype).max / headroom
        self._eps = torch.finfo(dtype).eps
        self._order = 0

    def __call__(self, func: Any, given: Sequence[Any], results: Sequence[Rounded]) -> list[torch.Tensor]:
        if not self.running:  # weights are cast before the pass
            return [_marked(entry.exact, entry.exact, None, False) for entry in results]
        name = name_of(func)
        sources = [tensor for value in given for tensor in tensors_of(value)]
        halves = [tensor.held for tensor in sources if isinstance(tensor, HalfTensor)]
        leaf = self._place.leaf
        if leaf is not None:
            self._order += 1
            maker: tuple[int, str] | None = (self._order, leaf)
        else:
            maker = _latest(halves)
        unfit_input = any(_mark(held).unfit for held in halves)
        module = self._place.module
        reads = name not in _BLIND and (leaf is not None or not follows_operands(name))
        if unfit_input and reads and not func.is_view and module not in self._readers:
            self._readers.add(module)
            largest = max(largest_of(held) for held in halves if _mark(held).unfit)
            self._event(READS, name, halves, largest, 1.0, None)
        values = []
        for number, entry in enumerate(results):
            if number and returns_statistics(name):
                values.append(_marked(entry.exact, entry.exact, maker, False))
                continue
            if entry.exact is entry.held:  # moved, not computed
                exact = _moved(func, given, entry) if func.is_view else entry.exact
                values.append(_marked(entry.held, exact, maker, unfit_input))
                continue
            values.append(self._looked_at(func, name, given, halves, entry, maker, unfit_input))
        return values

    def left(self, name: str, result: Any) -> None:
        if any(isinstance(t, HalfTensor) and _mark(t.held).unfit for t in tensors_of(result)):
            self.found.unfit_results.add(name)

    def mixed(self, func: Any, given: Sequence[Any]) -> None:
        """A product has operands of two types."""
        halves = [t.held for value in given for t in tensors_of(value) if isinstance(t, HalfTensor)]
        maker = _latest(halves)
        if maker is not None:
            self.found.followers[len(self.found.events)] = maker[1]
        self._event(MIXED, name_of(func), halves, 0.0, 0.0, None)

    def _looked_at(
        self,
        func: Any,
        name: str,
        given: Sequence[Any],
        halves: list[torch.Tensor],
        entry: Rounded,
        maker: Any,
        inherited: bool,
    ) -> torch.Tensor:
        """What the result holds from here on. An event is where something is born, not where it is `inherited`."""
        exact, held = entry.exact, entry.held
        largest = largest_of(exact)
        if largest != largest or largest == float("inf"):
            healed = _again(func, given) if all(map(_is_finite, halves)) else None
            if healed is None or healed.shape != exact.shape or not _is_finite(healed):
                finite = exact[exact.isfinite()]
                if largest_of(finite) <= self._limit:
                    return _marked(held, exact, maker, False)  # infinite in fp32 too, as in masks
                largest = largest_of(finite)
            else:
                if not inherited:
                    self._event(NOT_FINITE, name, halves, largest_of(healed), 1.0, maker)
                return _marked(healed, healed, maker, True)
        if largest > self._limit:
            if not inherited:
                self._event(OVERFLOW, name, halves, largest, local_error(exact, held), maker)
            return _marked(exact, exact, maker, True)
        error = local_error(exact, held)
        if error > _LOST * self._eps:
            if not inherited:
                self._event(LOST, name, halves, largest, error, maker)
            return _marked(exact, exact, maker, True)
        return _marked(held, exact, maker, False)

    def _event(
        self,
        kind: str,
        name: str,
        halves: list[torch.Tensor],
        largest: float,
        error: float,
        maker: Any,
    ) -> None:
        made_by = sorted({maker for held in halves if (maker := _mark(held).maker) is not None}, reverse=True)
        producers = tuple(dict.fromkeys(leaf for _, leaf in made_by))
        if kind not in (READS, MIXED) and self._place.leaf is None and follows_operands(name):
            self.found.followers[len(self.found.events)] = maker[1] if maker else None
        self.found.events.append(Event(kind, self._place.module, name, source_line(), producers, largest, error))


@dataclass(frozen=True)
class _Mark:
    """What is known of a held tensor: its value before it was rounded, the module that made it last and when, and
    whether the type has no room for it."""

    exact: torch.Tensor | None = None
    maker: tuple[int, str] | None = None
    unfit: bool = False


_UNMARKED = _Mark()


def _mark(held: torch.Tensor) -> _Mark:
    mark: _Mark = getattr(held, "_halfstep_mark", _UNMARKED)
    return mark


def _marked(value: torch.Tensor, exact: torch.Tensor, maker: tuple[int, str] | None, unfit: bool) -> torch.Tensor:
    value._halfstep_mark = _Mark(exact if exact is not value else None, maker, unfit)  # type: ignore[attr-defined]
    return value


def _latest(halves: Sequence[torch.Tensor]) -> tuple[int, str] | None:
    """Who made one of them last."""
    return max((maker for held in halves if (maker := _mark(held).maker) is not None), default=None)


def _exact(value: Any) -> Any:
    if isinstance(value, HalfTensor):
        exact = _mark(value.held).exact
        return value.held if exact is None else exact
    if isinstance(value, (list, tuple)):
        return [_exact(item) for item in value]
    return torch.float32 if value in HALF_TYPES else value


def _moved(func: Any, given: Sequence[Any], entry: Rounded) -> torch.Tensor:
    """What a view shows of a value before it was rounded."""
    exact = _mark(given[0].held).exact if isinstance(given[0], HalfTensor) else None
    if exact is None or exact.shape != given[0].shape:
        return entry.exact
    made = _again(func, given)
    return entry.exact if made is None else made


def _again(func: Any, given: Sequence[Any]) -> torch.Tensor | None:
    """An operation once more, on its arguments as they were before they were rounded."""
    names = [argument.name for argument in func._schema.arguments]
    positional = [n for n, argument in enumerate(func._schema.arguments) if not argument.kwarg_only]
    if len(given) > len(positional):  # keywords have been given, whose order is not known here
        return None
    made = func(**dict(zip(names, map(_exact, given), strict=False)))
    return made if isinstance(made, torch.Tensor) else None


def weight_events(module: nn.Module, target: Target, place: Place) -> list[Event]:
    """Weights and buffers that overflow or are lost when they are cast."""
    dtype = torch_dtype(target.type)
    events = []
    for child, name in place.names.items():
        for own, tensor in (*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)):
            if not tensor.is_floating_point():
                continue
            exact = tensor.detach()
            held = exact.to(dtype).to(torch.float32)
            error = local_error(exact, held)
            if (not _is_finite(held) and _is_finite(exact)) or error > _LOST * torch.finfo(dtype).eps:
                events.append(Event(WEIGHTS, name, own, "", (), largest_of(exact), error))
    return events


def largest_of(tensor: torch.Tensor) -> float:
    """The largest absolute value; NaN where there is one."""
    if not tensor.numel():
        return 0.0
    low, high = torch.aminmax(tensor.detach())
    return max(-float(low), float(high)) if float(low) == float(low) else float("nan")


def local_error(exact: torch.Tensor, held: torch.Tensor) -> float:
    """Of a rounding: the norm of what it changed over the norm, of at most 4096 numbers spread over the tensor."""
    step = max(1, exact.numel() // _SAMPLE)
    ours, theirs = (t.detach().reshape(-1)[::step].double() for t in (held, exact))
    scale = float(theirs.norm())
    return float((ours - theirs).norm()) / scale if scale else 0.0


def _is_finite(tensor: torch.Tensor) -> bool:
    return largest_of(tensor) < float("inf")
