"""Opening an image-to-image pipeline of diffusers, and those that can only be called whole."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from halfstep.autoencoders.hub import hub_answers, quiet_pipelines
from halfstep.errors import InputError
from halfstep.extras import missing
from halfstep.live.frames import Action, FrameModel, FrameSpec, Made, Network, Picture
from halfstep.live.pictures import PictureModel, conditions_of, predicted_by
from halfstep.sampling.noise import own_generator

_NETWORKS = ("transformer", "unet")
_UNFIT = (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError)  # of a library that finds it so


class WholePipeline:
    """Calls `pipe` for each picture, in so many steps and with the same noise. `strength`: the share of the noise
    levels that a picture is noised by, as near as so many steps come to it; pipelines that edit pictures have none.
    Guidance that costs a second call of the network is off."""

    def __init__(self, pipe: Any, prompt: str, device: torch.device, *, size: tuple[int, int], strength: float) -> None:
        self._pipe, self._strength, self._device = pipe.to(device), strength, device
        self._takes = inspect.signature(pipe.__call__).parameters
        name = next(name for name in _NETWORKS if getattr(pipe, name, None) is not None)
        exact = _TensorsOut(getattr(pipe, name).eval())
        self.network: nn.Module = exact
        self._stand = _Stand(exact)
        setattr(pipe, name, self._stand)
        pipe.set_progress_bar_config(disable=True)
        width, height = size
        self.spec = FrameSpec(height, width, takes_actions=False, takes_pictures=True)
        self._fixed = self._arguments(prompt)

    def begin(self, seed: int) -> Made:
        """Grey: there is nothing to be seen before the first picture."""
        return Made(torch.zeros(3, self.spec.height, self.spec.width, device=self._device), seed)

    def predict(self, network: Network, state: int, given: Action | Picture | None, steps: int) -> Made:
        if not isinstance(given, np.ndarray):
            return Made(self.begin(state).pixels, state)
        self._stand.called[:] = [network]
        with torch.no_grad():
            pictures = self._pipe(
                image=Image.fromarray(given),
                generator=own_generator(state),
                output_type="np",
                return_dict=False,
                **self._schedule(steps),
                **self._fixed,
            )[0]
        pixels = torch.from_numpy(np.asarray(pictures[0], np.float32)).permute(2, 0, 1) * 2 - 1
        return Made(pixels.to(self._device), state)

    def encode_once(self) -> None:
        """The next call encodes the prompt for all that follow, and lets the text encoders go; not where the prompt is
        encoded together with the picture."""
        encode, found = self._pipe.encode_prompt, list[Any]()
        if "image" in inspect.signature(encode).parameters:
            return

        def encoded(*args: Any, **kwargs: Any) -> Any:
            if not found:
                found.append(encode(*args, **kwargs))
                for name in [name for name in self._pipe.components if name.startswith("text_encoder")]:
                    setattr(self._pipe, name, None)
            return found[0]

        self._pipe.encode_prompt = encoded

    def _arguments(self, prompt: str) -> dict[str, Any]:
        """Of every call, as far as the pipeline has them."""
        width, height = self.spec.width, self.spec.height
        wanted: dict[str, Any] = {"prompt": prompt, "height": height, "width": width, "pag_scale": 0.0}
        wanted |= {"max_area": width * height, "_auto_resize": False}  # of those that would choose a size themselves
        config = self._stand.config
        told = config.get("guidance_embeds") or config.get("time_cond_proj_dim")  # its guidance, in the same call
        if "true_cfg_scale" in self._takes:
            wanted["true_cfg_scale"] = 1.0
        elif not told:
            wanted["guidance_scale"] = 1.0
        return {name: value for name, value in wanted.items() if name in self._takes}

    def _schedule(self, steps: int) -> dict[str, Any]:
        if "strength" not in self._takes:
            return {"num_inference_steps": steps}
        if "original_inference_steps" in self._takes:  # of a consistency model, which takes all steps at any strength
            least = steps / self._pipe.scheduler.config.original_inference_steps
            return {"num_inference_steps": steps, "strength": max(self._strength, least)}
        of, strength = schedule(steps, self._strength)
        return {"num_inference_steps": of, "strength": strength}


def schedule(steps: int, strength: float) -> tuple[int, float]:
    """Of how many steps the pipelines of diffusers take exactly `steps` at which strength, the nearest to `strength`:
    they take the last floor(of * strength), or ceil of it, which must be the same."""
    of = max(steps, round(steps / strength))
    while True:
        near = steps / of
        for share in (near, math.nextafter(near, 1), math.nextafter(near, 0)):
            if of * share == steps:
                return of, share
        of += 1


class _TensorsOut(nn.Module):
    """`module`, which returns its tensor alone, in fp32: the sampler's state is not a matter of the network's types."""

    exact_scalars = True  # timesteps and guidance, which the library hands on in fp32

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module: Any = module

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        output = self.module(*args, **{**kwargs, "return_dict": False})[0]
        return output.float() if isinstance(output, torch.Tensor) else output


class _Sampled(NamedTuple):
    """What a network returns, by its place or by its name."""

    sample: torch.Tensor


class _Stand(nn.Module):
    """Stands in a pipeline for its network: calls the one in `called`, and for all else is the one in fp32."""

    def __init__(self, exact: _TensorsOut) -> None:
        super().__init__()
        self.exact = exact.module
        self.called: list[Network] = [exact]

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> _Sampled:
        (network,) = self.called
        return _Sampled(network(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.exact, name)


def open_pipeline(
    identifier: str, prompt: str, device: torch.device, *, size: tuple[int, int], strength: float
) -> FrameModel:
    """An image-to-image pipeline of diffusers by hub id or folder, in fp32; the prompt is encoded here, once.

    Those of a U-Net with one or two CLIP encoders (Stable Diffusion's and its XL's) take their steps side by side, all
    others one after the other. Raises InputError when it cannot be loaded, has no image-to-image form, or makes nothing
    of a picture of this size.
    """
    pipe = _load(identifier)
    kind = type(pipe).__name__
    if all(getattr(pipe, name, None) is None for name in _NETWORKS) or getattr(pipe, "encode_prompt", None) is None:
        raise InputError(f"--pipeline: {identifier}: is a {kind}; expected one of a U-Net or transformer and a prompt")
    factor = getattr(pipe, "vae_scale_factor", 1)
    if size[0] % factor or size[1] % factor:
        raise InputError(f"--size: got {size[0]}x{size[1]}; {kind} needs multiples of {factor}")
    try:
        model = _model(pipe, prompt, device, size, strength)
        with torch.no_grad():
            made = model.predict(model.network, model.begin(0).state, np.full((*size[::-1], 3), 128, np.uint8), 1)
    except _UNFIT as error:
        what = f"a prompt and a picture of {size[0]}x{size[1]}"
        raise InputError(f"--pipeline: {kind} makes nothing of {what} ({_reason(error)})") from error
    if tuple(made.pixels.shape) != (3, *size[::-1]):
        height, width = made.pixels.shape[1:]
        raise InputError(f"--size: got {size[0]}x{size[1]}; {kind} makes {width}x{height} of it: give another")
    return model


def _model(pipe: Any, prompt: str, device: torch.device, size: tuple[int, int], strength: float) -> FrameModel:
    found = conditions_of(pipe, prompt, size)
    if found is None:
        whole = WholePipeline(pipe, prompt, device, size=size, strength=strength)
        whole.encode_once()
        return whole
    velocity = predicted_by(pipe.scheduler) == "v_prediction"
    levels = pipe.scheduler.alphas_cumprod.float()
    return PictureModel(pipe.unet, pipe.vae, found, levels, device, velocity=velocity, size=size, strength=strength)


def _load(identifier: str) -> Any:
    from diffusers import AutoPipelineForImage2Image, DiffusionPipeline
    from safetensors import SafetensorError

    offline = Path(identifier).is_dir() or not hub_answers(identifier, None, "give a folder or another hub id")
    try:
        with quiet_pipelines():
            parts = DiffusionPipeline.load_config(identifier, local_files_only=offline)
            # What a pipeline was saved without has to be named, or it is missed.
            absent = {name: None for name, part in parts.items() if part in ([None, None], (None, None))}
            return AutoPipelineForImage2Image.from_pretrained(
                identifier, dtype=torch.float32, local_files_only=offline, low_cpu_mem_usage=False, **absent
            )
    except ImportError as error:
        raise missing(error, "generate") or error from error
    except (*_UNFIT, OSError, SafetensorError) as error:
        raise InputError(f"--pipeline: {identifier}: cannot be had for image-to-image ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    """The library's words on one line; of many, the first and the last."""
    words = " ".join(f"{type(error).__name__}: {error}".split())
    return words if len(words) <= 240 else f"{words[:160]} ... {words[-70:]}"
