"""Is anything still learned, and if not, where did it break?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from halfstep.errors import NumericsError
from halfstep.models.family import Items
from halfstep.models.weights import newest_checkpoint
from halfstep.precision import COLLAPSE, find_failure
from halfstep.train.state import TrainState
from halfstep.train.work import StepWork


def require_finite(state: TrainState, work: StepWork, run: Path) -> None:
    """Raise NumericsError when a step since the last look was not finite and the range of fp16 does not explain it. All
    processes find it at the same step. `run`: the folder whose newest checkpoint is named."""
    scale = state.scale
    if scale.collapsed and not scale.may_overflow:
        raise NumericsError(
            f"step {state.step}: the gradients of {COLLAPSE} steps in a row are not finite, in {state.policy}, though "
            "the loss is; lower the loss scale or the learning rate, and go on from the last checkpoint"
        )
    bad = int(scale.first_bad_step)
    if bad < 0:
        return
    items = next(work.batches(bad)).items
    found = work.team.gather(lambda: _bad_data(work, bad, items))
    if not any(found):
        if scale.may_overflow:
            scale.first_bad_step.fill_(-1)
            return
        microbatches = work.begin(bad, items)
        failure = find_failure(state.network, [partial(_losses_of, work, microbatch) for microbatch in microbatches])
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
