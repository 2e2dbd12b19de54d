"""What both transformers are made of (Peebles and Xie 2023, "Scalable Diffusion Models with Transformers"), and in part
the U-Nets.

Axes: N samples, L tokens, D width, h w tokens along height and width, p pixels of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint, noop_context_fn

from halfstep.errors import InputError

FREQUENCIES = 256  # numbers in the sinusoid of a scalar
_MAX_PERIOD = 10000.0


def token_grid(network: str, input_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Tokens along height and width of latents of `input_size`. Raises InputError when patches do not fill them."""
    height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
    if height % patch_size or width % patch_size:
        raise InputError(f"{network}: got latents of {height} x {width}; expected multiples of the patch, {patch_size}")
    return height // patch_size, width // patch_size


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [N, L, D] times 1 + scale [N, D], plus shift [N, D]."""
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))


def layer_norm(width: int) -> nn.LayerNorm:
    """Without weights of its own: what follows is modulated."""
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


def group_norm(channels: int) -> nn.GroupNorm:
    """With 16 channels to a group where they divide so (Wu and He 2018, arXiv 1803.08494). Its statistics are those of
    one sample, so it is the same at any batch, and torch sums them in fp32 for half inputs; its parameters are as many
    as those of a BatchNorm."""
    return nn.GroupNorm(math.gcd(channels, max(1, channels // 16)), channels)


class ScalarEmbedder(nn.Module):
    """A scalar a sample, as it is, to a vector: 256 sinusoids (cosines first) through two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """[N] to [N, D]. The sinusoids are fp32 whatever the weights: a half type cannot tell near times apart."""
        half = FREQUENCIES // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
        angles = t.float()[:, None] * torch.exp(-math.log(_MAX_PERIOD) * exponents)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1)
        embedded: torch.Tensor = self.mlp(waves.to(next(self.mlp.parameters()).dtype))
        return embedded


class PatchEmbedder(nn.Module):
    """Patches of p x p to tokens."""

    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch_size, patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] to [N, h w, D]."""
        tokens: torch.Tensor = self.proj(x)
        return tokens.flatten(2).transpose(1, 2)


class SelfAttention(nn.Module):
    """Multi-head attention of tokens to each other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        samples, tokens, width = x.shape
        qkv = self.qkv(x).reshape(samples, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*qkv.unbind(0))
        out: torch.Tensor = self.proj(mixed.transpose(1, 2).reshape(samples, tokens, width))
        return out


class Mlp(nn.Module):
    """Two layers, four times as wide between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))
        return out


def modulation(width: int, parts: int) -> nn.Sequential:
    """From the condition [N, D] to `parts` vectors in a row [N, parts D]; zero at first (adaLN-Zero)."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, parts * width))


def run_blocks(
    blocks: Iterable[nn.Module],
    recomputed: int,
    x: torch.Tensor,
    arguments: Iterable[tuple[torch.Tensor, ...]],
    contexts: Any = noop_context_fn,
) -> torch.Tensor:
    """x through `blocks`, each with its arguments; in training the first `recomputed` of them keep no activations but
    x and compute the others again (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost").
    `contexts`: as torch's `context_fn`, what stands around a block and around its recomputation."""
    for number, (block, more) in enumerate(zip(blocks, arguments, strict=True)):
        if number < recomputed and torch.is_grad_enabled():
            # Blocks draw nothing at random, so there is no generator to be set back.
            x = checkpoint(block, x, *more, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
        else:
            x = block(x, *more)
    return x


class FinalLayer(nn.Module):
    """Tokens to patches of `channels` numbers a pixel."""

    def __init__(self, width: int, patch_size: int, channels: int) -> None:
        super().__init__()
        self.norm_final = layer_norm(width)
        self.linear = nn.Linear(width, patch_size**2 * channels)
        self.adaLN_modulation = modulation(width, 2)

    def forward(self, x: torch.Tensor, modulations: torch.Tensor) -> torch.Tensor:
        """x [N, L, D], modulations [N, 2 D] to [N, L, p p C]."""
        shift, scale = modulations.chunk(2, dim=-1)
        out: torch.Tensor = self.linear(modulate(self.norm_final(x), shift, scale))
        return out


def unpatchify(tokens: torch.Tensor, grid: tuple[int, int], patch_size: int) -> torch.Tensor:
    """[N, h w, p p C] to [N, C, h p, w p]."""
    samples, _, numbers = tokens.shape
    channels = numbers // patch_size**2
    patches = tokens.reshape(samples, *grid, patch_size, patch_size, channels)
    height, width = (n * patch_size for n in grid)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(samples, channels, height, width)


def sincos(positions: np.ndarray, width: int) -> np.ndarray:
    """[n] positions to [n, width], sines first, in float64."""
    frequencies = 1 / _MAX_PERIOD ** (np.arange(width // 2, dtype=np.float64) / (width / 2))
    angles = np.outer(positions.astype(np.float64), frequencies)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def sincos_grid(grid: tuple[int, int], width: int) -> torch.Tensor:
    """Fixed position embedding [1, h w, D] in fp32; the first half of D encodes the column."""
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    halves = [sincos(columns.ravel(), width // 2), sincos(rows.ravel(), width // 2)]
    return torch.from_numpy(np.concatenate(halves, axis=1)).float().unsqueeze(0)


def initialize(module: nn.Module) -> None:
    """As published: linear layers Xavier-uniform with zero bias, patches as linear layers, scalars' layers N(0, 0.02),
    modulations and the last layer zero, so that a block is at first the identity and the network returns zero."""
    child: Any
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
            nn.init.zeros_(child.bias)
    for child in module.modules():
        if isinstance(child, PatchEmbedder):
            projection: Any = child.proj
            nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
            nn.init.zeros_(projection.bias)
        elif isinstance(child, ScalarEmbedder):
            layers: Any = child.mlp
            nn.init.normal_(layers[0].weight, std=0.02)
            nn.init.normal_(layers[2].weight, std=0.02)
        elif isinstance(child, FinalLayer):
            nn.init.zeros_(child.linear.weight)
        if hasattr(child, "adaLN_modulation"):
            nn.init.zeros_(child.adaLN_modulation[1].weight)
