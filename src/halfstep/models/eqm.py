"""EqM: a field over latents whose equilibria are the data (Equilibrium Matching, arXiv 2510.02300).

Axes: N samples, C channels, T frames, H W latents, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import noop_context_fn

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
    sincos,
    sincos_grid,
    token_grid,
    unpatchify,
)
from halfstep.models.objectives import eqm_loss

Energy = Literal["none", "l2", "dot"]
ENERGY_NAMES: dict[str, Energy] = {"none": "none", "l2": "l2", "dot": "dot", "mean": "dot"}  # as published; two are one

# The published sizes: depth, width, heads. A name is EqM-<size>/<patch>.
EQM_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
LABEL_DROPOUT = 0.1


class LabelEmbedder(nn.Module):
    """Class labels [N] to [N, D]; the last row stands for no label, which training puts in place of one in ten."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        if self.training:
            dropped = torch.rand(y.shape, device=y.device) < LABEL_DROPOUT
            y = torch.where(dropped, self.embedding_table.num_embeddings - 1, y)
        embedded: torch.Tensor = self.embedding_table(y)
        return embedded


class EqMBlock(nn.Module):
    """Self-attention and MLP, both modulated and gated by the condition."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = layer_norm(width)
        self.attn = SelfAttention(width, heads)
        self.norm2 = layer_norm(width)
        self.mlp = Mlp(width)
        self.adaLN_modulation = modulation(width, 6)

    def forward(self, x: torch.Tensor, modulations: torch.Tensor) -> torch.Tensor:
        """x [N, L, D], modulations [N, 6 D]: shift, scale, gate of the attention, then of the MLP."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulations.chunk(6, dim=-1)
        x = torch.addcmul(x, gate_a.unsqueeze(1), self.attn(modulate(self.norm1(x), shift_a, scale_a)))
        return torch.addcmul(x, gate_m.unsqueeze(1), self.mlp(modulate(self.norm2(x), shift_m, scale_m)))


class EqM(Network):
    """A transformer that returns the field at x.

    input_size: H and W of the latents, or one number for both. num_frames: above 1, latents are [N, C, T, H, W] and
    tokens of all frames attend to each other; a fixed embedding tells the frames apart and is zero for the first, so
    that one frame is exactly the image model and its checkpoints start a video model. uncond: the time is replaced by
    zero. energy: "none", the network's output is the field; "l2", E = -|f|^2 / 2 and "dot", E = <f, x>, whose gradient
    is the field. State dicts have the published names. Raises InputError when sizes do not divide.
    """

    # Position embeddings are added to tokens of many sizes, and sinusoids of a time need all its digits.
    keep_in_fp32 = ("pos_embed", "frame_embed", "t_embedder")

    pos_embed: nn.Parameter
    frame_embed: torch.Tensor

    def __init__(
        self,
        input_size: int | tuple[int, int],
        patch_size: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        num_classes: int,
        uncond: bool = True,
        energy: Energy = "none",
        num_frames: int = 1,
        in_channels: int = 4,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads or hidden_size % 4:
            raise InputError(f"EqM: got a width of {hidden_size}; expected a multiple of {num_heads} heads and of 4")
        if energy not in ("none", "l2", "dot"):
            raise InputError(f"EqM: got energy {energy!r}; expected none, l2 or dot")
        self.grid = token_grid("EqM", input_size, patch_size)
        self.patch_size, self.num_classes, self.num_frames, self.in_channels = (
            patch_size,
            num_classes,
            num_frames,
            in_channels,
        )
        self.uncond, self.energy = uncond, energy
        self.config: dict[str, Any] = {
            "input_size": (self.grid[0] * patch_size, self.grid[1] * patch_size),
            "patch_size": patch_size,
            "hidden_size": hidden_size,
            "depth": depth,
            "num_heads": num_heads,
            "num_classes": num_classes,
            "uncond": uncond,
            "energy": energy,
            "num_frames": num_frames,
            "in_channels": in_channels,
        }
        self.x_embedder = PatchEmbedder(in_channels, hidden_size, patch_size)
        self.t_embedder = ScalarEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.pos_embed = nn.Parameter(sincos_grid(self.grid, hidden_size), requires_grad=False)
        frames = sincos(np.arange(num_frames), hidden_size)
        self.register_buffer("frame_embed", torch.from_numpy(frames - frames[:1]).float(), persistent=False)
        self.blocks = nn.ModuleList(EqMBlock(hidden_size, num_heads) for _ in range(depth))
        # The published network returns twice the channels and drops the second half.
        self.final_layer = FinalLayer(hidden_size, patch_size, 2 * in_channels)
        initialize(self)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        if energy == "l2":  # the gradient of |f|^2 is zero where f is, and nothing would ever be learned
            nn.init.normal_(self.final_layer.linear.weight, std=0.02)

    @classmethod
    def named(cls, name: str, input_size: int | tuple[int, int], num_classes: int, **options: Any) -> EqM:
        """The published size `EqM-{S,B,L,XL}/{2,4,8}`."""
        return cls(input_size, num_classes=num_classes, **FAMILY.named(name), **options)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one sample: (C, H, W), or (C, T, H, W) for video."""
        frames = (self.num_frames,) if self.num_frames > 1 else ()
        return (self.in_channels, *frames, *self.config["input_size"])

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor,
        *,
        modulations: Sequence[torch.Tensor] | None = None,
        with_energy: bool = False,
    ) -> Any:
        """The field at x [N, C, (T,) H, W] for times t [N] and labels y [N], of x's shape; `with_energy` as
        `energy_and_field`. `modulations`: those of t and y, where they are known already. All that runs the blocks
        goes through this call, which a precision, a compiler or a distributed wrapper may stand before."""
        parts = self.modulations(t, y) if modulations is None else modulations
        if self.energy == "none":
            return self._output(x, parts)
        energy, field = self._energy_and_field(x, parts)
        return (energy, field) if with_energy else field

    def energy_and_field(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The energy of each sample [N], fp32, as published, which is -E: low for data; and the field. Raises
        InputError for energy="none"."""
        if self.energy == "none":
            raise InputError("EqM: a model with energy='none' has no energy; build it with l2 or dot")
        energy, field = self(x, t, y, with_energy=True)
        return energy, field

    def guided(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor,
        guidance_scale: float,
        guidance_channels: int | None = None,
        *,
        modulations: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Classifier-free guidance (Ho and Salimans 2022): field without label + scale * (with - without), on the first
        `guidance_channels` channels, all by default; the published sampler has 3 of 4. The others keep the label's
        field. Several labels a sample, y [N, K], are composed: without + scale * sum_k (with_k - without) (Liu et al.
        2022, "Compositional Visual Generation", eq. 11). `modulations`: those of `guidance_labels(y)`, where known."""
        labels = self.guidance_labels(y)
        passes = len(labels) // len(x)
        fields: torch.Tensor = self(torch.cat([x] * passes), torch.cat([t] * passes), labels, modulations=modulations)
        *with_label, without = fields.chunk(passes)
        difference = sum((field - without for field in with_label[1:]), with_label[0] - without)
        guided = without + guidance_scale * difference
        if guidance_channels is None or guidance_channels >= x.shape[1]:
            return guided
        return torch.cat([guided[:, :guidance_channels], (without + difference)[:, guidance_channels:]], dim=1)

    def guidance_labels(self, y: torch.Tensor) -> torch.Tensor:
        """All samples' first labels, all second ones, ..., and then no label for each: [(K + 1) N] of y [N] or
        [N, K]."""
        columns = y.unsqueeze(1) if y.dim() == 1 else y
        return torch.cat([columns.T.flatten(), torch.full_like(columns[:, 0], self.num_classes)])

    def modulations(self, t: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        """What the condition does to each block and the last layer. Without time it is the same for all steps of a
        sampler, which so computes it once. Raises InputError for a label beyond the classes."""
        looked_at = y.device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere it would cost a wait
        if looked_at and bool((y < 0).any() | (y > self.num_classes).any()):
            raise InputError(f"labels: got {sorted(set(y.tolist()))}; expected 0 to {self.num_classes} (no label)")
        condition = self.t_embedder(torch.zeros_like(t) if self.uncond else t) + self.y_embedder(y)
        return [layer.adaLN_modulation(condition) for layer in self._modulated()]

    def activations(self, x: torch.Tensor, modulations: Sequence[torch.Tensor]) -> torch.Tensor:
        """Tokens [N, L, D] after the last block, in x's type."""
        if tuple(x.shape[1:]) != self.latent_shape:
            raise InputError(f"EqM: got latents {list(x.shape[1:])}; expected {list(self.latent_shape)}")
        if self.num_frames == 1:
            tokens = self.x_embedder(x) + self.pos_embed
        else:
            samples, channels, frames = x.shape[:3]
            flat = x.transpose(1, 2).reshape(samples * frames, channels, *x.shape[3:])
            tokens = (self.x_embedder(flat) + self.pos_embed).reshape(samples, frames, -1, self.pos_embed.shape[-1])
            tokens = (tokens + self.frame_embed[:, None]).flatten(1, 2)
        arguments = [(part,) for part in modulations[:-1]]  # the last belongs to the final layer
        again = noop_context_fn if self.energy == "none" else _second_derivatives
        return run_blocks(self.blocks, self.recomputed_blocks, tokens.to(x.dtype), arguments, again)

    def _modulated(self) -> list[Any]:
        return [*self.blocks, self.final_layer]

    def _output(self, x: torch.Tensor, modulations: Sequence[torch.Tensor]) -> torch.Tensor:
        tokens = self.final_layer(self.activations(x, modulations), modulations[-1])
        if self.num_frames == 1:
            return unpatchify(tokens, self.grid, self.patch_size)[:, : self.in_channels]
        samples = len(x)
        frames = tokens.reshape(samples * self.num_frames, -1, tokens.shape[-1])
        pictures = unpatchify(frames, self.grid, self.patch_size)[:, : self.in_channels]
        return pictures.reshape(samples, self.num_frames, *pictures.shape[1:]).transpose(1, 2)

    def _energy_and_field(
        self, x: torch.Tensor, modulations: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """-E and grad E. The gradient is taken whatever the caller's grad mode; it can be trained through when that is
        on."""
        training = torch.is_grad_enabled()
        attention = _PlainAttention() if training else nullcontext()
        with torch.inference_mode(False), torch.enable_grad(), attention:
            # A tensor of inference mode cannot take part in a gradient, a clone of it can.
            at = x.clone() if training and x.requires_grad else x.detach().clone().requires_grad_()
            parts = [part.clone() if part.is_inference() else part for part in modulations]
            output = self._output(at, parts).float()  # sums over a sample overflow fp16
            terms = -0.5 * output.square() if self.energy == "l2" else output * at.float()
            energy = terms.flatten(1).sum(dim=1)
            (field,) = torch.autograd.grad(energy.sum(), at, create_graph=training)
        return (-energy, field) if training else (-energy.detach(), field.detach())


class _PlainAttention(AbstractContextManager[None]):
    """The fused attentions have no second derivative, which training through a gradient needs. Unlike torch's own
    context this one can be entered again, as each recomputation does."""

    def __init__(self) -> None:
        self._entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        self._entered.append(sdpa_kernel(SDPBackend.MATH))
        self._entered[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)


def _second_derivatives() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around a block, where `_PlainAttention` is entered already, and around its recomputation."""
    return nullcontext(), _PlainAttention()


def _arguments(settings: Mapping[str, Any], latent_shape: tuple[int, ...], classes: int) -> dict[str, Any]:
    frames = latent_shape[1] if len(latent_shape) == 4 else 1
    own = {name: settings[name] for name in ("uncond", "energy")}
    return {"num_classes": classes, **own, "num_frames": frames}


def _objective(settings: Mapping[str, Any]) -> Objective:
    weight = settings["dispersive_weight"]
    return lambda network, items: eqm_loss(network, *items, dispersive_weight=weight)


def _example(network: EqM) -> Items:
    return torch.empty(1, *network.latent_shape), torch.empty(1), torch.zeros(1, dtype=torch.int64)


def _read(state: StateDict) -> dict[str, Any] | None:
    if "time_embedder.mlp.0.weight" in state:
        return None
    table = state.get("y_embedder.embedding_table.weight")
    return {"num_classes": 0 if table is None else len(table) - 1}


FAMILY = Family(
    name="EqM",
    build=EqM,
    sizes=EQM_SIZES,
    patches=(2, 4, 8),
    items="labeled",
    settings=("clip_len", "num_classes", "uncond", "energy", "dispersive_weight"),
    learning_rate=1e-4,
    clip_norm=float("inf"),
    batch=lambda processes: 256,
    arguments=_arguments,
    objective=_objective,
    example=_example,
    read=_read,
    silent={"uncond": True, "energy": "none", "num_frames": 1},
    samplers=("ngd", "gd", "euler", "heun"),
    steps=250,
)
