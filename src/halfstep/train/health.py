"""Is anything still learned, and if not, where did it break?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halfstep.errors import NumericsError
from halfstep.models.family import Items, StateDict
from halfstep.models.weights import newest_checkpoint
from halfstep.train.state import COLLAPSE, TrainState, own_part
from halfstep.train.work import StepWork

_TENSORS, _NUMBERS = 16, 4096  # looked at of all weights: enough to tell shares of one percent
_APART = 1e-3  # relative; an average that is nearer to the weights than this has arrived


class Movement:
    """How many of the weights, and of their average, one update moves at all.

    Number formats are finite: where an update is below half a step of the format, adding it changes nothing, every time
    (the trap of an average or of weights kept in half). Compares a sample of the numbers before and after an update.
    """

    def __init__(self, state: TrainState) -> None:
        names = list(state.weights)
        self._names = names[:: max(1, len(names) // _TENSORS)]
        self._weights, self._ema = self._sample(state.weights), self._sample(state.ema)

    def stalled(self, state: TrainState) -> tuple[float | None, float | None]:
        """Shares of the weights, and of the average, that should have moved and did not; None when this update was
        skipped. Waits for the device."""
        if int(state.skipped_in_row) > 0:
            return None, None
        weights, ema = self._sample(state.weights), self._sample(state.ema)
        kept = {name: state.optimizer.state[state.weights[name]] for name in self._names}
        zero = {name: torch.zeros_like(state.weights[name]) for name in self._names}
        pushed = self._sample({name: kept[name].get("exp_avg", zero[name]) for name in self._names}) != 0
        apart = (weights - self._ema).abs() > _APART * weights.abs()
        return _share((weights == self._weights) & pushed, pushed), _share((ema == self._ema) & apart, apart)

    def _sample(self, values: StateDict) -> torch.Tensor:
        return torch.cat([own_part(values[name]).flatten()[:_NUMBERS] for name in self._names])


def _share(part: torch.Tensor, whole: torch.Tensor) -> float:
    return round(float(part.sum()) / max(1, int(whole.sum())), 4)


def require_finite(state: TrainState, work: StepWork, run: Path) -> None:
    """Raise NumericsError when a step since the last look was not finite and the range of fp16 does not explain it. All
    processes find it at the same step. `run`: the folder whose newest checkpoint is named."""
    if state.collapsed and not state.may_overflow:
        raise NumericsError(
            f"step {state.step}: the gradients of {COLLAPSE} steps in a row are not finite, in {state.policy}, though "
            "the loss is; lower the loss scale or the learning rate, and go on from the last checkpoint"
        )
    bad = int(state.first_bad_step)
    if bad < 0:
        return
    items = next(work.batches(bad)).items
    found = work.team.gather(lambda: _bad_data(work, bad, items))
    if not any(found):
        if state.may_overflow:
            state.first_bad_step.fill_(-1)
            return
        microbatches = work.begin(bad, items)
        failure = find_failure(state, [partial(_losses_of, work, microbatch) for microbatch in microbatches])
        found = work.team.gather(lambda: failure)
    told = next((line for line in found if line), "something, not found again,")
    kept = newest_checkpoint(run)
    advice = f"the last good checkpoint is {kept}" if kept else "there is no checkpoint yet"
    raise NumericsError(
        f"step {bad + 1}: {told} is not finite, in {state.policy}; training stopped before anything was moved by it, "
        f"{advice}"
    )


def _bad_data(work: StepWork, step: int, items: Items) -> str | None:
    """The item of this process, or its latents, that is not finite before any network of ours has seen it."""
    number, what = not_finite_item(items), "an item"
    if number is None and work.data.encoder is not None:
        latents = [work.data.latents(part)[:1] for part in work.begin(step, items)]
        number, what = not_finite_item([torch.cat([part for (part,) in latents])]), "the latents of an item"
    return None if number is None else f"{what} of {work.data.sequence(step, work.team, number)!r} in the data"


def _losses_of(work: StepWork, microbatch: Items, network: Any) -> torch.Tensor:
    return work.losses(network, microbatch)


def not_finite_item(items: Sequence[torch.Tensor]) -> int | None:
    """The number of the first of the data's items that is not finite, if any."""
    for item in items:
        if item.is_floating_point() and not torch.isfinite(item).all():
            return int((~torch.isfinite(item)).flatten(1).any(dim=1).nonzero()[0])
    return None


def find_failure(state: TrainState, microbatches: Sequence[Callable[[Any], torch.Tensor]]) -> str | None:
    """What is not finite first, and in which type, when the losses of a step's micro-batches are computed once more;
    None when all is. Processes go through all of it together, because sharded weights are gathered from all."""
    bad_weights = [(n, p) for n, p in state.network.named_parameters() if not torch.isfinite(own_part(p)).all()]
    found = [f"the weight {name} ({_type(weight)})" for name, weight in bad_weights[:1]]
    names = {id(module): name for name, module in state.network.named_modules()}

    def look(module: nn.Module, _: Any, output: Any) -> None:
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if not found and isinstance(tensor, torch.Tensor) and not torch.isfinite(tensor).all():
                found.append(f"the output of {names[id(module)] or 'the network'} ({_type(tensor)})")

    # A module is done after those within it, so the innermost is the first.
    hooks = [module.register_forward_hook(look) for module in state.network.modules()]
    try:
        with torch.compiler.set_stance("force_eager"):
            for losses in microbatches:
                loss = losses(state.network).mean()
                if not found and not torch.isfinite(loss):
                    found.append("the loss, though not the network's output,")
                loss.backward()  # type: ignore[no-untyped-call]
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        return found[0]
    gradients = [(n, p.grad) for n, p in state.network.named_parameters() if p.grad is not None]
    bad = [(name, gradient) for name, gradient in gradients if not torch.isfinite(own_part(gradient)).all()]
    if not bad:
        return None
    name, gradient = bad[-1]  # the pass goes backwards, so the last layer broke first
    return f"the gradient of {name} ({_type(gradient)})"


def _type(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
