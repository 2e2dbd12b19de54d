"""What a live model is: pictures that follow from pictures, from actions, or from both.

Axes: H height and W width of a picture, C channels, h w latents, K frames of context.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

Picture = npt.NDArray[np.uint8]  # [H, W, 3]
Network = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Action:
    """What a player does in one frame: `forward`, `left` and `turn` (to the left), from -1 to 1 each."""

    forward: float = 0.0
    left: float = 0.0
    turn: float = 0.0


STILL = Action()


@dataclass(frozen=True)
class FrameSpec:
    """`height` and `width` of the pictures; whether a frame follows from an `action`, and from a `picture` that is
    given; `steps`: the fewest and the most of a frame's sampling steps."""

    height: int
    width: int
    takes_actions: bool
    takes_pictures: bool
    steps: tuple[int, int] = (1, 8)


@dataclass(frozen=True)
class Made:
    """A frame: `pixels` [3, H, W] in [-1, 1], fp32, on the model's device, and the `state` that the next one follows
    from."""

    pixels: torch.Tensor
    state: Any


class FrameModel(Protocol):
    """Makes one frame after another. It keeps nothing between calls: what a frame depends on is in the state, whose
    tensors are fp32 whatever the network computes in. So the same state makes the same frame in another precision.

    network: what a precision applies to, in fp32; `predict` is given it, or a copy in another precision.
    """

    spec: FrameSpec
    network: nn.Module

    def begin(self, seed: int) -> Made:
        """The first frame, the same for the same seed."""

    def predict(self, network: Network, state: Any, given: Action | Picture | None, steps: int) -> Made:
        """The frame after `state`, in so many sampling steps, with what is given for it: an action, or a picture of the
        spec's size. None: nothing moves, or nothing new was seen."""
