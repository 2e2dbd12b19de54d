"""Checks of training and inference in half types. Each returns lines: where, what was found, what to do; none if all is
well."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from halfstep.errors import InputError
from halfstep.precision.apply import _find_kept, _Island, _Prepared
from halfstep.precision.cast import HALF_TYPES
from halfstep.precision.policy import torch_dtype
from halfstep.precision.scaling import LossScale

_TENSORS, _NUMBERS = 16, 4096  # looked at of all weights: enough to tell shares of one percent
_APART = 1e-3  # relative; an average that is nearer to the weights than this has arrived
_STALLED = 0.5  # of the updates: more than this are lost to rounding
_CAST_OPERATIONS = (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype)  # the latter under inference_mode


@dataclass(frozen=True)
class Stalled:
    """Shares, 0 to 1, of the weights, and of their average if there is one, that should have moved in an update and did
    not."""

    weights: float
    average: float | None

    def lines(self) -> list[str]:
        found = []
        if self.weights > _STALLED:
            found.append(
                f"weights: {self.weights:.0%} of their updates are lost to rounding; keep them in fp32, as mixed "
                "policies do, or raise the learning rate"
            )
        if self.average is not None and self.average > _STALLED:
            found.append(
                f"average: {self.average:.0%} of its updates are lost to rounding; keep it in fp32, or lower its decay"
            )
        return found


class Movement:
    """How many of the weights, and of their average, one update moves at all.

    Number formats are finite: where an update is below half a step of the format, adding it changes nothing, every time
    (the trap of an average or of weights kept in half). Compares a sample of the numbers before and after an update.
    Made before it from tensors by name, of any floating type, that the update changes in place; `average` has the
    names of `weights`.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], average: Mapping[str, torch.Tensor] | None = None) -> None:
        names = list(weights)
        self._names = names[:: max(1, len(names) // _TENSORS)]
        self._weights, self._before = weights, self._sample(weights)
        self._average = None if average is None else (average, self._sample(average))

    def stalled(self, optimizer: Optimizer) -> Stalled:
        """After an update that was applied, and before its gradients are dropped: an optimizer without a first moment
        has nothing else to tell which weights it pushed. Waits for the device."""
        weights = self._sample(self._weights)
        pushed = self._sample({name: _push(optimizer, self._weights[name]) for name in self._names}) != 0
        share = _share((weights == self._before) & pushed, pushed)
        if self._average is None:
            return Stalled(share, None)
        averages, before = self._average
        apart = (weights - before).abs() > _APART * weights.abs()
        return Stalled(share, _share((self._sample(averages) == before) & apart, apart))

    def _sample(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([own_part(values[name]).flatten()[:_NUMBERS] for name in self._names])


def _push(optimizer: Optimizer, weight: torch.Tensor) -> torch.Tensor:
    """What is not zero where the newest update should have moved the weight."""
    kept = optimizer.state.get(weight, {})
    for push in (kept.get("exp_avg"), kept.get("momentum_buffer"), weight.grad):
        if push is not None:
            return push
    return torch.zeros_like(weight)


def _share(part: torch.Tensor, whole: torch.Tensor) -> float:
    return round(float(part.sum()) / max(1, int(whole.sum())), 4)


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor that may be sharded."""
    # Known by what it offers: to import DTensor takes half a second, which only training over processes needs.
    part: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part.detach()


def check_scale(scale: LossScale) -> list[str]:
    """Whether updates are left out for good: a scale that fell below one, a fixed one that is too high, numbers that
    are not finite for another reason than the range of fp16. Waits for the device."""
    where, factor = f"step {scale.steps}", scale.factor
    skipped, bad = int(scale.skipped), int(scale.first_bad_step)
    found = []
    if scale.collapsed:
        advice = "go on in bf16 (LossScale.to_bf16)" if scale.may_overflow else "lower it or the learning rate"
        found.append(
            f"{where}: the last {int(scale.skipped_in_row)} updates were left out, and the loss scale is {factor:g}; "
            f"{advice}"
        )
    elif factor is not None and scale.policy.loss_scale == "dynamic" and factor < 1:
        found.append(
            f"{where}: the loss scale fell to {factor:g}; below one the gradients overflow without it: go on in bf16, "
            "or lower the loss itself"
        )
    elif factor is not None and scale.policy.loss_scale != "dynamic" and skipped:
        found.append(
            f"{where}: {skipped} updates were left out at the fixed loss scale {factor:g}, which never falls; use "
            "loss_scale=dynamic or a lower one"
        )
    if bad >= 0 and not scale.may_overflow:
        found.append(
            f"step {bad + 1}: not finite, in {scale.policy}, for another reason than the range of fp16; nothing was "
            "applied since, so that find_failure can name the layer"
        )
    return found


def check_types(module: nn.Module) -> list[str]:
    """Parameters and buffers of prepared modules within `module`, or of itself, that have another type than `prepare`
    gave them, and islands that are not kept as such: a submodule was replaced, a child cast, `load_state_dict` called
    with `assign=True`, or a tensor that stays fp32 was half before. Raises InputError when nothing is prepared, or when
    an island's pattern matches no module any more.
    """
    prepared = {name: part for name, part in module.named_modules() if isinstance(part, _Prepared)}
    if not prepared:
        raise InputError(f"precision: {type(module).__name__} is not prepared; call prepare(module, policy) first")
    return [line for name, part in prepared.items() for line in _changed(name, part)]


def _changed(name: str, part: _Prepared) -> list[str]:
    policy, found = part._halfstep_policy, []
    islands, kept = _find_kept(part, policy)
    pinned = [child for child in part.modules() if isinstance(child, _Island)]
    inside_islands = {child for island in (*islands, *pinned) for child in island.modules()}
    nested = [child for child in part.modules() if isinstance(child, _Prepared) and child is not part]
    others = {child for inner in nested for child in inner.modules()}  # these have a policy of their own
    for place, child in part.named_modules(prefix=name):
        if child in others:
            continue
        if child in islands and not isinstance(child, _Island):
            found.append(f"{place}: an island of {policy}, put there after prepare; prepare the whole again")
        own = chain(child.named_parameters(recurse=False), child.named_buffers(recurse=False))
        for tensor_name, tensor in own:
            stays = child in inside_islands or id(tensor) in kept
            expected = torch.float32 if stays else torch_dtype(policy.params)
            if tensor.is_floating_point() and tensor.dtype != expected:
                where = f"{place}.{tensor_name}" if place else tensor_name
                found.append(f"{where}: is {_type(tensor.dtype)}; {policy} has {_type(expected)} there: prepare again")
    return found


def check_autocast(step: Callable[[], object]) -> list[str]:
    """Whether autocast keeps casts of weights from one iteration to the next. Runs `step`, a whole iteration, twice.

    Autocast remembers the half copy of each fp32 leaf that it cast, until its outermost region ends. A region around a
    whole epoch, or around inference with gradients enabled, keeps them all, and more with each new leaf. After an
    update they are those of the old weights, so that nothing is learned from it (pytorch issue 48049). Counted are
    casts that `torch.clear_autocast_cache` frees after an iteration; it is called here, which costs casting again.
    """
    torch.clear_autocast_cache()
    with _Casts() as casts:
        step()
        first = len(casts.made)
        step()
    gc.collect()  # a graph in a cycle keeps casts too, and not because of the cache
    alive = [cast for cast in casts.made if not cast.storage.expired()]
    torch.clear_autocast_cache()
    kept = [cast for cast in alive if cast.storage.expired()]
    if not kept:
        return []
    line = f"autocast: {_megabytes(kept)} of casts outlive an iteration"
    if grown := [cast for cast in casts.made[first:] if cast in kept]:
        line += f", and each adds {_megabytes(grown)}"
    if any(cast.source._version != cast.version for cast in kept):
        line += ", of weights that were updated since: products go on with the old ones"
    return [f"{line}; open the autocast region anew in each iteration, in inference under torch.inference_mode"]


@dataclass(frozen=True, eq=False)
class _Cast:
    storage: StorageWeakRef
    bytes: int
    source: torch.Tensor
    version: int


class _Casts(TorchDispatchMode):
    """Every cast to a half type of a tensor that autocast may remember: a leaf with gradients."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[_Cast] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _CAST_OPERATIONS and result.dtype in HALF_TYPES:
            source = args[0]
            if source.is_leaf and source.requires_grad:
                storage = StorageWeakRef(result.untyped_storage())  # type: ignore[no-untyped-call]
                self.made.append(_Cast(storage, result.nbytes, source, source._version))
        return result


def _megabytes(casts: Sequence[_Cast]) -> str:
    return f"{sum(cast.bytes for cast in casts) / 1e6:.3g} MB"


def find_failure(module: nn.Module, losses: Sequence[Callable[[Any], torch.Tensor]]) -> str | None:
    """What is not finite first, and in which type, when the losses of a step's micro-batches are computed once more,
    each by a call with `module`; None when all is. Their gradients, without a scale, are added to those that are there.
    Where weights are sharded, all processes call it, because they are gathered from all."""
    bad_weights = [(n, p) for n, p in module.named_parameters() if not torch.isfinite(own_part(p)).all()]
    found = [f"the weight {name} ({_type(weight.dtype)})" for name, weight in bad_weights[:1]]
    names = {id(part): name for name, part in module.named_modules()}

    def look(part: nn.Module, _: Any, output: Any) -> None:
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if not found and isinstance(tensor, torch.Tensor) and not torch.isfinite(tensor).all():
                found.append(f"the output of {names[id(part)] or 'the network'} ({_type(tensor.dtype)})")

    # A module is done after those within it, so the innermost is the first.
    hooks = [part.register_forward_hook(look) for part in module.modules()]
    try:
        with torch.compiler.set_stance("force_eager"):
            for compute in losses:
                loss = compute(module).mean()
                if not found and not torch.isfinite(loss):
                    found.append("the loss, though not the network's output,")
                loss.backward()  # type: ignore[no-untyped-call]
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return found[0]
    gradients = [(n, p.grad) for n, p in module.named_parameters() if p.grad is not None]
    bad = [(name, gradient) for name, gradient in gradients if not torch.isfinite(own_part(gradient)).all()]
    if not bad:
        return None
    name, gradient = bad[-1]  # the pass goes backwards, so the last layer broke first
    return f"the gradient of {name} ({_type(gradient.dtype)})"


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
