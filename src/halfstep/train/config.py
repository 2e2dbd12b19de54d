"""What to train, on what, and how: one frozen value, read from YAML or from the command line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from halfstep.config import Config
from halfstep.data.latents import Distance, NavigationDatasetConfig
from halfstep.errors import InputError
from halfstep.models import About
from halfstep.models.cdit import CDIT_PATCHES, CDIT_SIZES
from halfstep.models.eqm import EQM_PATCHES, EQM_SIZES, Energy
from halfstep.models.layers import named_sizes

# Settings that a run may change when it goes on; all others are part of what it is.
MAY_CHANGE = frozenset(
    {"epochs", "steps", "num_workers", "log_every", "ckpt_every", "compile", "tensorboard", "wandb", "results_dir"}
    | {"run_name", "activation_budget", "batch_size", "global_batch_size", "fsdp", "precision", "device"}
)
_EQM_ONLY = ("clip_len", "num_classes", "uncond", "energy", "dispersive_weight")
_CDIT_ONLY = ("context_size", "len_traj_pred", "distance", "goals_per_obs", "metric_waypoint_spacing", "datasets")

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class NetworkSizes(Config):
    """A network of sizes that have no published name."""

    network: Literal["EqM", "CDiT"]
    hidden_size: Positive
    depth: Positive
    num_heads: Positive
    patch_size: Positive = 2


class TrainConfig(Config):
    """One training run. The published navigation YAMLs are such configs.

    model: `EqM-{S,B,L,XL}/{2,4,8}`, `CDiT-{S,B,L,XL}/2`, or sizes. data_path: a latent store, a `.pt` tree, or pixels,
    which are then encoded in every step by `autoencoder` at `image_size`. EqM: `clip_len` above 1 trains on clips;
    `dispersive_weight` adds the dispersive loss. CDiT: `datasets` in place of data_path, each with its folder and
    split; an item of a walk has `goals_per_obs` samples. batch_size: a process's items to a step, or
    `global_batch_size` those of all. gradient_accumulation_steps: micro-batches of a step, whose gradients are summed
    in the type of the weights. activation_budget: the share of blocks that keep their activations. ckpt: weights to
    start from. fsdp: shard the weights over the processes.
    """

    model: str | NetworkSizes
    data_path: Path | None = None
    autoencoder: str = "dct8"
    revision: str | None = None
    image_size: Positive | None = None

    clip_len: Positive = 1
    num_classes: Positive | None = None
    uncond: bool = True
    energy: Energy = "none"
    dispersive_weight: NotNegative = 0.0

    context_size: Positive = 4
    len_traj_pred: Positive = 64
    distance: Distance = Distance(min_dist_cat=-64, max_dist_cat=64)
    goals_per_obs: Positive = 4
    metric_waypoint_spacing: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    datasets: dict[str, NavigationDatasetConfig] = Field(default_factory=dict)
    normalize: Literal[True] = True  # the published configs say it; actions are always normalized

    precision: Annotated[str, Field(coerce_numbers_to_str=True)] = "auto"  # 16 and 32 are among the spellings
    epochs: Positive = 80
    steps: Positive | None = None
    batch_size: Positive | None = None
    global_batch_size: Positive | None = None
    gradient_accumulation_steps: Positive = 1
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    weight_decay: NotNegative = 0.0
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    grad_clip_val: NotNegative | None = None
    activation_budget: Share = 1.0
    compile: bool = False
    fsdp: bool = False
    global_seed: Annotated[int, Field(ge=0)] = 0
    num_workers: Annotated[int, Field(ge=0)] | None = None
    device: str = "auto"

    results_dir: Path = Path("results")
    run_name: str | None = None
    ckpt: Path | None = None
    log_every: Positive = 100
    ckpt_every: Positive = 5000
    tensorboard: bool = False
    wandb: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        network = self.network
        fields = type(self).model_fields
        others = _CDIT_ONLY if network == "EqM" else _EQM_ONLY
        foreign = [n for n in others if getattr(self, n) != fields[n].get_default(call_default_factory=True)]
        if foreign:
            raise ValueError(f"{foreign[0]} is not a setting of {network}")
        if (self.data_path is None) == (not self.datasets):
            raise ValueError(
                "data_path: is not given" if self.data_path is None else "give data_path or datasets, not both"
            )
        if self.datasets and (self.goals_per_obs, self.metric_waypoint_spacing) != (4, None):
            raise ValueError("goals_per_obs and metric_waypoint_spacing: give those of each of the datasets")
        if self.compile and self.energy != "none":
            raise ValueError("compile: cannot see through the gradient that an energy's field is")
        if self.fsdp and self.energy != "none":
            raise ValueError("fsdp: sharded weights cannot take part in the gradient that an energy's field is")
        if self.batch_size is not None and self.global_batch_size is not None:
            raise ValueError("give batch_size (a process's) or global_batch_size (all processes'), not both")
        return self

    @property
    def network(self) -> str:
        """EqM or CDiT."""
        if isinstance(self.model, NetworkSizes):
            return self.model.network
        return "CDiT" if self.model.startswith("CDiT") else "EqM"

    @property
    def folder(self) -> Path:
        """Where the run is kept: the same command finds it again."""
        if self.run_name is not None:
            return self.results_dir / self.run_name
        name = self.model.replace("/", "-") if isinstance(self.model, str) else self.network
        return self.results_dir / (f"{name}-clip{self.clip_len}" if self.clip_len > 1 else name)

    @property
    def learning_rate(self) -> float:
        """As published: 1e-4 for EqM, 8e-5 for CDiT."""
        return self.lr if self.lr is not None else {"EqM": 1e-4, "CDiT": 8e-5}[self.network]

    @property
    def clip_norm(self) -> float:
        """Gradients are clipped to this norm; as published 10 for CDiT and, without end, for EqM."""
        if self.grad_clip_val is not None:
            return self.grad_clip_val or float("inf")
        return {"EqM": float("inf"), "CDiT": 10.0}[self.network]

    def local_batch(self, processes: int) -> int:
        """Items of one process to a step; by default as published 256 of all for EqM, and 8 a process for CDiT-XL.
        Raises InputError when they cannot be shared out evenly."""
        published = {"EqM": 256, "CDiT": 8 * processes}[self.network]
        total = self.global_batch_size or (self.batch_size * processes if self.batch_size else published)
        if total % (processes * self.gradient_accumulation_steps):
            raise InputError(
                f"batch: {total} items cannot be shared out to {processes} processes in "
                f"{self.gradient_accumulation_steps} micro-batches each; give a multiple of their product"
            )
        return total // processes

    def workers(self, device_type: str) -> int:
        """Processes that read ahead. On a CPU none: the training needs all cores, and a store is read in no time."""
        if self.num_workers is not None:
            return self.num_workers
        return min(4, len(os.sched_getaffinity(0))) if device_type == "cuda" else 0

    def about(self, latent_shape: tuple[int, ...], num_classes: int) -> About:
        """The network for latents (C, (T,) H, W). Raises InputError for a name that is not published."""
        sizes = self._sizes()
        channels, size = latent_shape[0], (latent_shape[-2], latent_shape[-1])
        config: dict[str, Any] = {**sizes, "input_size": size, "in_channels": channels}
        if self.network == "CDiT":
            return About("CDiT", {**config, "context_size": self.context_size})
        frames = latent_shape[1] if len(latent_shape) == 4 else 1
        own = {"num_classes": num_classes, "uncond": self.uncond, "energy": self.energy, "num_frames": frames}
        return About("EqM", {**config, **own})

    def _sizes(self) -> dict[str, int]:
        if isinstance(self.model, NetworkSizes):
            return self.model.model_dump(exclude={"network"})
        if self.network == "CDiT":
            return named_sizes(self.model, "CDiT", CDIT_SIZES, CDIT_PATCHES)
        return named_sizes(self.model, "EqM", EQM_SIZES, EQM_PATCHES)
