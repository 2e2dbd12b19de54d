"""Load a diffusers pipeline in a precision, with the sampler and the offloading that were asked for."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from halfstep.autoencoders.hub import cached_models, hub_answers, quiet_pipelines
from halfstep.engine import Gate
from halfstep.errors import InputError
from halfstep.extras import missing
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


_ENOUGH = 2 / 255  # one level of 8-bit pixels, of which -1 to 1 has 255


@dataclass(frozen=True)
class Verdict:
    """Whether the autoencoder of a batch decodes in bf16, and the root-mean-square difference from fp32 that decided
    it; None where nothing was compared."""

    half: bool
    difference: float | None = None


class Decoder:
    """Stands before a pipeline's `vae.decode`: bf16 where that is shown to be enough, and again in fp32 what bf16
    spoils. Weights stay fp32; fp16 is never tried, autoencoders overflow it.

    The verdict is given once a batch, on the first latents that are decoded: bf16 is enough when it differs from fp32
    by less than one level of 8-bit pixels. All samples of the batch are then decoded by it, those latents too; kept
    with the batch, it makes pixels independent of the order of samples and of a resume.
    """

    def __init__(self, vae: Any, verdict: Verdict | None) -> None:
        self.verdict, self.retried = verdict, 0
        self._decode = vae.decode
        vae.decode = self.decode

    def decode(self, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the autoencoder's own `decode`, by the verdict."""
        verdict = self.verdict or self._compared(latents)
        self.verdict = verdict
        if not verdict.half:
            return self._decode(latents, *args, **kwargs)
        template: list[Any] = []

        def half(inputs: torch.Tensor) -> list[torch.Tensor]:
            with torch.autocast(inputs.device.type, torch.bfloat16):
                template.append(self._decode(inputs, *args, **kwargs))
            return [template[0][0]]

        checked = Gate(half, lambda: lambda inputs: [self._decode(inputs, *args, **kwargs)[0]])(latents)
        self.retried += len(checked.retried)
        pixels = checked.outputs[0]
        return (pixels, *template[0][1:]) if isinstance(template[0], tuple) else type(template[0])(sample=pixels)

    def _compared(self, latents: torch.Tensor) -> Verdict:
        exact = self._decode(latents, return_dict=False)[0].float()
        with torch.autocast(latents.device.type, torch.bfloat16):
            half = self._decode(latents, return_dict=False)[0].float()
        difference = float((half - exact).square().mean().sqrt())
        return Verdict(difference < _ENOUGH, difference)  # not half for NaN too


@dataclass(frozen=True)
class Generator:
    """A pipeline ready to be called."""

    pipe: Any
    policy: PrecisionPolicy
    decoder: Decoder | None
    device: torch.device

    def takes(self, name: str) -> bool:
        """Whether the pipeline's call has the argument `name`."""
        return name in inspect.signature(self.pipe.__call__).parameters


def load_generator(
    model: ModelSettings, memory: MemorySettings, policy: PrecisionPolicy, device: str, verdict: Verdict | None
) -> Generator:
    """The pipeline `model.model_id` on `device`.

    *true* policies load transformer or U-Net and text encoders in the half type, minding the modules that the library
    keeps in fp32; *mixed* policies and tf32 run them prepared by `halfstep.precision.prepare`. The autoencoder is
    gated; `verdict` is that of the batch, once there is one. Raises InputError when the pipeline cannot be loaded or
    does not have the sampler.
    """
    from diffusers import DiffusionPipeline

    identifier = model.model_id
    alternatives = f"available here: {', '.join(cached_models()) or 'none'}, or the folder of a pipeline on disk"
    offline = Path(identifier).is_dir() or not hub_answers(identifier, model.revision, alternatives)
    try:
        with quiet_pipelines():
            pipe = DiffusionPipeline.from_pretrained(
                identifier,
                revision=model.revision,
                local_files_only=offline,
                dtype={"default": torch_dtype(policy.params), "vae": torch.float32},
            )
    except ImportError as error:
        raise missing(error, "generate") or error from error
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        absent = missing(error, "generate") if isinstance(error, ImportError) else None
        raise absent or InputError(
            f"{identifier}: cannot be loaded as a pipeline ({reason}); {alternatives}"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    if model.sampler is not None:
        pipe.scheduler = _scheduler(pipe.scheduler, model.sampler)
    if policy.params == "fp32" and policy.compute != "fp32":
        for name in (*_NETWORKS, *_ENCODERS):
            if getattr(pipe, name, None) is not None:
                prepare(getattr(pipe, name), policy)
    decoder = None
    if getattr(pipe, "vae", None) is not None:
        if memory.tiles:
            pipe.vae.enable_tiling()
        decoder = Decoder(pipe.vae, verdict if policy.compute == "bf16" else Verdict(half=False))
    where = torch.device(device)
    _place(pipe, where, memory.offload_kind)
    return Generator(pipe, policy, decoder, where)


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
