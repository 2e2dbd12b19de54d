"""Load a diffusers pipeline in a precision, with the sampler and the offloading that were asked for."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfstep.autoencoders.hub import cached_models, hub_answers
from halfstep.errors import InputError
from halfstep.generate.config import MemorySettings, ModelSettings
from halfstep.precision import PrecisionPolicy, prepare, torch_dtype

# Names of a sampler: scheduler for flow matching, and for variance-preserving models.
_SCHEDULERS = {
    "unipc": ("UniPCMultistepScheduler", "UniPCMultistepScheduler"),
    "euler": ("FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler"),
    "heun": ("FlowMatchHeunDiscreteScheduler", "HeunDiscreteScheduler"),
    "dpm": ("DPMSolverMultistepScheduler", "DPMSolverMultistepScheduler"),
    "dpm++": ("DPMSolverMultistepScheduler", "DPMSolverMultistepScheduler"),
    "ddim": (None, "DDIMScheduler"),
}
_NETWORKS = ("transformer", "transformer_2", "unet")
_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass
class VaeGate:
    """Decodes in bf16 where that is shown to be enough: the first sample is decoded in fp32 too, and bf16 stays when
    the root-mean-square difference is below one level of 8-bit pixels (2/255). A result that is not finite is computed
    again in fp32. Weights stay fp32; fp16 is never tried, autoencoders overflow it."""

    half: bool
    difference: float | None = None
    retried: int = 0

    def attach(self, vae: Any) -> None:
        """Stand before `vae.decode`."""
        original = vae.decode

        def decode(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self.half:
                return original(latents, *args, **kwargs)
            with torch.autocast(latents.device.type, torch.bfloat16):
                result = original(latents, *args, **kwargs)
            if self.difference is None:
                exact = original(latents, *args, **kwargs)
                self.difference = float((result[0].float() - exact[0].float()).square().mean().sqrt())
                self.half = self.difference < 2 / 255  # false for NaN too
                return exact
            if not torch.isfinite(result[0]).all():
                self.retried += 1
                return original(latents, *args, **kwargs)
            return result

        vae.decode = decode


@dataclass(frozen=True)
class Generator:
    """A pipeline ready to be called."""

    pipe: Any
    policy: PrecisionPolicy
    gate: VaeGate
    device: torch.device

    def takes(self, name: str) -> bool:
        """Whether the pipeline's call has the argument `name`."""
        return name in inspect.signature(self.pipe.__call__).parameters


def load_generator(model: ModelSettings, memory: MemorySettings, policy: PrecisionPolicy, device: str) -> Generator:
    """The pipeline `model.model_id` on `device`.

    *true* policies load transformer or U-Net and text encoders in the half type, minding the modules that the library
    keeps in fp32; *mixed* policies and tf32 run them prepared by `halfstep.precision.prepare`. The autoencoder is
    gated. Raises InputError when the pipeline cannot be loaded or does not have the sampler.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as diffusers_logging

    try:
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise InputError("generate: needs transformers; pip install 'halfstep[generate]'") from error
    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()
    identifier = model.model_id
    # diffusers passes the hub's library an option that it has dropped, which then warns every user.
    warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument", category=UserWarning)
    alternatives = f"available here: {', '.join(cached_models()) or 'none'}, or the folder of a pipeline on disk"
    offline = Path(identifier).is_dir() or not hub_answers(identifier, model.revision, alternatives)
    try:
        pipe = DiffusionPipeline.from_pretrained(
            identifier,
            revision=model.revision,
            local_files_only=offline,
            dtype={"default": torch_dtype(policy.params), "vae": torch.float32},
        )
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{identifier}: cannot be loaded as a pipeline ({reason}); {alternatives}") from error
    pipe.set_progress_bar_config(disable=True)
    if model.sampler is not None:
        pipe.scheduler = _scheduler(pipe.scheduler, model.sampler)
    if policy.params == "fp32" and policy.compute != "fp32":
        for name in (*_NETWORKS, *_ENCODERS):
            if getattr(pipe, name, None) is not None:
                prepare(getattr(pipe, name), policy)
    gate = VaeGate(half=policy.compute == "bf16")
    if getattr(pipe, "vae", None) is not None:
        if memory.tiles:
            pipe.vae.enable_tiling()
        gate.attach(pipe.vae)
    where = torch.device(device)
    _place(pipe, where, memory.offload_kind)
    return Generator(pipe, policy, gate, where)


def _place(pipe: Any, device: torch.device, offload: str) -> None:
    if device.type == "cpu" or offload == "none":
        pipe.to(device)
    elif offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=True)


def _scheduler(scheduler: Any, sampler: str) -> Any:
    """The scheduler for `sampler` with the noise schedule of the model's own."""
    import diffusers

    config = scheduler.config
    own = type(scheduler).__name__
    flow = own.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction"
    name = _SCHEDULERS[sampler][0 if flow else 1]
    if name is None:
        expected = ", ".join(key for key, names in _SCHEDULERS.items() if names[0])
        raise InputError(f"model_settings.sampler: got {sampler!r} for a flow-matching model; expected {expected}")
    if name == own:
        return scheduler
    changes: dict[str, Any] = {}
    if flow:
        shift = config.get("flow_shift", config.get("shift", 1.0))
        flow_sigmas = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
        changes = {"shift": shift} if name.startswith("FlowMatch") else flow_sigmas
    return getattr(diffusers, name).from_config(config, **changes)
