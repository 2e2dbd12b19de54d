"""Opening an image-to-image pipeline of diffusers, and those that can only be called whole."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from halfstep.autoencoders.hub import hub_answers, quiet_pipelines
from halfstep.errors import InputError
from halfstep.extras import missing
from halfstep.live.frames import Action, FrameModel, FrameSpec, Made, Network, Picture
from halfstep.live.pictures import PictureModel, conditions_of
from halfstep.sampling.noise import own_generator

_NETWORKS = ("transformer", "unet")


class WholePipeline:
    """Calls `pipe` for each picture, in so many steps and with the same noise; the prompt is encoded once and the text
    encoders are let go. `strength`: the share of the noise levels that a picture is noised by, as near as so many steps
    come to it; pipelines that edit pictures have none. Guidance that costs a second call of the network is off.

    Raises InputError when a grey picture does not come through.
    """

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
        pipe.encode_prompt = _once(pipe.encode_prompt)
        grey = np.full((height, width, 3), 128, np.uint8)
        try:
            made = self.predict(self.network, 0, grey, 1)
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            what = f"a prompt and a picture of {width}x{height}"
            raise InputError(f"--pipeline: {type(pipe).__name__} makes nothing of {what} ({reason})") from error
        if tuple(made.pixels.shape) != (3, height, width):
            found = "x".join(str(side) for side in (*made.pixels.shape[:0:-1],))
            raise InputError(f"--size: got {width}x{height}; {type(pipe).__name__} makes {found} of it: give that")
        for encoder in [name for name in pipe.components if name.startswith("text_encoder")]:
            setattr(pipe, encoder, None)

    def begin(self, seed: int) -> Made:
        """Grey: there is nothing to be seen before the first picture."""
        return Made(torch.zeros(3, self.spec.height, self.spec.width, device=self._device), seed)

    def predict(self, network: Network, state: int, given: Action | Picture | None, steps: int) -> Made:
        if not isinstance(given, np.ndarray):
            return Made(self.begin(state).pixels, state)
        self._stand.network = network
        with torch.no_grad():
            images = self._pipe(
                image=Image.fromarray(given),
                generator=own_generator(state),
                output_type="pt",
                return_dict=False,
                **self._schedule(steps),
                **self._fixed,
            )[0]
        return Made(images[0].float() * 2 - 1, state)

    def _arguments(self, prompt: str) -> dict[str, Any]:
        """Of every call, as far as the pipeline has them."""
        wanted: dict[str, Any] = {"prompt": prompt, "height": self.spec.height, "width": self.spec.width}
        if not self._stand.config.get("guidance_embeds", False):  # which is told its guidance in the same call
            wanted["guidance_scale"] = 1.0
        return {name: value for name, value in wanted.items() if name in self._takes}

    def _schedule(self, steps: int) -> dict[str, Any]:
        if "strength" not in self._takes:
            return {"num_inference_steps": steps}
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

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module: Any = module

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        output = self.module(*args, **{**kwargs, "return_dict": False})[0]
        return output.float() if isinstance(output, torch.Tensor) else output


class _Stand:
    """Stands in a pipeline for its network: calls `network`, and for all else is the one in fp32."""

    def __init__(self, exact: _TensorsOut) -> None:
        self.network: Network = exact
        self._exact = exact.module

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        if kwargs.pop("return_dict", True):
            raise TypeError("the pipeline asks for its network's own kind of output")
        return (self.network(*args, **kwargs),)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._exact, name)


def _once(encode: Callable[..., Any]) -> Callable[..., Any]:
    """`encode`, called the first time only."""
    found: list[Any] = []

    def encoded(*args: Any, **kwargs: Any) -> Any:
        if not found:
            found.append(encode(*args, **kwargs))
        return found[0]

    return encoded


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
        raise InputError(
            f"--pipeline: {identifier}: is a {kind}; expected one of a transformer or a U-Net and a prompt"
        )
    factor = getattr(pipe, "vae_scale_factor", 1)
    if size[0] % factor or size[1] % factor:
        raise InputError(f"--size: got {size[0]}x{size[1]}; {kind} needs multiples of {factor}")
    found = conditions_of(pipe, prompt, size)
    if found is None:
        return WholePipeline(pipe, prompt, device, size=size, strength=strength)
    predicts = pipe.scheduler.config.get("prediction_type", "epsilon")
    if predicts not in ("epsilon", "v_prediction"):
        raise InputError(f"--pipeline: {identifier}: predicts {predicts}; expected noise or velocity")
    levels = pipe.scheduler.alphas_cumprod.float()
    return PictureModel(pipe.unet, pipe.vae, found, levels, predicts, device, size=size, strength=strength)


def _load(identifier: str) -> Any:
    from diffusers import AutoPipelineForImage2Image

    offline = Path(identifier).is_dir() or not hub_answers(identifier, None, "give a folder or another hub id")
    try:
        with quiet_pipelines():
            return AutoPipelineForImage2Image.from_pretrained(
                identifier, dtype=torch.float32, local_files_only=offline, low_cpu_mem_usage=False
            )
    except ImportError as error:
        raise missing(error, "generate") or error from error
    except (OSError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--pipeline: {identifier}: cannot be had for image-to-image ({reason})") from error
