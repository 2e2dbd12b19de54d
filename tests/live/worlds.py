"""Small worlds for tests, whose frames can be told beforehand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from halfstep.live import Action, FrameSpec, Made

HEIGHT, WIDTH = 8, 12
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Place:
    seed: int
    at: float = 0.0
    made: int = 0


class Slope(nn.Module):
    """Brightness from a place: a product, so that precision matters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1, 1), 0.1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class Corridor:
    """A walk along one line: a step forward is brighter by 0.1, a seed begins 0.01 higher each. Frame `broken` is not
    finite."""

    def __init__(self, broken: int | None = None) -> None:
        self.network, self.broken = Slope(), broken
        self.spec = FrameSpec(HEIGHT, WIDTH, takes_actions=True, takes_pictures=False)

    def begin(self, seed: int) -> Made:
        return Made(torch.full((3, HEIGHT, WIDTH), 0.01 * seed), Place(seed))

    def predict(self, network: Any, state: Place, given: Any, steps: int) -> Made:
        action = given if isinstance(given, Action) else Action()
        after = replace(state, at=state.at + action.forward, made=state.made + 1)
        value = network(torch.full((1, 1), after.at)).float()
        if after.made == self.broken:
            value = value * float("nan")
        return Made((value + 0.01 * state.seed).expand(3, HEIGHT, WIDTH), after)


class Mirror:
    """Shows the picture that is given, the other way round."""

    def __init__(self) -> None:
        self.network = nn.Identity()
        self.spec = FrameSpec(HEIGHT, WIDTH, takes_actions=False, takes_pictures=True, steps=(1, 2))

    def begin(self, seed: int) -> Made:
        return Made(torch.zeros(3, HEIGHT, WIDTH), 0)

    def predict(self, network: Any, state: int, given: Any, steps: int) -> Made:
        picture = given if isinstance(given, np.ndarray) else np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        pixels = torch.from_numpy(np.ascontiguousarray(picture[:, ::-1])).permute(2, 0, 1).float() / 127.5 - 1
        return Made(network(pixels), state + 1)
