"""CDiT: a diffusion transformer that attends to context frames (Navigation World Models, arXiv 2412.03572).

Axes: N samples, C channels, K context frames, H W latents, L tokens of a frame, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import repeat
from typing import Any, Literal

import torch
from torch import nn

from halfstep.errors import InputError
from halfstep.models.family import Family, Items, Network, Objective, StateDict
from halfstep.models.layers import (
    FinalLayer,
    Mlp,
    PatchEmbedder,
    ScalarEmbedder,
    SelfAttention,
    initialize,
    layer_norm,
    modulate,
    modulation,
    run_blocks,
    sincos_grid,
    token_grid,
    unpatchify,
)
from halfstep.models.objectives import Predicted, diffusion_loss, with_history_noise

Positions = Literal["random", "sinusoidal"]

# The published sizes: depth, width, heads. A name is CDiT-<size>/2.
CDIT_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}


class ActionEmbedder(nn.Module):
    """Actions [N, 3] (forward, left, turn) to [N, D], a third of D each. The published sinusoids are made for timesteps
    up to 1000: actions near 1 hardly move them, `scale` times as large ones do. In training a share `dropout` of the
    samples has no action, which is zero in the embedding."""

    def __init__(self, width: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.scale, self.dropout = scale, dropout
        third = width // 3
        self.x_emb = ScalarEmbedder(third)
        self.y_emb = ScalarEmbedder(third)
        self.angle_emb = ScalarEmbedder(width - 2 * third)

    def forward(self, actions: torch.Tensor, known: torch.Tensor | None = None) -> torch.Tensor:
        """`known` [N]: which samples have an action; by default all, or in training what is drawn."""
        scaled = actions.float() * self.scale
        embedded = torch.cat([self.x_emb(scaled[:, 0]), self.y_emb(scaled[:, 1]), self.angle_emb(scaled[:, 2])], dim=-1)
        if known is None and self.training and self.dropout > 0:
            known = torch.rand(len(actions), device=actions.device) >= self.dropout
        return embedded if known is None else torch.where(known[:, None], embedded, 0)


class CDiTBlock(nn.Module):
    """Self-attention, attention to the context, MLP; all modulated and gated by the condition."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = layer_norm(width)
        self.attn = SelfAttention(width, heads)
        self.norm2 = layer_norm(width)
        self.norm_cond = layer_norm(width)
        self.cttn = nn.MultiheadAttention(width, heads, add_bias_kv=True, batch_first=True)
        self.norm3 = layer_norm(width)
        self.mlp = Mlp(width)
        self.adaLN_modulation = modulation(width, 11)

    def forward(self, x: torch.Tensor, condition: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """x [N, L, D], condition [N, D], context [N, K L, D]."""
        parts = self.adaLN_modulation(condition).chunk(11, dim=-1)
        shift_a, scale_a, gate_a, shift_k, scale_k, shift_q, scale_q, gate_c, shift_m, scale_m, gate_m = parts
        x = torch.addcmul(x, gate_a.unsqueeze(1), self.attn(modulate(self.norm1(x), shift_a, scale_a)))
        keys = modulate(self.norm_cond(context), shift_k, scale_k)
        query = modulate(self.norm2(x), shift_q, scale_q)
        x = torch.addcmul(x, gate_c.unsqueeze(1), self.cttn(query, keys, keys, need_weights=False)[0])
        return torch.addcmul(x, gate_m.unsqueeze(1), self.mlp(modulate(self.norm3(x), shift_m, scale_m)))


class CDiT(Network):
    """Predicts the noise and the learned variance of a frame from context frames, an action and a time offset.

    input_size: H and W of the latents, or one number for both; context_size: frames of context. predicted: "velocity"
    in place of the noise, see `diffusion_loss`. action_scale, action_dropout: see ActionEmbedder. positions: what their
    embeddings are before they are trained, "random" and small, or the "sinusoidal" ones of other transformers, by which
    a token finds its place in the context from the start. The defaults are as published, as are the names in state
    dicts. Raises InputError when sizes do not divide.
    """

    # Sinusoids of a time need all its digits.
    keep_in_fp32 = ("t_embedder", "time_embedder")

    def __init__(
        self,
        input_size: int | tuple[int, int],
        context_size: int,
        patch_size: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        in_channels: int = 4,
        predicted: Predicted = "noise",
        action_scale: float = 1.0,
        action_dropout: float = 0.0,
        positions: Positions = "random",
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise InputError(f"CDiT: got a width of {hidden_size}; expected a multiple of {num_heads} heads")
        if positions == "sinusoidal" and hidden_size % 4:
            raise InputError(f"CDiT: got a width of {hidden_size}; sinusoidal positions need a multiple of 4")
        if hidden_size < 6:
            raise InputError(f"CDiT: got a width of {hidden_size}; the three parts of an action need 6 or more")
        self.grid = token_grid("CDiT", input_size, patch_size)
        self.patch_size, self.context_size, self.in_channels = patch_size, context_size, in_channels
        self.predicted, self.guidable = predicted, action_dropout > 0
        self.config: dict[str, Any] = {
            "input_size": (self.grid[0] * patch_size, self.grid[1] * patch_size),
            "context_size": context_size,
            "patch_size": patch_size,
            "hidden_size": hidden_size,
            "depth": depth,
            "num_heads": num_heads,
            "in_channels": in_channels,
            "predicted": predicted,
            "action_scale": action_scale,
            "action_dropout": action_dropout,
            "positions": positions,
        }
        self.x_embedder = PatchEmbedder(in_channels, hidden_size, patch_size)
        self.t_embedder = ScalarEmbedder(hidden_size)
        self.time_embedder = ScalarEmbedder(hidden_size)
        self.y_embedder = ActionEmbedder(hidden_size, action_scale, action_dropout)
        tokens = self.grid[0] * self.grid[1]
        self.pos_embed = nn.Parameter(torch.zeros(context_size + 1, tokens, hidden_size))
        self.blocks = nn.ModuleList(CDiTBlock(hidden_size, num_heads) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, 2 * in_channels)
        initialize(self)
        nn.init.normal_(self.pos_embed, std=0.02)
        if positions == "sinusoidal":
            with torch.no_grad():
                self.pos_embed.add_(sincos_grid(self.grid, hidden_size))

    @classmethod
    def named(cls, name: str, input_size: int | tuple[int, int], context_size: int, **options: Any) -> CDiT:
        """The published size `CDiT-{S,B,L,XL}/2`."""
        return cls(input_size, context_size, **FAMILY.named(name), **options)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one frame: (C, H, W)."""
        return (self.in_channels, *self.config["input_size"])

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor,
        x_cond: torch.Tensor,
        rel_t: torch.Tensor,
        known: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Noise or velocity, and variance, [N, 2 C, H, W], for the noised frame x [N, C, H, W] at diffusion timestep
        t [N], the action y [N, 3], context x_cond [N, K, C, H, W] and the time offset rel_t [N] in units of 128 frames;
        `known` [N] says which actions are known."""
        frame = self.latent_shape
        if tuple(x.shape[1:]) != frame or tuple(x_cond.shape[1:]) != (self.context_size, *frame):
            raise InputError(
                f"CDiT: got latents {list(x.shape[1:])} and context {list(x_cond.shape[1:])}; expected {list(frame)} "
                f"and {[self.context_size, *frame]}"
            )
        tokens = self.x_embedder(x) + self.pos_embed[self.context_size :]
        context = self.x_embedder(x_cond.flatten(0, 1)).unflatten(0, x_cond.shape[:2])
        context = (context + self.pos_embed[: self.context_size]).flatten(1, 2).to(x.dtype)
        condition = self.t_embedder(t) + self.time_embedder(rel_t) + self.y_embedder(y)
        arguments = repeat((condition, context), len(self.blocks))
        tokens = run_blocks(self.blocks, self.recomputed_blocks, tokens.to(x.dtype), arguments)
        tokens = self.final_layer(tokens, self.final_layer.adaLN_modulation(condition))
        return unpatchify(tokens, self.grid, self.patch_size)


def _objective(settings: Mapping[str, Any]) -> Objective:
    context_size, history_noise = settings["context_size"], settings["history_noise"]
    diffusion = partial(diffusion_loss, predicted=settings["predicted"], min_snr=settings["min_snr"])

    def losses(network: Any, items: Items) -> torch.Tensor:
        frames, actions, rel_t = items
        context, goals = frames.tensor_split([context_size], dim=1)
        context = context.repeat_interleave(goals.shape[1], dim=0)
        if history_noise:
            context, _ = with_history_noise(context.float(), history_noise)
        return diffusion(network, goals.flatten(0, 1), actions.flatten(0, 1), context, rel_t.flatten())

    return losses


def _example(network: CDiT) -> Items:
    frame, one = torch.empty(1, *network.latent_shape), torch.empty(1)
    return frame, one, torch.empty(1, 3), torch.empty(1, network.context_size, *network.latent_shape), one


def _read(state: StateDict) -> dict[str, Any] | None:
    return {"context_size": len(state["pos_embed"]) - 1} if "time_embedder.mlp.0.weight" in state else None


# Arguments of the network among the settings.
_ARGUMENTS = ("context_size", "predicted", "action_scale", "action_dropout", "positions")

FAMILY = Family(
    name="CDiT",
    build=CDiT,
    sizes=CDIT_SIZES,
    patches=(2,),
    items="walks",
    settings=(
        *("context_size", "len_traj_pred", "distance", "goals_per_obs", "metric_waypoint_spacing", "datasets"),
        *("predicted", "min_snr", "action_scale", "action_dropout", "positions", "history_noise"),
    ),
    learning_rate=8e-5,
    clip_norm=10.0,
    batch=lambda processes: 8 * processes,
    arguments=lambda settings, latent_shape, classes: {name: settings[name] for name in _ARGUMENTS},
    objective=_objective,
    example=_example,
    read=_read,
    silent={},
    samplers=("ancestral", "ddim", "dpm++"),
    steps=250,
)
