"""livestream-load: the network behind published frame rates of live streams, as a load to measure. It is not a model to
train: the norm and SiLU at its end give nothing below -0.278, so neither noise nor an image; and it is no diffusion
model, as only the first U-Net sees the time. To train one, take `livestream`.

What differs from the network that was published changes neither parameters nor products: GroupNorm in place of a
BatchNorm, which is not right for one sample, whose running statistics are a state, and which sums over the batch;
attention in one kernel, with heads of 64 numbers in place of 16 heads, 12 of whose sizes no tensor core takes; and no
dropout, which does nothing outside of training.

Axes: N samples, C channels, H W pixels, both divisible by 16, L tokens.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from halfstep.errors import InputError
from halfstep.models.layers import Mlp, SelfAttention, group_norm

LOAD = "livestream-load"
LOAD_WIDTHS = (96, 128, 192, 256)  # those published: 220M, 391M, 880M and 1565M parameters
SIDE = 64  # pixels of a frame
_CHANNELS = 3
_TIMESTEPS = 1000
_HEAD = 64  # numbers of a head, or as many as divide the channels
_SMALLEST = 16  # pixels by which height and width can be divided


def is_load(name: str) -> bool:
    """Whether `name` is that of a load, `livestream-load-192`, or meant to be one."""
    return name.startswith(LOAD)


class LiveStreamLoad(nn.Module):
    """A frame [N, 3, H, W] from a noised one, a timestep [N] of 1000 and the frame before: two U-Nets and a temporal
    stage, the first of base `width`, the second of half that. Raises InputError for an odd width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        if width < 2 or width % 2:
            raise InputError(f"{LOAD}: got a width of {width}; expected an even number, as {LOAD_WIDTHS[2]}")
        self.first = UNet(_CHANNELS + 1, width)
        self.second = UNet(_CHANNELS, width // 2)
        self.temporal = nn.Sequential(Heavy(2 * _CHANNELS, width), Attention(width), Heavy(width, _CHANNELS))

    @classmethod
    def named(cls, name: str) -> LiveStreamLoad:
        """That of a published width, `livestream-load-192`. Raises InputError for another name."""
        names = {f"{LOAD}-{width}": width for width in LOAD_WIDTHS}
        if name not in names:
            raise InputError(f"model: got {name!r}; expected one of {', '.join(names)}")
        return cls(names[name])

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, previous_frame: torch.Tensor) -> torch.Tensor:
        if x.dim() != 4 or x.shape[1] != _CHANNELS or x.shape[2] % _SMALLEST or x.shape[3] % _SMALLEST:
            raise InputError(
                f"{LOAD}: got frames {list(x.shape)}; expected [N, {_CHANNELS}, H, W], H and W divisible by {_SMALLEST}"
            )
        plane = (timestep / _TIMESTEPS).to(x.dtype).reshape(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        frame = self.second(self.first(torch.cat([x, plane], dim=1)))
        result: torch.Tensor = self.temporal(torch.cat([frame, previous_frame], dim=1))
        return result


def load_inputs(batch: int = 1) -> tuple[torch.Tensor, ...]:
    """The arguments of a call, whose values are what memory held."""
    frame = torch.empty(batch, _CHANNELS, SIDE, SIDE)
    return frame, torch.empty(batch), torch.empty_like(frame)


class UNet(nn.Module):
    """[N, C, H, W] to [N, 3, H, W]: four levels of `width` to 8 `width` channels, max pooling between them, a
    bottleneck of 16 `width` at a sixteenth of the size, and back up with bilinear upsampling."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        levels = [width * 2**level for level in range(4)]
        widths = [channels, *levels]
        self.down = nn.ModuleList(
            nn.Sequential(Heavy(before, after), *([Attention(after)] if level else []))
            for level, (before, after) in enumerate(zip(widths, levels, strict=False))
        )
        deepest = 2 * levels[-1]
        self.bottleneck = nn.Sequential(Heavy(levels[-1], deepest), Attention(deepest), Heavy(deepest, levels[-1]))
        after = [*levels[2::-1], width]  # of the decoder, the deepest first
        self.up = nn.ModuleList(Heavy(2 * skip, out) for skip, out in zip(reversed(levels), after, strict=True))
        self.out = nn.Conv2d(width, _CHANNELS, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for level in self.down:
            x = level(x)
            skips.append(x)
            x = functional.max_pool2d(x, 2)
        x = self.bottleneck(x)
        for level in self.up:
            x = functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = level(torch.cat([x, skips.pop()], dim=1))
        result: torch.Tensor = self.out(x)
        return result


class Heavy(nn.Sequential):
    """Four times a 3x3 convolution, norm and SiLU."""

    def __init__(self, before: int, after: int) -> None:
        widths = [before, after, after, after]
        super().__init__(
            *(
                part
                for width in widths
                for part in (nn.Conv2d(width, after, 3, padding=1), group_norm(after), nn.SiLU(inplace=True))
            )
        )


class Attention(nn.Module):
    """Attention of all pixels to each other, and an MLP, each with a norm before it. Without positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attention = SelfAttention(channels, channels // math.gcd(channels, _HEAD))
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens: torch.Tensor = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(self.norm1(tokens))
        tokens = tokens + self.mlp(self.norm2(tokens))
        return tokens.transpose(1, 2).reshape(x.shape)
