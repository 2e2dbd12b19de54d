"""Walking through a world model: keys become the actions that it was trained on.

Axes: N samples, K frames of context, C channels, h w latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from halfstep.autoencoders import Autoencoder
from halfstep.data.navigation import REL_T_FRAMES, to_actions
from halfstep.live.frames import Action, FrameSpec, Made, Network, Picture
from halfstep.models import Checkpoint, LiveStream
from halfstep.precision import PrecisionPolicy
from halfstep.sampling import Prediction, drive, sample_cdit, sample_livestream
from halfstep.sampling.noise import own_generator

TURN = 0.15  # radians a frame of a key that is held, as in the toy world


@dataclass(frozen=True)
class Walk:
    """Where a walk is: its last frames [1, K, C, h, w], fp32, and how many were made since its seed."""

    context: torch.Tensor
    seed: int
    number: int = 0


class WalkModel:
    """A network that predicts the next frame of a walk from the last ones and an action. `starts` [S, K, C, h, w] are
    the contexts that walks begin with, by seed; a key held for a frame goes `step` meters, or turns `turn` radians.
    Noise depends on seed and frame alone."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        autoencoder: Autoencoder,
        starts: torch.Tensor,
        device: torch.device,
        *,
        step: float,
        turn: float = TURN,
        spacing: float,
    ) -> None:
        self.network: Any = checkpoint.build().to(device)
        self._device, self._starts = device, starts
        self._autoencoder = autoencoder.prepared(device, PrecisionPolicy())
        self._reach = np.array([step, step, turn])
        self._spacing = spacing
        height, width = (side * autoencoder.spec.spatial_factor for side in starts.shape[-2:])
        self.spec = FrameSpec(height, width, takes_actions=True, takes_pictures=False)

    def begin(self, seed: int) -> Made:
        context = self._starts[seed % len(self._starts)][None].float().to(self._device)
        return Made(self.pixels(context[:, -1])[0], Walk(context, seed))

    def predict(self, network: Network, state: Walk, given: Action | Picture | None, steps: int) -> Made:
        action = given if isinstance(given, Action) else Action()
        moved = self._reach * (action.forward, action.left, action.turn)
        generators = [own_generator(state.seed, state.number)]
        latent = self.frames(network, state.context, moved[None], generators, steps)
        context = torch.cat([state.context[:, 1:], latent[:, None]], dim=1)
        return Made(self.pixels(latent)[0], replace(state, context=context, number=state.number + 1))

    def frames(
        self,
        network: Network,
        context: torch.Tensor,
        moved: npt.NDArray[np.float64],
        generators: Sequence[torch.Generator],
        steps: int,
    ) -> torch.Tensor:
        """The frames [N, C, h, w] after `context` [N, K, C, h, w] and steps `moved` [N, 3] in meters and radians, in so
        many sampling steps; the noise of each is of its own generator."""
        actions = torch.from_numpy(to_actions(moved, self._spacing)).float().to(self._device)
        offset = torch.full((len(context),), 1 / REL_T_FRAMES, device=self._device)
        prediction = Prediction(self.network, context, actions, offset, network=network)
        if isinstance(self.network, LiveStream):
            return drive(sample_livestream(prediction, steps=steps, generators=generators))
        return drive(sample_cdit(prediction, scheduler="dpm++", steps=steps, generators=generators))

    def pixels(self, latents: torch.Tensor) -> torch.Tensor:
        """What frames [N, C, h, w] show: [N, 3, H, W] in [-1, 1], not clamped."""
        return self._autoencoder.decode(self._autoencoder.unscaled(latents))
