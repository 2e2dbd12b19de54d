"""Does what a network is told have an effect? A network that ignores its label, action or context trains on without any
other sign of it: the loss falls, and is the same whatever it is told."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any, Literal

import torch

from halfstep.models.family import Items
from halfstep.train.work import StepWork

NO_EFFECT = 0.001  # of the loss: less is what other noise does as well
_LOOKS = 5  # in a row
_YOUNG = 1000  # steps in which a network that starts as the identity may not listen yet


class Conditions:
    """Looks at a run now and then."""

    def __init__(self, kind: Literal["labeled", "walks"], work: StepWork) -> None:
        self._kind: Literal["labeled", "walks"] = kind
        self._work = work
        self._seen: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_LOOKS))
        self._told: set[str] = set()

    def look(self, step: int, network: Any, items: Items) -> tuple[dict[str, float], list[str]]:
        """By how much of itself the loss of `items` grows when a condition is that of another sample, with the same
        noise; and what the user should know of it. Torch's generator is as it was. Processes look at their own items,
        all at the same step."""
        found = {}
        own = self._loss(network, items)
        for name, others in with_others(self._kind, items).items():
            found[name] = round(float((self._loss(network, others) - own) / own), 5)
            self._seen[name].append(found[name])
        lines = []
        for name, effects in self._seen.items():
            ignored = len(effects) == _LOOKS and max(effects) < NO_EFFECT
            if step >= _YOUNG and ignored and name not in self._told:
                self._told.add(name)
                lines.append(
                    f"step {step}: the {name} has no effect on the prediction: with the {name} of another sample the "
                    f"loss changes by {100 * effects[-1]:+.2f}%"
                )
        return found, lines

    def _loss(self, network: Any, items: Items) -> torch.Tensor:
        device = self._work.device
        # Gradients stay on: without them a compiled network would be compiled again.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            return self._work.losses(network, items).mean().detach()


def with_others(kind: Literal["labeled", "walks"], items: Items) -> dict[str, Items]:
    """`items` as a Family has them, once for each condition, which is that of the sample before; without those that
    are the same for all."""
    first, second, *rest = items
    if kind == "labeled":
        changed = {"label": (first, second.roll(1, 0))}
    else:
        context = first.shape[1] - second.shape[1]
        moved = torch.cat([first[:, :context].roll(1, 0), first[:, context:]], dim=1)
        changed = {"action": (first, second.roll(1, 0)), "context": (moved, second)}
    return {
        name: (a, b, *rest)
        for name, (a, b) in changed.items()
        if not (torch.equal(a, first) and torch.equal(b, second))
    }
