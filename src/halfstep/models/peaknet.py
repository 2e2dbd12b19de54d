"""PeakNet: a segmentation network that finds Bragg peaks on detector frames (Wang et al. 2023, arXiv:2303.15301, with a
ConvNeXt V2 backbone, Woo et al. 2023, arXiv:2301.00808, and a BiFPN, Tan et al. 2020, arXiv:1911.09070).

Axes: B frames, C channels, H W pixels, both divisible by 32. Modules have the published names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional

from halfstep.errors import InputError
from halfstep.models.published import read_published
from halfstep.models.weights import load_exactly

PATCH = 4
SMALLEST = 32  # pixels by which height and width can be divided
EPS = 1e-6  # of the norms
_FUSION_EPS = 1e-5
_GROUPS = 32
_LEVELS = (4, 5, 6, 7)  # of the pyramid, from 1/4 of the frame to 1/32


class PeakNet(nn.Module):
    """Frames [B, num_channels, H, W] to logits [B, num_classes, H, W]; with two classes a pixel is part of a peak where
    the second logit is larger.

    `backbone_hidden_sizes` and `backbone_depths`: of the four stages; `bifpn_num_blocks` of `bifpn_num_features`
    channels; `seg_out_channels`: of the head, a multiple of 32; `uses_learned_upsample` adds a transposed convolution
    to it. `image_size` is what it was trained on and changes nothing. Raises InputError for sizes that do not fit.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] = 512,
        backbone_hidden_sizes: Sequence[int] = (96, 192, 384, 768),
        backbone_depths: Sequence[int] = (3, 3, 9, 3),
        bifpn_num_blocks: int = 2,
        bifpn_num_features: int = 256,
        seg_out_channels: int = 256,
        uses_learned_upsample: bool = False,
        num_channels: int = 1,
        num_classes: int = 2,
    ) -> None:
        super().__init__()
        if len(backbone_hidden_sizes) != 4 or len(backbone_depths) != 4:
            raise InputError(
                f"PeakNet: got hidden sizes {list(backbone_hidden_sizes)} and depths {list(backbone_depths)}; expected "
                "four of each, one a stage"
            )
        if seg_out_channels % _GROUPS:
            raise InputError(f"PeakNet: got seg_out_channels {seg_out_channels}; expected a multiple of {_GROUPS}")
        self.image_size, self.num_classes = image_size, num_classes
        self.backbone = Backbone(num_channels, backbone_hidden_sizes, backbone_depths)
        features = bifpn_num_features
        self.backbone_to_bifpn = nn.ModuleList(nn.Conv2d(size, features, 1) for size in backbone_hidden_sizes)
        self.bifpn = BiFPN(bifpn_num_blocks, features)
        self.seg_lateral_layers = nn.ModuleList(
            Lateral(features, seg_out_channels, layers, upsample=stage > 0) for stage, layers in enumerate((1, 1, 2, 3))
        )
        self.head_segmask = nn.Conv2d(seg_out_channels, num_classes, 1)
        self.head_upsample_layer = (
            nn.Sequential(nn.ConvTranspose2d(seg_out_channels, num_classes, 6, stride=4, padding=1))
            if uses_learned_upsample
            else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        require_divisible(x)
        stages = self.backbone(x)
        levels = [adapter(stage) for adapter, stage in zip(self.backbone_to_bifpn, stages, strict=True)]
        levels = self.bifpn(levels)
        laterals = [lateral(level) for lateral, level in zip(self.seg_lateral_layers, levels, strict=True)]
        summed = laterals[3] + laterals[2] + laterals[1] + laterals[0]
        logits = resize(self.head_segmask(summed), PATCH)
        if self.head_upsample_layer is not None:
            logits = logits + self.head_upsample_layer(summed)
        return logits

    def fused(self) -> nn.Module:
        """The form for inference, which gives the difference of the two logits, to rounding. Folded in fp32, on the
        weights' device; cast it afterwards. Raises InputError for other than two classes."""
        from halfstep.models.peaknet_fused import FusedPeakNet

        return FusedPeakNet(self)

    @classmethod
    def load(cls, path: Path, **config: Any) -> Self:
        """The network with the weights of a file, in evaluation mode. Its sizes are those of the weights; `config` says
        what must agree with them. Raises InputError when the file is not there, is no such file, or does not fit."""
        if not path.exists():
            raise InputError(f"{path}: no such file; expected the weights of a PeakNet")
        state = read_published(path).weights
        found = config_of(state, path)
        for name, value in config.items():
            given = list(value) if isinstance(value, tuple) else value
            if name in found and found[name] != given:
                raise InputError(f"{path}: has {name} {found[name]}, the configuration says {given}")
        network = cls(**{**found, **config})
        load_exactly(network, state, path)
        return network.eval()


def config_of(state: Mapping[str, torch.Tensor], where: Path) -> dict[str, Any]:
    """The arguments that a state dict tells. Raises InputError when it is not a PeakNet's."""
    try:
        sizes = [len(state[f"backbone.hidden_states_norms.stage{stage}.weight"]) for stage in range(1, 5)]
        depths = [
            next(n for n in count() if f"backbone.encoder.stages.{stage}.layers.{n}.dwconv.weight" not in state)
            for stage in range(4)
        ]
        blocks = next(n for n in count() if f"bifpn.blocks.{n}.w_m" not in state)
        classes, out_channels = state["head_segmask.weight"].shape[:2]
        return {
            "backbone_hidden_sizes": sizes,
            "backbone_depths": depths,
            "bifpn_num_blocks": blocks,
            "bifpn_num_features": len(state["backbone_to_bifpn.0.weight"]),
            "seg_out_channels": int(out_channels),
            "uses_learned_upsample": "head_upsample_layer.0.weight" in state,
            "num_channels": int(state["backbone.embeddings.patch_embeddings.weight"].shape[1]),
            "num_classes": int(classes),
        }
    except KeyError as error:
        raise InputError(f"{where}: no weights of a PeakNet, {error} is missing; read another file") from error


def require_divisible(x: torch.Tensor) -> None:
    """Raise InputError unless frames [B, C, H, W] have sides that can be divided by 32."""
    if x.dim() != 4 or x.shape[-1] % SMALLEST or x.shape[-2] % SMALLEST:
        raise InputError(f"PeakNet: got frames {list(x.shape)}; expected [B, C, H, W], H and W divisible by {SMALLEST}")


def resize(x: torch.Tensor, factor: float) -> torch.Tensor:
    """Bilinear, in fp32 and back in the type of `x`."""
    scaled = functional.interpolate(x.float(), scale_factor=factor, mode="bilinear", align_corners=False)
    return scaled.to(x.dtype)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=EPS)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Backbone(nn.Module):
    """ConvNeXt V2: frames to the normalized outputs of its four stages."""

    def __init__(self, channels: int, sizes: Sequence[int], depths: Sequence[int]) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {"patch_embeddings": nn.Conv2d(channels, sizes[0], PATCH, stride=PATCH), "layernorm": ChannelNorm(sizes[0])}
        )
        self.encoder = nn.ModuleDict(
            {
                "stages": nn.ModuleList(
                    Stage(sizes[max(stage - 1, 0)], size, depth, downsample=stage > 0)
                    for stage, (size, depth) in enumerate(zip(sizes, depths, strict=True))
                )
            }
        )
        self.hidden_states_norms = nn.ModuleDict(
            {f"stage{stage}": ChannelNorm(size) for stage, size in enumerate(sizes, start=1)}
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = self.embeddings["layernorm"](self.embeddings["patch_embeddings"](x))
        outputs: list[torch.Tensor] = []
        stages: Any = self.encoder["stages"]
        for stage, norm in zip(stages, self.hidden_states_norms.values(), strict=True):
            x = stage(x)
            outputs.append(norm(x))
        return outputs


class Stage(nn.Module):
    """Halves the resolution, but for the first one, and goes through its blocks."""

    def __init__(self, before: int, channels: int, depth: int, *, downsample: bool) -> None:
        super().__init__()
        parts = [ChannelNorm(before), nn.Conv2d(before, channels, 2, stride=2)] if downsample else []
        self.downsampling_layer = nn.ModuleList(parts)
        self.layers = nn.Sequential(*(Block(channels) for _ in range(depth)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.downsampling_layer:
            x = part(x)
        result: torch.Tensor = self.layers(x)
        return result


class Block(nn.Module):
    """A ConvNeXt V2 block: depthwise convolution, norm, two layers with a response norm between."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.layernorm = nn.LayerNorm(channels, eps=EPS)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.grn = ResponseNorm(4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.layernorm(self.dwconv(x).permute(0, 2, 3, 1))
        inner = self.pwconv2(self.grn(functional.gelu(self.pwconv1(inner))))
        result: torch.Tensor = x + inner.permute(0, 3, 1, 2)
        return result


class ResponseNorm(nn.Module):
    """Global response normalization of [B, H, W, C] (arXiv:2301.00808, section 3.2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.bias = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.weight * (x * response(x)) + self.bias


def response(x: torch.Tensor) -> torch.Tensor:
    """Length of each channel of [B, H, W, C] over the mean of all: [B, 1, 1, C] of its type. Summed in fp32, because
    the sum of a frame's squares is beyond fp16 and more than bf16 can add up."""
    squares = x.float().square().sum(dim=(1, 2), keepdim=True)
    lengths = squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()  # the gradient of a root at zero is NaN
    return (lengths / (lengths.mean(dim=-1, keepdim=True) + EPS)).to(x.dtype)


class Separable(nn.Module):
    """A 1x1 convolution of each channel, then one over all."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise_conv = nn.Conv2d(channels, channels, 1, groups=channels, bias=False)
        self.pointwise_conv = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.pointwise_conv(self.depthwise_conv(x))
        return result


class BiFPN(nn.Module):
    """Blocks one after the other over the four levels, the finest first."""

    def __init__(self, blocks: int, channels: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FusionBlock(channels) for _ in range(blocks))

    def forward(self, levels: list[torch.Tensor]) -> list[torch.Tensor]:
        for block in self.blocks:
            levels = block(levels)
        return levels


class FusionBlock(nn.Module):
    """Once down the pyramid and once up: each level is the weighted sum of its neighbors, convolved, added to what it
    was. Rows of `w_m` belong to levels 6, 5, 4, those of `w_q` to 5, 6, 7; `w_q_mask` leaves one of them out."""

    w_q_mask: torch.Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.ModuleDict(
            {
                name: nn.Sequential(Separable(channels), ChannelNorm(channels), nn.GELU())
                for name in ("m4", "m5", "m6", "q5", "q6", "q7")
            }
        )
        self.w_m = nn.Parameter(torch.ones(3, 2))
        self.w_q = nn.Parameter(torch.ones(3, 3))
        mask = torch.ones(3, 3, dtype=torch.bool)
        mask[2, 0] = False  # level 7 is its own upper neighbor
        self.register_buffer("w_q_mask", mask)

    def shares(self) -> tuple[torch.Tensor, torch.Tensor]:
        """How much each of the summed levels counts: [3, 2] on the way down, [3, 3] on the way up."""
        down = self.w_m.relu()
        up = self.w_q.relu() * self.w_q_mask
        return tuple(w / (w.sum(dim=1, keepdim=True) + _FUSION_EPS) for w in (down, up))  # type: ignore[return-value]

    def forward(self, levels: list[torch.Tensor]) -> list[torch.Tensor]:
        p = dict(zip(_LEVELS, levels, strict=True))
        down, up = self.shares()
        m = {7: p[7]}
        for (own, above), level in zip(down, (6, 5, 4), strict=True):
            m[level] = p[level] + self.conv[f"m{level}"](own * p[level] + above * resize(m[level + 1], 2))
        q = {4: m[4]}
        for (own, middle, below), level in zip(up, (5, 6, 7), strict=True):
            mixed = own * p[level] + middle * m[level] + below * resize(q[level - 1], 0.5)
            q[level] = p[level] + self.conv[f"q{level}"](mixed)
        return [q[level] for level in _LEVELS]


class Lateral(nn.Module):
    """A level on its way to a quarter of the frame: 3x3 convolution, group norm and GELU, each doubled in size but for
    the finest level's."""

    def __init__(self, features: int, channels: int, layers: int, *, upsample: bool) -> None:
        super().__init__()
        self.upsample = upsample
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels if layer else features, channels, 3, padding=1),
                nn.GroupNorm(_GROUPS, channels),
                nn.GELU(),
            )
            for layer in range(layers)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
            if self.upsample:
                x = resize(x, 2)
        return x
