"""What to train, on what, and how: one frozen value, read from YAML or from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from halfstep.config import Config
from halfstep.data.latents import Distance, NavigationDatasetConfig, Place
from halfstep.errors import InputError
from halfstep.models import FAMILIES, About, Family, family_of
from halfstep.models.cdit import Positions
from halfstep.models.eqm import Energy
from halfstep.models.objectives import EDM_SIGMA_DATA, Predicted
from halfstep.spec import PixelSpec
from halfstep.train.state import Updates

# Settings that a run may change when it goes on; all others are part of what it is.
MAY_CHANGE = frozenset(
    {"epochs", "steps", "num_workers", "log_every", "ckpt_every", "compile", "tensorboard", "wandb", "results_dir"}
    | {"run_name", "activation_budget", "memory", "batch_size", "global_batch_size", "fsdp", "precision"}
    | {"device"}
)
# Where data lies: it may lie elsewhere when a run goes on, as long as it is the same data.
PLACES = frozenset({"data_path", "latent_folder", "data_folder", "train", "test"})

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class NetworkSizes(Config):
    """A network of sizes that have no published name."""

    network: str
    hidden_size: Positive
    depth: Positive
    num_heads: Positive
    patch_size: Positive = 2  # of networks with patches


class TrainConfig(Config):
    """One training run. The published navigation YAMLs are such configs.

    model: `EqM-{S,B,L,XL}/{2,4,8}`, `CDiT-{S,B,L,XL}/2`, `livestream-{S,M,L}`, or sizes. data_path: a latent store, a
    `.pt` tree, or pixels, which are then encoded in every step by `autoencoder` at `image_size`. EqM: `clip_len` above
    1 trains on clips; `dispersive_weight` adds the dispersive loss. CDiT: `datasets` in place of data_path, each with
    its folder and split; an item of a walk has `goals_per_obs` samples; `predicted` and `min_snr` as in
    `diffusion_loss`, where velocity learns what noise, the published default, leaves unlearned; `action_scale` and
    `action_dropout` as in ActionEmbedder, 1 and 0 as published. livestream learns the next frame of such walks:
    `sigma_data` is the deviation of the latents. `history_noise` is how much noise context frames get at most, in units
    of the latents' deviation: livestream, which is told how much, gets 0.7 unless it is given, CDiT none. batch_size: a
    process's items to a step, or `global_batch_size` those of all. gradient_accumulation_steps: micro-batches of a
    step, whose gradients are summed in the type of the weights. activation_budget: the share of blocks that keep their
    activations. memory: a size such as 8GB, into which a step is made to fit by the two before,
    from what they are. ckpt: weights to start from. fsdp: shard the weights over the processes.
    """

    model: str | NetworkSizes
    data_path: Place | None = None
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
    predicted: Predicted = "noise"
    min_snr: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    action_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    action_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    positions: Positions = "random"
    sigma_data: Annotated[float, Field(gt=0, allow_inf_nan=False)] = EDM_SIGMA_DATA
    history_noise: NotNegative | None = None
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
    memory: str | None = None
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
        family, fields = self.family, type(self).model_fields
        for name in (name for other in FAMILIES.values() for name in other.settings if name not in family.settings):
            if getattr(self, name) != fields[name].get_default(call_default_factory=True):
                raise ValueError(f"{name} is not a setting of {family.name}")
        patch_size = NetworkSizes.model_fields["patch_size"].default
        if isinstance(self.model, NetworkSizes) and not family.patches and self.model.patch_size != patch_size:
            raise ValueError(f"model.patch_size is not a size of {family.name}")
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
    def family(self) -> Family:
        """The registry's row of the network."""
        return family_of(self.model.network if isinstance(self.model, NetworkSizes) else self.model)

    @property
    def own_settings(self) -> dict[str, Any]:
        """The settings that only this network's family has."""
        return {name: getattr(self, name) for name in self.family.settings}

    @property
    def folder(self) -> Path:
        """Where the run is kept: the same command finds it again."""
        if self.run_name is not None:
            return self.results_dir / self.run_name
        name = self.model.replace("/", "-") if isinstance(self.model, str) else self.family.name
        return self.results_dir / (f"{name}-clip{self.clip_len}" if self.clip_len > 1 else name)

    @property
    def places(self) -> dict[str, str]:
        """Where the data lies, by the names of the settings that say it."""
        found = {"data_path": self.data_path}
        for dataset, entry in self.datasets.items():
            found |= {f"datasets.{dataset}.{name}": getattr(entry, name) for name in sorted(PLACES - {"data_path"})}
        return {name: str(where) for name, where in found.items() if where is not None}

    @property
    def pixels(self) -> PixelSpec:
        """How pixels are fitted, where they are what is trained on."""
        if self.family.items == "walks":
            return PixelSpec(self.image_size or 224, self.image_size or 224, "4:3")
        return PixelSpec(self.image_size or 256, self.image_size or 256)

    def encode_command(self, *, variational: bool) -> str:
        """How the pixels of this config become latents once and for all."""
        options = " --moments" * variational + " --mirror" * (self.family.items == "labeled")
        return (
            f"halfstep encode -i {self.data_path or 'PIXELS'} -o LATENTS --autoencoder {self.autoencoder} "
            f"--size {self.pixels.width}x{self.pixels.height}{options}"
        )

    @property
    def updates(self) -> Updates:
        """How the weights are moved; the rate and the clipping as published where they are not given."""
        clip_norm = self.family.clip_norm if self.grad_clip_val is None else self.grad_clip_val or float("inf")
        return Updates(
            learning_rate=self.family.learning_rate if self.lr is None else self.lr,
            weight_decay=self.weight_decay,
            warmup_steps=self.warmup_steps,
            clip_norm=clip_norm,
            ema_decay=self.ema_decay,
            sharded=self.fsdp,
            compiled=self.compile,
            recomputed=1 - self.activation_budget,
        )

    def items_per_step(self, processes: int) -> int:
        """Items of all processes to a step, by default as published. Raises InputError when they cannot be shared out
        evenly."""
        own = self.batch_size * processes if self.batch_size else self.family.batch(processes)
        total = self.global_batch_size or own
        if total % (processes * self.gradient_accumulation_steps):
            raise InputError(
                f"batch: {total} items cannot be shared out to {processes} processes in "
                f"{self.gradient_accumulation_steps} micro-batches each; give a multiple of their product"
            )
        return total

    def about(self, latent_shape: tuple[int, ...], num_classes: int) -> About:
        """The network for latents (C, (T,) H, W). Raises InputError for a name that is not published."""
        if isinstance(self.model, NetworkSizes):
            sizes = self.model.model_dump(exclude={"network"} if self.family.patches else {"network", "patch_size"})
        else:
            sizes = self.family.named(self.model)
        common = {"input_size": (latent_shape[-2], latent_shape[-1]), "in_channels": latent_shape[0]}
        own = self.family.arguments(self.own_settings, latent_shape, num_classes)
        return About(self.family.name, {**sizes, **common, **own})
