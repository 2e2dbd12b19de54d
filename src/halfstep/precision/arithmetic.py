"""Arithmetic in a half type on any device, operation by operation.

A tensor of a half type is held here as fp32 values that the type can represent. Each operation runs in fp32, as the
units of GPUs accumulate, and its result is rounded once; PyTorch itself decides which type a result has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from halfstep.errors import InputError
from halfstep.precision.cast import HALF_TYPES

ACCUMULATIONS = ("fp32", "split-k")
_PARTS = 4  # of the inner dimension, each rounded to the half type
_OWN_NAMESPACES = ("aten", "prim", "prims", "profiler")


@dataclass(frozen=True)
class Target:
    """The arithmetic of a device. type: fp16 or bf16. accumulation: of products, `fp32`, or `split-k`: partial sums are
    rounded to the half type, as cuBLAS may while `allow_fp16_reduced_precision_reduction` is on, PyTorch's default.
    Raises InputError for others."""

    type: str = "fp16"
    accumulation: str = "fp32"

    def __post_init__(self) -> None:
        if self.type not in ("fp16", "bf16"):
            raise InputError(f"target: got {self.type!r}; expected fp16 or bf16")
        if self.accumulation not in ACCUMULATIONS:
            raise InputError(f"target: got accumulation {self.accumulation!r}; expected {' or '.join(ACCUMULATIONS)}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """`fp16`, `bf16`, or with how products are summed, `fp16,accumulation=split-k`."""
        name, _, rest = text.partition(",")
        key, _, value = rest.partition("=")
        if rest and key.strip() != "accumulation":
            raise InputError(f"target: got {rest!r}; expected accumulation={' or accumulation='.join(ACCUMULATIONS)}")
        return cls(name.strip(), value.strip() or "fp32")

    def __str__(self) -> str:
        return self.type if self.accumulation == "fp32" else f"{self.type},accumulation={self.accumulation}"


class MixedTypesError(RuntimeError):
    """Operands of a product are of two types, which no device takes."""


class UnrepresentableError(RuntimeError):
    """A value to fill in that the type cannot hold."""


def is_about_types(error: Exception) -> bool:
    """Whether operands were of two types: our own error, or that of operations without values."""
    words = ("same dtype", "should be the same", "expected scalar type", "to have the same dtype")
    return isinstance(error, MixedTypesError) or any(part in str(error) for part in words)


class HalfTensor(torch.Tensor):
    """Says that it is of a half type, and holds fp32 values that this type can represent."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, dtype: torch.dtype) -> HalfTensor:
        made: HalfTensor = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), dtype=dtype, device=held.device
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return Arithmetic().run(func, args, kwargs or {})

    def data_ptr(self) -> int:
        raise RuntimeError("HalfTensor: its data is not allocated")

    def as_half(self) -> torch.Tensor:
        """A tensor that is of the half type, without gradients."""
        return self.held.detach().to(self.dtype)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"HalfTensor({self.held!r}, dtype={self.dtype})"


class Rounded(NamedTuple):
    """A result of an operation: as fp32 has it, and as the half type does."""

    exact: torch.Tensor
    held: torch.Tensor
    dtype: torch.dtype


class Observer(Protocol):
    """Looks at an operation (its function, arguments and results) and says what its results hold instead.

    mixed: None, or what is told of a product of two types. With it, what a device refuses goes on: such products, and
    values filled in that the type cannot hold.
    """

    @property
    def mixed(self) -> Callable[[Any, Sequence[Any]], None] | None: ...

    def __call__(self, func: Any, given: Sequence[Any], results: Sequence[Rounded]) -> Sequence[torch.Tensor]: ...


class Arithmetic:
    """Runs operations on HalfTensors. `opaque` are the names of operations from extensions, of which only the results
    can be rounded."""

    def __init__(self, accumulation: str = "fp32", observer: Observer | None = None) -> None:
        self.opaque: set[str] = set()
        self._splits = accumulation == "split-k"
        self._observer = observer

    def run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        rule = _RULES.get(func) or _rule_of(func)
        if rule.is_simple_view and self._observer is None:
            given = args[0]
            made = func(given.held if type(given) is HalfTensor else given, *args[1:], **kwargs)
            return HalfTensor(made, given.dtype) if type(given) is HalfTensor else made
        call = _Call(args, kwargs)
        if call.half is None:
            return func(*args, **kwargs)
        if rule.special is not None:
            return rule.special(call)
        if rule.is_opaque:
            self.opaque.add(str(func))
        healed = None if self._observer is None else self._observer.mixed
        if rule.checks_fill and healed is None:
            _require_representable(func, call)
        if rule.is_product and (names := _types_of(call)):
            if healed is None:
                raise MixedTypesError(f"{func}: expected operands of one type, got {' and '.join(names)}")
            healed(func, call.given)
            return func(*call.args, **call.kwargs)
        if rule.split is not None and self._splits:
            result: Any = rule.split(*call.args, **call.kwargs, round_to=call.half)
        else:
            result = func(*call.args, **call.kwargs)
        if not rule.returns_tensors:
            return result
        if rule.mutates:
            if rule.changes_shape:
                with no_dispatch():  # of what is seen, as the operation has done with what is held
                    func(*args, **kwargs)
            self._round_in_place(func, call)
            return _back(result, call)
        results = (result,) if isinstance(result, torch.Tensor) else _flat(result)
        key = (func, len(results), *call.key)
        types = _TYPES.get(key)
        if types is None:
            types = _TYPES.setdefault(key, _result_types(func, args, kwargs, call, results))
        made = self._wrapped(func, rule, call, results, types)
        return made[0] if isinstance(result, torch.Tensor) else _rebuilt(result, iter(made))

    def _wrapped(
        self, func: Any, rule: _Rule, call: _Call, results: Sequence[Any], types: Sequence[torch.dtype | None]
    ) -> list[Any]:
        made: list[Any] = list(results)
        rounded: list[tuple[int, Rounded]] = []
        for index, (result, dtype) in enumerate(zip(results, types, strict=True)):
            if dtype is None or result is None:
                continue
            held = result if rule.is_exact else result.to(dtype).to(torch.float32)
            if self._observer is None:
                made[index] = HalfTensor(held, dtype)
            else:
                rounded.append((index, Rounded(result, held, dtype)))
        if self._observer is not None and rounded:
            values = self._observer(func, call.given, [entry for _, entry in rounded])
            for (index, entry), value in zip(rounded, values, strict=True):
                made[index] = HalfTensor(value, entry.dtype)
        return made

    def _round_in_place(self, func: Any, call: _Call) -> None:
        mutated = call.mutated(func)
        for wrapper in call.halves:
            if any(wrapper.held is argument for argument in mutated):
                exact = wrapper.held.clone() if self._observer is not None else wrapper.held
                held = wrapper.held.to(wrapper.dtype).to(torch.float32)
                if self._observer is not None:
                    (held,) = self._observer(func, call.given, [Rounded(exact, held, wrapper.dtype)])
                wrapper.held.copy_(held)
                if call.real.get(id(wrapper)) is not None:
                    call.real[id(wrapper)].copy_(held)


class _Call:
    """The arguments of an operation with fp32 values in the place of half ones."""

    def __init__(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self.half: torch.dtype | None = None
        self.halves: list[HalfTensor] = []
        self.real: dict[int, torch.Tensor] = {}
        self.key: list[Any] = []
        self.given = (*args, *kwargs.values())
        self.args = [self._plain(value) for value in args]
        self.kwargs = kwargs
        if kwargs:
            self.key.extend(kwargs)
            self.kwargs = {name: self._plain(value) for name, value in kwargs.items()}

    def mutated(self, func: Any) -> list[Any]:
        found: list[Any] = []
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = self.args[index] if index < len(self.args) else self.kwargs.get(argument.name)
                found.extend(value if isinstance(value, list) else [value])
        return found

    def _plain(self, value: Any) -> Any:
        kind = type(value)
        if kind is HalfTensor:
            self.half = value.dtype
            self.halves.append(value)
            self.key.append((value.dtype, value.dim() == 0))
            return value.held
        if isinstance(value, torch.Tensor):
            self.key.append((value.dtype, value.dim() == 0))
            if value.dtype in HALF_TYPES:  # a real one, from elsewhere
                self.half = value.dtype
                wrapper = HalfTensor(value.float(), value.dtype)
                self.halves.append(wrapper)
                self.real[id(wrapper)] = value
                return wrapper.held
            return value
        if kind is torch.dtype:
            self.key.append(value)
            if value in HALF_TYPES:
                self.half = value
                return torch.float32
            return value
        if kind is list or kind is tuple:
            return [self._plain(item) for item in value]
        self.key.append(value if kind is bool else kind)
        return value


@dataclass(frozen=True)
class _Rule:
    """What is to be known of an operation: whether its results need no rounding, whether it writes to arguments, and
    how a product is split."""

    is_composite: bool
    is_simple_view: bool
    is_exact: bool
    changes_shape: bool
    mutates: bool
    returns_tensors: bool
    is_opaque: bool
    checks_fill: bool
    is_product: bool
    split: Callable[..., torch.Tensor] | None
    special: Callable[[_Call], Any] | None


_RULES: dict[Any, _Rule] = {}
_TYPES: dict[tuple[Any, ...], tuple[torch.dtype | None, ...]] = {}

# These move values or choose among them, so that what they give can be represented already.
_EXACT = frozenset({
    "abs", "amax", "amin", "cat", "clone", "embedding", "empty_like",
    "flip", "gather", "index", "index_select", "max", "max_pool2d_with_indices", "min", "neg",
    "new_empty", "new_zeros", "ones_like", "relu", "repeat", "roll", "select_backward",
    "slice_backward", "sort", "stack", "topk", "tril", "triu",
    "upsample_nearest2d", "zeros_like", "_unsafe_view",
})  # fmt: skip
_FILLS = frozenset({
    "fill", "fill_", "full", "full_like", "masked_fill", "masked_fill_", "new_full", "constant_pad_nd",
})  # fmt: skip


def _rule_of(func: Any) -> _Rule:
    schema = func._schema
    name = func.overloadpacket.__name__
    mutates = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
    rule = _Rule(
        is_composite=torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"),
        changes_shape=torch.Tag.inplace_view in func.tags,
        is_simple_view=func.is_view
        and func not in _SPECIAL
        and [str(a.type) for a in schema.arguments].count("Tensor") == 1
        and [str(returned.type) for returned in schema.returns] == ["Tensor"],
        is_exact=not mutates and (func.is_view or (func.namespace == "aten" and name in _EXACT)),
        mutates=mutates,
        returns_tensors=any("Tensor" in str(returned.type) for returned in schema.returns),
        is_opaque=func.namespace not in _OWN_NAMESPACES,
        checks_fill=func.namespace == "aten" and name in _FILLS,
        is_product=func in _PRODUCTS,
        split=_SPLIT.get(func),
        special=_SPECIAL.get(func),
    )
    return _RULES.setdefault(func, rule)


def moves_values(func: Any) -> bool:
    """Whether an operation only moves values or chooses among them, so that nothing is rounded."""
    return (_RULES.get(func) or _rule_of(func)).is_exact


def _result_types(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], call: _Call, results: Sequence[Any]
) -> tuple[torch.dtype | None, ...]:
    """The half type of each of the tensors that an operation returns, None for others: as PyTorch itself decides for
    tensors without values, and where it cannot, that of the half arguments for every fp32 result."""

    def meta(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
        if type(value) in (list, tuple):
            return [meta(item) for item in value]
        return value

    given = {name: "meta" if name == "device" and value is not None else meta(value) for name, value in kwargs.items()}
    try:
        types = [_type_of(tensor) for tensor in _flat(func(*(meta(value) for value in args), **given))]
    except RuntimeError as error:  # has no form without values, or looks at them
        if is_about_types(error):
            raise
        types = [call.half if _type_of(tensor) is torch.float32 else None for tensor in results]
    return tuple(dtype if dtype in HALF_TYPES else None for dtype in types)


def _type_of(tensor: torch.Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


def _flat(result: Any) -> list[Any]:
    """The tensors of a result; None where an operation leaves one out."""
    if isinstance(result, torch.Tensor) or result is None:
        return [result]
    if isinstance(result, (tuple, list)):
        return [tensor for item in result for tensor in _flat(item)]
    return []


def _rebuilt(result: Any, made: Iterator[Any]) -> Any:
    if isinstance(result, torch.Tensor) or result is None:
        return next(made)
    if isinstance(result, (tuple, list)):
        return type(result)(_rebuilt(item, made) for item in result)
    return result


def _back(result: Any, call: _Call) -> Any:
    """What an operation returns that wrote to its arguments: these."""

    def given(tensor: torch.Tensor) -> torch.Tensor:
        for wrapper in call.halves:
            if wrapper.held is tensor:
                return call.real.get(id(wrapper), wrapper)
        return tensor

    return _rebuilt(result, iter([given(tensor) for tensor in _flat(result)]))


def _types_of(call: _Call) -> list[str]:
    """The types of a product's operands where there are several: an error on all devices, though not where only shapes
    are looked at."""
    types = {value.dtype for value in call.given if isinstance(value, torch.Tensor) and value.is_floating_point()}
    return sorted(str(dtype).removeprefix("torch.") for dtype in types) if len(types) > 1 else []


def _require_representable(func: Any, call: _Call) -> None:
    for value in call.given:
        if type(value) in (int, float) and call.half is not None and abs(value) > torch.finfo(call.half).max:
            if value in (float("inf"), -float("inf")):
                continue
            name = str(call.half).removeprefix("torch.")
            text = f"{func}: value {value:g} cannot be converted to type {name} without overflow"
            raise UnrepresentableError(text)


def _view_as_type(call: _Call) -> Any:
    """`view(dtype)` reads the bits anew: of a real tensor of the half type."""
    given, dtype = call.given[:2]
    source = given.as_half() if isinstance(given, HalfTensor) else given
    seen = source.view(dtype)
    return HalfTensor(seen.float(), dtype) if dtype in HALF_TYPES else seen


def _in_parts(
    a: torch.Tensor, b: torch.Tensor, multiply: Callable[..., torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    size = -(-a.shape[-1] // _PARTS)
    starts = range(0, a.shape[-1], size)
    parts = [multiply(a[..., k : k + size], b[..., k : k + size, :]).to(dtype).to(torch.float32) for k in starts]
    return torch.stack(parts).sum(dim=0)


def _mm(a: torch.Tensor, b: torch.Tensor, *, round_to: torch.dtype) -> torch.Tensor:
    return _in_parts(a, b, torch.mm, round_to)


def _bmm(a: torch.Tensor, b: torch.Tensor, *, round_to: torch.dtype) -> torch.Tensor:
    return _in_parts(a, b, torch.bmm, round_to)


def _addmm(
    c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, round_to: torch.dtype, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    return beta * c + alpha * _in_parts(a, b, torch.mm, round_to)


def _baddbmm(
    c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, round_to: torch.dtype, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    return beta * c + alpha * _in_parts(a, b, torch.bmm, round_to)


_aten = torch.ops.aten
_SPLIT: dict[Any, Callable[..., torch.Tensor]] = {
    _aten.mm.default: _mm,
    _aten.bmm.default: _bmm,
    _aten.addmm.default: _addmm,
    _aten.baddbmm.default: _baddbmm,
}
_PRODUCTS = {*_SPLIT, _aten.convolution.default, _aten.mv.default, _aten.addmv.default, _aten.dot.default}
_SPECIAL: dict[Any, Callable[[_Call], Any]] = {_aten.view.dtype: _view_as_type}


class Simulated(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """All operations within the block on the arithmetic."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to be skipped costs some microseconds for each operation

    def __init__(self, arithmetic: Arithmetic) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._run = arithmetic.run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (_RULES.get(func) or _rule_of(func)).is_composite:  # in inference mode nothing else takes it apart
            with self:
                return func.decompose(*args, **(kwargs or {}))
        return self._run(func, args, kwargs or {})
