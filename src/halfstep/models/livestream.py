"""livestream: the next frame of a walk from the frames before it and an action, in a few steps. A U-Net with context
frames by channel, as DIAMOND (Alonso et al. 2024, arXiv 2405.12399); training noises them, so that a stream survives
its own faults (Valevski et al. 2024, arXiv 2408.14837, section 3.2.1). Preconditioned as EDM (Karras et al. 2022, arXiv
2206.00364).

Axes: N samples, C channels, K context frames, H W latents or pixels, D width of the condition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from halfstep.errors import InputError
from halfstep.models.family import Family, Items, Network, Objective
from halfstep.models.layers import SelfAttention, group_norm, run_blocks
from halfstep.models.objectives import EDM_SIGMA_DATA, edm_denoised, edm_loss, with_history_noise

# Depth (levels, each half the size of the one before), width (channels of the first level), heads.
LIVESTREAM_SIZES = {"S": (3, 32, 4), "M": (3, 64, 4), "L": (4, 96, 8)}
HISTORY_NOISE = 0.7  # at most, of the training, as published by Valevski et al. 2024 (arXiv 2408.14837)
_NUMBERS = 5  # that a sample is told: its noise, that of its context, and three of an action
_OCTAVES = 6
_MOST = 4  # times the first level's channels has no level more


class LiveStream(Network):
    """Denoises a frame: what F is in `edm_denoised`, given K context frames, how noisy they are, and an action.

    input_size: H and W of the latents, or one number for both, which need not divide by anything; context_size: frames
    of context; depth: levels; hidden_size: channels of the first, the next has twice as many, all others four times;
    num_heads: of the attention in the last. sigma_data: the deviation of the latents. Raises InputError when sizes do
    not divide.
    """

    # What the network is told is small numbers apart, of which a half type has too few digits.
    keep_in_fp32 = ("condition",)
    guidable = False

    def __init__(
        self,
        input_size: int | tuple[int, int],
        context_size: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        in_channels: int = 3,
        sigma_data: float = EDM_SIGMA_DATA,
    ) -> None:
        super().__init__()
        widths = [hidden_size * min(2**level, _MOST) for level in range(depth)]
        if widths[-1] % num_heads:
            raise InputError(f"livestream: got {num_heads} heads; expected a divisor of the last level's {widths[-1]}")
        size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
        self.context_size, self.in_channels, self.sigma_data = context_size, in_channels, sigma_data
        self.config: dict[str, Any] = {
            "input_size": size,
            "context_size": context_size,
            "hidden_size": hidden_size,
            "depth": depth,
            "num_heads": num_heads,
            "in_channels": in_channels,
            "sigma_data": sigma_data,
        }
        told = 4 * hidden_size
        self.condition = Condition(told)
        self.enter = nn.Conv2d((context_size + 1) * in_channels, hidden_size, 3, padding=1)
        down = [Block(before, after, told) for before, after in zip([hidden_size, *widths], widths, strict=False)]
        middle = Block(widths[-1], widths[-1], told, num_heads)
        up = [Block(2 * width, width, told) for width in reversed(widths)]
        self.blocks = nn.ModuleList([*down, middle, *up])
        self.shrink = nn.ModuleList(nn.Conv2d(width, width, 3, stride=2, padding=1) for width in widths[:-1])
        self.grow = nn.ModuleList(nn.Conv2d(below, width, 3, padding=1) for below, width in pairwise(reversed(widths)))
        self.norm_final = group_norm(hidden_size)
        self.leave = nn.Conv2d(hidden_size, in_channels, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]

    @classmethod
    def named(cls, name: str, input_size: int | tuple[int, int], context_size: int, **options: Any) -> LiveStream:
        """The size `livestream-{S,M,L}`."""
        return cls(input_size, context_size, **FAMILY.named(name), **options)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one frame: (C, H, W)."""
        return (self.in_channels, *self.config["input_size"])

    def forward(
        self,
        x: torch.Tensor,
        noise: torch.Tensor,
        actions: torch.Tensor,
        context: torch.Tensor,
        history: torch.Tensor,
    ) -> torch.Tensor:
        """[N, C, H, W] of variance 1 from the scaled x [N, C, H, W], told its `noise` [N], the actions [N, 3] (forward,
        left, turn), the scaled context [N, K, C, H, W], and the noise that was added to it, `history` [N]. `denoised`
        calls it with all of these."""
        frame = self.latent_shape
        if tuple(x.shape[1:]) != frame or tuple(context.shape[1:]) != (self.context_size, *frame):
            raise InputError(
                f"livestream: got latents {list(x.shape[1:])} and context {list(context.shape[1:])}; expected "
                f"{list(frame)} and {[self.context_size, *frame]}"
            )
        told = self.condition(noise, history, actions)
        x = self.enter(torch.cat([x, context.flatten(1, 2).to(x.dtype)], dim=1))
        levels, skips = len(self.shrink) + 1, []
        for level in range(levels):
            x = self._block(level, self.shrink[level - 1](x) if level else x, told)
            skips.append(x)
        x = self._block(levels, x, told)
        for level in range(levels):
            skip = skips.pop()
            if level:
                # To the size of the skip: an odd one was rounded up when it was halved.
                x = self.grow[level - 1](functional.interpolate(x, size=skip.shape[2:], mode="nearest"))
            x = self._block(levels + 1 + level, torch.cat([x, skip], dim=1), told)
        result: torch.Tensor = self.leave(functional.silu(self.norm_final(x)))
        return result

    def _block(self, number: int, x: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        return run_blocks([self.blocks[number]], self.recomputed_blocks - number, x, [(told,)])


class Condition(nn.Module):
    """What a sample is told, to [N, D]: sinusoids of all its numbers, periods 8 to 1/4, through two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * _OCTAVES * _NUMBERS, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )

    def forward(self, noise: torch.Tensor, history: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """noise [N], history [N], actions [N, 3]."""
        numbers = torch.cat([noise.float()[:, None], history.float()[:, None], actions.float()], dim=1)
        octaves = torch.arange(-2, _OCTAVES - 2, dtype=torch.float32, device=numbers.device)
        angles = (math.pi * numbers[:, :, None] * 2**octaves).flatten(1)
        embedded: torch.Tensor = self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))
        return embedded


class Block(nn.Module):
    """A residual block whose second norm is scaled and shifted by the condition (Dhariwal and Nichol 2021, section
    3.1); with heads, attention after it. At first it is the identity, but for a change of channels."""

    def __init__(self, before: int, channels: int, told: int, heads: int = 0) -> None:
        super().__init__()
        self.norm1 = group_norm(before)
        self.conv1 = nn.Conv2d(before, channels, 3, padding=1)
        self.modulation = nn.Linear(told, 2 * channels)
        self.norm2 = group_norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.skip = nn.Conv2d(before, channels, 1) if before != channels else nn.Identity()
        self.attention = Attention(channels, heads) if heads else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        shift, scale = self.modulation(told)[:, :, None, None].chunk(2, dim=1)
        inner = self.conv1(functional.silu(self.norm1(x)))
        inner = self.conv2(functional.silu(torch.addcmul(shift, self.norm2(inner), 1 + scale)))
        out: torch.Tensor = self.attention(self.skip(x) + inner)
        return out


class Attention(nn.Module):
    """x [N, C, H, W] and what its pixels say to each other."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.attention = SelfAttention(channels, heads)
        nn.init.zeros_(self.attention.proj.weight)
        nn.init.zeros_(self.attention.proj.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = self.attention(self.norm(x).flatten(2).transpose(1, 2))
        return x + mixed.transpose(1, 2).reshape(x.shape)


def denoised(
    network: Callable[..., torch.Tensor],
    x: torch.Tensor,
    sigma: torch.Tensor,
    actions: torch.Tensor,
    context: torch.Tensor,
    sigma_data: float,
) -> torch.Tensor:
    """The frames [N, C, H, W], fp32, that x of noise levels sigma [N] are thought to be by a LiveStream, after actions
    [N, 3] from context [N, K, C, H, W], which is taken for clean."""
    history = torch.zeros(len(x), device=x.device)
    return edm_denoised(network, x, sigma, sigma_data, actions, *_told_history(context, history, sigma_data))


def _told_history(context: torch.Tensor, history: torch.Tensor, sigma_data: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Context [N, K, C, H, W] with noise of the levels `history` [N] in it, in units of sigma_data, as the network
    takes it: scaled to variance 1, fp32, and the levels."""
    variance = sigma_data**2 * (1 + history**2)
    return context.float() / variance.sqrt().reshape(-1, 1, 1, 1, 1), history


def _objective(settings: Mapping[str, Any]) -> Objective:
    context_size, sigma_data, most = settings["context_size"], settings["sigma_data"], settings["history_noise"]
    most = HISTORY_NOISE if most is None else most

    def losses(network: Any, items: Items) -> torch.Tensor:
        frames, actions, _ = items
        context, goals = frames.float().tensor_split([context_size], dim=1)
        context = context.repeat_interleave(goals.shape[1], dim=0)
        context, history = with_history_noise(context, most, sigma_data)
        given = actions.flatten(0, 1), *_told_history(context, history, sigma_data)
        return edm_loss(network, goals.flatten(0, 1), *given, sigma_data=sigma_data)

    return losses


def _example(network: LiveStream) -> Items:
    frame, one = torch.empty(1, *network.latent_shape), torch.empty(1)
    return frame, one, torch.empty(1, 3), torch.empty(1, network.context_size, *network.latent_shape), one


FAMILY = Family(
    name="livestream",
    build=LiveStream,
    sizes=LIVESTREAM_SIZES,
    patches=(),
    items="walks",
    settings=("context_size", "metric_waypoint_spacing", "datasets", "history_noise", "sigma_data"),
    learning_rate=3e-4,
    clip_norm=1.0,
    batch=lambda processes: 32 * processes,
    arguments=lambda settings, latent_shape, classes: {name: settings[name] for name in ("context_size", "sigma_data")},
    objective=_objective,
    example=_example,
    read=lambda state: None,  # nobody has published one
    silent={},
    samplers=("euler",),
    steps=3,
    next_frame=True,
)
