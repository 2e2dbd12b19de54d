"""What to generate, and how. The keys are those of configuration files that people have; more come with defaults."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from halfstep.config import Config
from halfstep.errors import InputError
from halfstep.generate.template import expand_template
from halfstep.store import TrajectoryFormat

# Settings of the older tool that ask for what is always so here, for what only training has, or for what is refused
# where it is turned on.
_WITHOUT_EFFECT = {
    "memory_settings": (
        "reload_model_for_large_models",
        "use_gradient_checkpointing",
        "enable_memory_efficient_attention",
    ),
    "prompt_settings": ("variation_weight", "base_weight", "enable_prompt_weighting", "embedding_method"),
    "latent_analysis_settings": ("latent_storage_format",),
    "attention_analysis_settings": (
        "tokenizer_name",
        "storage_format",
        "compress_attention",
        "storage_interval",
        "storage_dtype",
        "store_per_head",
        "store_per_block",
        "store_individual_tokens",
        "attention_threshold",
        "spatial_downsample_factor",
    ),
}


class ModelSettings(Config):
    """model_id: a hub id or folder of a diffusers pipeline. sampler: None keeps the model's own scheduler."""

    model_id: str = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    revision: str | None = None
    seed: int = Field(default=42, ge=0, lt=2**63)
    sampler: Literal["unipc", "euler", "heun", "dpm", "dpm++", "ddim"] | None = None
    cfg_scale: float = Field(default=5.0, ge=0)
    steps: int = Field(default=50, ge=1)
    device: str = "auto"
    precision: str = "auto"
    eta: float = Field(default=0.0, ge=0, le=0)  # the samplers here have none
    clip_skip: Literal[1] = 1


class VideoSettings(Config):
    """Size in pixels; `frames`, or seconds of `duration` times `fps`. A picture model takes the size alone."""

    width: int = Field(default=832, ge=8)
    height: int = Field(default=480, ge=8)
    fps: int = Field(default=16, ge=1)
    duration: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    frames: int | None = Field(default=None, ge=1)

    @property
    def wanted_frames(self) -> int:
        """Frames asked for."""
        return self.frames or max(1, round(self.fps * self.duration))


class MemorySettings(Config):
    """offload: diffusers' own ways to keep weights out of GPU memory until they are needed.
    `enable_memory_optimization` stands for `model` and tiled decoding."""

    offload: Literal["none", "model", "sequential", "group"] | None = None
    vae_tiling: bool | None = None
    enable_memory_optimization: bool = False
    clear_cache_between_videos: bool = False
    reload_model_for_large_models: bool = False
    use_gradient_checkpointing: bool = False
    enable_memory_efficient_attention: bool = False

    @property
    def offload_kind(self) -> str:
        """What `offload` comes to."""
        return self.offload or ("model" if self.enable_memory_optimization else "none")

    @property
    def tiles(self) -> bool:
        """Whether the autoencoder decodes in tiles."""
        return self.enable_memory_optimization if self.vae_tiling is None else self.vae_tiling


class PromptSettings(Config):
    """template, prompts: what to make where the command has no --template; one of them. Weighted prompts are not
    supported: turned on, they are refused instead of ignored."""

    template: str | None = None
    prompts: list[str] | None = Field(default=None, min_length=1)
    negative_prompt: str | None = None
    enable_weighting: Literal[False] = False
    use_weighted_embeddings: Literal[False] = False
    variation_weight: float = 1.5
    base_weight: float = 1.0
    enable_prompt_weighting: bool = True
    embedding_method: str = "norm_preserving"


class LatentSettings(Config):
    """storage_dtype: the error that may be made, float32 meaning none. `latent_storage_format` named files that are no
    longer written: `halfstep store convert --to npy.gz` makes others."""

    store_latents: bool = False
    latent_storage_format: Literal["numpy", "torch"] = "numpy"
    storage_interval: int = Field(default=1, ge=1)
    compress_latents: bool = True
    storage_dtype: Literal["float16", "float32"] = "float16"

    @property
    def storage(self) -> str:
        """The type whose error may be made."""
        return {"float16": "fp16", "float32": "fp32"}[self.storage_dtype]

    def format(self) -> TrajectoryFormat:
        """How the trajectories are kept."""
        return TrajectoryFormat("predictive" if self.compress_latents else "raw", self.storage)


class AttentionSettings(Config):
    """Attention maps are not recorded: turned on, that is refused instead of ignored."""

    store_attention: Literal[False] = False
    tokenizer_name: str | None = None
    storage_format: str | None = None
    compress_attention: bool = True
    storage_interval: int = 1
    storage_dtype: str | None = None
    store_per_head: bool = False
    store_per_block: bool = False
    store_individual_tokens: bool = False
    attention_threshold: float | None = None
    spatial_downsample_factor: int = 1


class GenerateConfig(Config):
    """One batch: every prompt of a template with the same seeds, `videos_per_variation` each."""

    model_settings: ModelSettings = ModelSettings()
    video_settings: VideoSettings = VideoSettings()
    memory_settings: MemorySettings = MemorySettings()
    prompt_settings: PromptSettings = PromptSettings()
    latent_analysis_settings: LatentSettings = LatentSettings()
    attention_analysis_settings: AttentionSettings = AttentionSettings()
    videos_per_variation: int = Field(default=1, ge=1)
    output_dir: str = "outputs"
    batch_name: str = "batch"
    use_timestamp: bool = False

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, content: Any) -> Any:
        """A section without a line under it is read as None."""
        if isinstance(content, dict):
            return {name: value for name, value in content.items() if value is not None}
        return {} if content is None else content

    def prompts(self, template: str | None) -> list[str]:
        """All prompts: of `template`, or of what the settings have. Raises InputError when there is none, or more than
        one source of them."""
        own = self.prompt_settings
        if template is None and own.template is not None and own.prompts is not None:
            raise InputError("prompt_settings: has a template and prompts; leave out one of them")
        if template is None and own.prompts is not None:
            prompts = [" ".join(prompt.split()) for prompt in own.prompts]  # as those of a template
            repeated = [prompt for prompt, count in Counter(prompts).items() if count > 1 or not prompt]
            if repeated:
                raise InputError(f"prompt_settings.prompts: got {repeated[0]!r} twice or empty; give each one once")
            return prompts
        template = own.template if template is None else template
        if template is None:
            raise InputError(
                "generate: no prompt; give --template TEXT, or prompt_settings.template or .prompts in the YAML"
            )
        return expand_template(template)

    def without_effect(self) -> list[str]:
        """Settings that were given another value than the usual one and do nothing here."""
        return [
            f"{section}.{name}"
            for section, names in _WITHOUT_EFFECT.items()
            for name in names
            if getattr(getattr(self, section), name) != type(getattr(self, section)).model_fields[name].default
        ]

    def with_latents(self) -> Self:
        """The same, recording latents."""
        latents = self.latent_analysis_settings.model_copy(update={"store_latents": True})
        return self.model_copy(update={"latent_analysis_settings": latents})
