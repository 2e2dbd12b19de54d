"""PeakNet for inference: rewritten so that the same comes out, to rounding, with less work.

- A 1x1 convolution of each channel and one over all are one. The weights of a sum of levels are constants.
- Of two classes only the difference of the logits is made. It is linear in what is doubled in size before it, so it is
  taken before; the transposed convolution too, as 36 channels that are folded into the frame in the end.
- Scale and shift of a norm go into the layer behind it. The bias of the response norm goes into the next layer's; its
  scale, which differs by frame, into that layer's weight.
- Halving a level bilinearly is the mean of two by two.

Axes: B frames, H W pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from halfstep.errors import InputError
from halfstep.models.peaknet import EPS, Block, FusionBlock, Lateral, PeakNet, Separable, require_divisible

_ROWS = 2048  # pixels whose squares are summed at once
_KERNEL, _STRIDE, _PADDING = 6, 4, 1  # of the transposed convolution


class FusedPeakNet(nn.Module):
    """Frames [B, C, H, W] to the margin [B, 1, H, W] by which a pixel is part of a peak: positive where it is. The
    weights are fp32; cast the module to a half type afterwards, and its sums over frames stay fp32."""

    bias: torch.Tensor

    def __init__(self, network: PeakNet) -> None:
        super().__init__()
        if network.num_classes != 2:
            raise InputError(f"fused: got {network.num_classes} classes; a margin is between two")
        backbone: Any = network.backbone
        self.stem = _conv(backbone.embeddings["patch_embeddings"])
        self.stem_norm = _norm(backbone.embeddings["layernorm"])
        self.downsampling = nn.ModuleList()
        self.stages = nn.ModuleList()
        for stage in backbone.encoder["stages"]:
            parts: Any = list(stage.downsampling_layer)
            self.downsampling.append(_behind_norm(*parts) if parts else nn.Identity())
            self.stages.append(nn.Sequential(*map(_FusedBlock, stage.layers)))
        norms, adapters, fusion, laterals = (
            list[Any](modules)
            for modules in (
                backbone.hidden_states_norms.values(),
                network.backbone_to_bifpn,
                network.bifpn.blocks,
                network.seg_lateral_layers,
            )
        )
        self.adapters = nn.ModuleList(map(_behind_norm, norms, adapters))
        self.fusion = nn.ModuleList(map(_FusedFusionBlock, fusion))
        margin, bias = _margin(network)
        self.laterals = nn.ModuleList(_FusedLateral(lateral, margin) for lateral in laterals)
        self.register_buffer("bias", bias)
        self.learned = network.head_upsample_layer is not None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        require_divisible(x)
        height, width = x.shape[-2:]
        x = _normalized(self.stem(x.to(memory_format=torch.channels_last)), self.stem_norm)
        levels: list[torch.Tensor] = []
        for downsample, stage, adapter in zip(self.downsampling, self.stages, self.adapters, strict=True):
            if levels:
                x = downsample(_normalized(x))
            x = stage(x)
            levels.append(adapter(_normalized(x)))
        for block in self.fusion:
            levels = block(levels)
        parts = [lateral(level) for lateral, level in zip(self.laterals, levels, strict=True)]
        summed = parts[3] + parts[2] + parts[1] + parts[0]
        margin = _resized(summed[:, :1], 4)
        if self.learned:
            columns = summed[:, 1:].flatten(2)
            margin = margin + functional.fold(columns, (height, width), _KERNEL, padding=_PADDING, stride=_STRIDE)
        return margin + self.bias


class _FusedBlock(nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        self.dwconv = _conv(block.dwconv)
        norm, first, second = block.layernorm, block.pwconv1, block.pwconv2
        self.pwconv1 = nn.Linear(first.in_features, first.out_features)
        self.pwconv1.weight.data = first.weight.data.float() * norm.weight.data.float()
        self.pwconv1.bias.data = first.bias.data.float() + first.weight.data.float() @ norm.bias.data.float()
        self.scale = nn.Parameter(block.grn.weight.data.float().flatten())
        self.weight = nn.Parameter(second.weight.data.float().clone())
        bias = second.bias.data.float() + second.weight.data.float() @ block.grn.bias.data.float().flatten()
        self.bias = nn.Parameter(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        inner = functional.layer_norm(self.dwconv(x).permute(0, 2, 3, 1), (channels,), eps=EPS)
        inner = functional.gelu(self.pwconv1(inner)).flatten(1, 2)  # [B, H W, 4 C]
        lengths = _lengths(inner)
        response = lengths / (lengths.mean(dim=-1, keepdim=True) + EPS)
        weight = self.weight * (1 + self.scale * response).to(self.weight.dtype)[:, None]  # [B, C, 4 C]
        mixed = torch.baddbmm(self.bias, inner, weight.transpose(1, 2))
        return x + mixed.reshape(batch, height, width, channels).permute(0, 3, 1, 2)


class _FusedFusionBlock(nn.Module):
    def __init__(self, block: FusionBlock) -> None:
        super().__init__()
        convs: dict[str, Any] = dict(block.conv.items())
        self.convs = nn.ModuleDict({name: _one_convolution(conv[0]) for name, conv in convs.items()})
        self.norms = nn.ModuleDict({name: _norm(conv[1]) for name, conv in convs.items()})
        with torch.no_grad():
            self.down, self.up = (share.float().tolist() for share in block.shares())

    def forward(self, levels: list[torch.Tensor]) -> list[torch.Tensor]:
        p4, p5, p6, p7 = levels
        p = {4: p4, 5: p5, 6: p6, 7: p7}
        m = {7: p7}
        for (own, above), level in zip(self.down, (6, 5, 4), strict=True):
            m[level] = p[level] + self._conv(f"m{level}", own * p[level] + above * _resized(m[level + 1], 2))
        q = {4: m[4]}
        for (own, middle, below), level in zip(self.up, (5, 6, 7), strict=True):
            mixed = middle * m[level] + below * functional.avg_pool2d(q[level - 1], 2)
            q[level] = p[level] + self._conv(f"q{level}", mixed + own * p[level] if own else mixed)
        return [q[level] for level in p]

    def _conv(self, name: str, x: torch.Tensor) -> torch.Tensor:
        norm: Any = self.norms[name]
        return functional.gelu(_normalized(self.convs[name](x), norm))


class _FusedLateral(nn.Module):
    def __init__(self, lateral: Lateral, margin: torch.Tensor) -> None:
        super().__init__()
        self.upsample = lateral.upsample
        layers: Any = lateral.layers
        self.convs = nn.ModuleList(_conv(layer[0]) for layer in layers)
        self.norms = nn.ModuleList()
        for layer in layers:
            norm = nn.GroupNorm(layer[1].num_groups, layer[1].num_channels, eps=layer[1].eps)
            norm.weight.data, norm.bias.data = layer[1].weight.data.float(), layer[1].bias.data.float()
            self.norms.append(norm)
        self.project = nn.Conv2d(margin.shape[1], margin.shape[0], 1, bias=False)
        self.project.weight.data = margin[:, :, None, None].clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        last = len(self.convs) - 1
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = functional.gelu(norm(conv(x)))
            if number == last:
                x = self.project(x)
            if self.upsample:
                x = _resized(x, 2)
        return x


def _conv(conv: Any) -> nn.Conv2d:
    """A copy in fp32."""
    copy = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        groups=conv.groups,
        bias=conv.bias is not None,
    )
    copy.load_state_dict({name: value.detach().float().clone() for name, value in conv.state_dict().items()})
    return copy


def _norm(norm: nn.LayerNorm) -> nn.LayerNorm:
    """A copy in fp32; used by `_normalized`."""
    copy = nn.LayerNorm(norm.normalized_shape, eps=norm.eps)
    copy.load_state_dict({name: value.detach().float().clone() for name, value in norm.state_dict().items()})
    return copy


def _lengths(x: torch.Tensor) -> torch.Tensor:
    """Of each channel of [B, H W, C], [B, C], summed in fp32; a part at a time, because an fp32 copy of all would
    be the largest thing that the network holds."""
    squares = [part.float().square().sum(dim=1) for part in torch.split(x, _ROWS, dim=1)]
    return torch.stack(squares).sum(dim=0).sqrt()


def _normalized(x: torch.Tensor, norm: nn.LayerNorm | None = None) -> torch.Tensor:
    """[B, C, H, W] normalized over its channels, without scale and shift where they went into what is behind."""
    weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
    return functional.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],), weight, bias, EPS).permute(0, 3, 1, 2)


def _behind_norm(norm: nn.LayerNorm, conv: nn.Conv2d) -> nn.Conv2d:
    """A convolution without padding that does the scale and shift of the norm before it."""
    copy, weight = _conv(conv), conv.weight.detach().float()
    copy.weight.data = weight * norm.weight.detach().float()[None, :, None, None]
    assert copy.bias is not None
    copy.bias.data += torch.einsum("oihw,i->o", weight, norm.bias.detach().float())
    return copy


def _one_convolution(separable: Separable) -> nn.Conv2d:
    """Both 1x1 convolutions as one."""
    over_all = separable.pointwise_conv.weight.detach().float()
    copy = nn.Conv2d(over_all.shape[1], over_all.shape[0], 1, bias=False)
    copy.weight.data = over_all * separable.depthwise_conv.weight.detach().float().reshape(1, -1, 1, 1)
    return copy


def _margin(network: PeakNet) -> tuple[torch.Tensor, torch.Tensor]:
    """What the difference of the two logits takes of each channel of the head, [1, C] or with the transposed
    convolution [1 + 36, C], and what is added in the end."""
    weight = network.head_segmask.weight.detach().float().flatten(1)
    assert network.head_segmask.bias is not None
    added = network.head_segmask.bias.detach().float()
    rows = weight[1:] - weight[:1]
    if network.head_upsample_layer is not None:
        transposed: Any = network.head_upsample_layer[0]
        kernel = transposed.weight.detach().float()  # [C, 2, 6, 6]
        rows = torch.cat([rows, (kernel[:, 1] - kernel[:, 0]).flatten(1).T])
        added = added + transposed.bias.detach().float()
    return rows, added[1] - added[0]


def _resized(x: torch.Tensor, factor: float) -> torch.Tensor:
    return functional.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
