"""What everyone else must know of a kind of network: one `Family` each, made in the network's own file.

Axes: B items, K context frames, G goals, C channels, T frames, H W latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from halfstep.errors import InputError

StateDict = dict[str, torch.Tensor]
Items = tuple[torch.Tensor, ...]

# The loss [samples] of a network, or of what stands before it, for items of its data.
Objective = Callable[[Any, Items], torch.Tensor]


class Network(nn.Module):
    """Base of the networks over latents, which load the published state dicts as they are.

    config: its arguments. blocks: what a distributed wrapper shards, and activations are recomputed by;
    recomputed_blocks: of the first so many the activations are computed again in the backward pass. keep_in_fp32:
    submodules, parameters and buffers that are not half in any policy.
    """

    keep_in_fp32: ClassVar[tuple[str, ...]] = ()
    recomputed_blocks = 0

    config: dict[str, Any]
    in_channels: int
    blocks: nn.ModuleList

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one sample: (C, H, W), or (C, T, H, W)."""
        raise TypeError(f"{type(self).__name__}: says no latent_shape")


@dataclass(frozen=True)
class Family:
    """A kind of network.

    build: the class. sizes: published depth, width and heads by name; patches: the published patch sizes, none of a
        network without patches.
    items: what it is trained on, "labeled": (latents [B, C, (T,) H, W], labels [B]), or "walks": (frames
        [B, K + G, C, H, W], actions [B, G, 3], rel_t [B, G]).
    settings: the settings of a training that not all families have.
    learning_rate, clip_norm, batch: as published, the last by the number of processes.
    arguments: from those settings, the shape of a latent and the number of classes to the network's own arguments.
    objective: from those settings to what is minimized.
    example: the inputs of one sample.
    read: the arguments that a published state dict tells, None when it is another family's; `silent` are those that it
        cannot tell, with their defaults.
    next_frame: of walks it learns the next frame alone, not goals far away.
    samplers: by name, the default first; steps: of a sampler where nobody says how many.
    """

    name: str
    build: Callable[..., Network]
    sizes: Mapping[str, tuple[int, int, int]]
    patches: tuple[int, ...]
    items: Literal["labeled", "walks"]
    settings: tuple[str, ...]
    learning_rate: float
    clip_norm: float
    batch: Callable[[int], int]
    arguments: Callable[[Mapping[str, Any], tuple[int, ...], int], dict[str, Any]]
    objective: Callable[[Mapping[str, Any]], Objective]
    example: Callable[[Any], Items]
    read: Callable[[StateDict], dict[str, Any] | None]
    silent: Mapping[str, Any]
    samplers: tuple[str, ...]
    steps: int
    next_frame: bool = False

    def named(self, name: str) -> dict[str, Any]:
        """Depth, width, heads and the patch size, where it has one, of a published name, `EqM-S/2`. Raises InputError
        for another."""
        family, _, rest = name.partition("-")
        size, _, patch = rest.partition("/")
        patches = [str(patch) for patch in self.patches] or [""]
        if family != self.name or size not in self.sizes or patch not in patches:
            choices = f"{{{','.join(patches)}}}" if len(patches) > 1 else patches[0]
            expected = f"{self.name}-{{{','.join(self.sizes)}}}/{choices}".rstrip("/")
            raise InputError(f"model: got {name!r}; expected {expected}")
        depth, width, heads = self.sizes[size]
        patched = {"patch_size": int(patch)} if patch else {}
        return {"depth": depth, "hidden_size": width, "num_heads": heads, **patched}
