"""What a model is asked on the way of true walks: the next frame at each place, and long walks of its own.

Axes: W walks, P places, N rows of a batch, K frames of context, C channels, h w latents, H W pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from halfstep.live.drift.truth import Truth
from halfstep.live.frames import Network
from halfstep.progress import SILENT, Progress
from halfstep.sampling.noise import own_generator


class Subject(Protocol):
    """A model of walks, as WalkModel is. network: what a precision applies to, in fp32."""

    network: Any

    def frames(
        self,
        network: Network,
        context: torch.Tensor,
        moved: npt.NDArray[np.float64],
        generators: Sequence[torch.Generator],
        steps: int,
    ) -> torch.Tensor:
        """The frames [N, C, h, w], fp32, after `context` [N, K, C, h, w] and steps `moved` [N, 3] in meters and
        radians."""

    def pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """What frames [N, C, h, w] show: [N, 3, H, W] in [-1, 1]."""


@dataclass(frozen=True)
class Course:
    """A subject beside true walks; all walks go through the network as one batch, in so many sampling `steps` a frame.
    The noise of a walk's frame is that of its number and the frame's, in every precision."""

    subject: Subject
    truth: Truth
    steps: int
    progress: Progress = SILENT

    def next_frames(
        self, network: Network, places: Sequence[int], *, context_later: int = 0, opposite: bool = False
    ) -> torch.Tensor:
        """Predictions [W, P, C, h, w] of the frames after the true contexts of `places`. `context_later`: from the
        contexts so many frames later, with the same noise and the same step; `opposite`: with the opposite step."""
        truth, made = self.truth, []
        for place in places:
            moved = truth.moved[:, place + truth.context_size - 1] * (-1 if opposite else 1)
            generators = [own_generator(walk, place) for walk in range(truth.walks)]
            context = truth.context(place + context_later)
            made.append(self.subject.frames(network, context, moved, generators, self.steps))
            self.progress.advance()
        return torch.stack(made, dim=1)

    def walk(
        self,
        network: Network,
        frames: int,
        *,
        walks: Sequence[int] | None = None,
        start: torch.Tensor | None = None,
        gain: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Walks [N, frames + 1, C, h, w] on the model's own frames, from the last frame of the first true context on.

        walks: the numbers of N walks, all of them by default; start [N, K, C, h, w]: their contexts, by default the
        true ones; gain [N]: what every frame is multiplied by.
        """
        truth = self.truth
        numbers = list(range(truth.walks) if walks is None else walks)
        context = truth.context(0)[numbers] if start is None else start
        path = [context[:, -1]]
        for number in range(frames):
            moved = truth.moved[numbers, number + truth.context_size - 1]
            generators = [own_generator(walk, number) for walk in numbers]
            frame = self.subject.frames(network, context, moved, generators, self.steps)
            frame = frame if gain is None else frame * gain.view(-1, 1, 1, 1)
            context = torch.cat([context[:, 1:], frame[:, None]], dim=1)
            path.append(frame)
            self.progress.advance()
        return torch.stack(path, dim=1)
