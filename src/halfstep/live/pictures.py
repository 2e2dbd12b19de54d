"""Pictures into other pictures, by an image-to-image pipeline of diffusers.

Its denoising steps are taken side by side: a call of the network takes the newest picture a first step and each of the
ones before it a further one, so that a frame costs one call however many steps it takes, and comes that many frames
late (Kodaira et al. 2023, "StreamDiffusion", arXiv 2312.12491, section 3.1).

Axes: S steps, C channels, h w latents, H height and W width of a picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from halfstep.autoencoders.hub import hub_answers, quiet_hub
from halfstep.errors import InputError
from halfstep.live.frames import Action, FrameSpec, Made, Network, Picture
from halfstep.sampling.noise import own_generator

_NEEDED = ("unet", "vae", "scheduler", "tokenizer", "text_encoder")


@dataclass(frozen=True)
class Passing:
    """Pictures on their way: noised latents [S - 1, C, h, w] that have 1 to S - 1 steps behind them, None before the
    first picture; and the seed of the noise, which is the same for all pictures, or they would flicker."""

    seed: int
    latents: torch.Tensor | None = None


class PictureModel:
    """`unet` between the encoder and the decoder of `vae`, for one prompt. `embedding` [1, L, D]: of the prompt;
    `levels`: abar of the scheduler's timesteps; `strength`: the share of them that a picture is noised by."""

    def __init__(
        self,
        unet: nn.Module,
        vae: Any,
        embedding: torch.Tensor,
        levels: torch.Tensor,
        prediction_type: str,
        device: torch.device,
        *,
        size: tuple[int, int],
        strength: float,
    ) -> None:
        self.network = _Denoiser(unet).to(device).eval()
        self._vae, self._device = vae.to(device).eval(), device
        self._embedding, self._levels = embedding.to(device), levels.to(device)
        self._velocity, self._strength = prediction_type == "v_prediction", strength
        width, height = size
        self.spec = FrameSpec(height, width, takes_actions=False, takes_pictures=True)

    def begin(self, seed: int) -> Made:
        """Grey: there is nothing to be seen before the first picture."""
        return Made(torch.zeros(3, self.spec.height, self.spec.width, device=self._device), Passing(seed))

    def predict(self, network: Network, state: Passing, given: Action | Picture | None, steps: int) -> Made:
        if not isinstance(given, np.ndarray):
            return Made(self.begin(state.seed).pixels, state)
        start = self._encode(given)
        timesteps = self._timesteps(steps)
        noise = torch.randn((steps, *start.shape[1:]), generator=own_generator(state.seed)).to(self._device)
        kept = state.latents
        if kept is None or len(kept) != steps - 1:  # the first picture stands in for those that never came
            kept = self._noised(start, noise[1:], timesteps[1:])
        x = torch.cat([self._noised(start, noise[:1], timesteps[:1]), kept])
        output = network(x, timesteps, self._embedding.expand(steps, -1, -1)).float()
        found = self._start_of(x, output, timesteps)
        return Made(self._decode(found[-1:]), Passing(state.seed, self._noised(found[:-1], noise[1:], timesteps[1:])))

    def _timesteps(self, steps: int) -> torch.Tensor:
        highest = round(self._strength * len(self._levels))
        return torch.linspace(highest, 0, steps + 1, device=self._device)[:-1].long().clamp(1) - 1

    def _noised(self, start: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        level = self._levels[timesteps].reshape(-1, 1, 1, 1)
        return level.sqrt() * start + (1 - level).sqrt() * noise

    def _start_of(self, x: torch.Tensor, output: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What a prediction of noise or velocity says that x is a noised version of."""
        level = self._levels[timesteps].reshape(-1, 1, 1, 1)
        if self._velocity:
            return level.sqrt() * x - (1 - level).sqrt() * output
        return (x - (1 - level).sqrt() * output) / level.sqrt()

    def _encode(self, picture: Picture) -> torch.Tensor:
        pixels = torch.tensor(picture, device=self._device).permute(2, 0, 1)[None].float() / 127.5 - 1
        encoded = self._vae.encode(pixels)
        latents: torch.Tensor = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latents
        scaled: torch.Tensor = latents * self._vae.config.scaling_factor
        return scaled

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        pixels: torch.Tensor = self._vae.decode(latents / self._vae.config.scaling_factor).sample[0]
        return pixels


class _Denoiser(nn.Module):
    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.unet(x, timesteps, encoder_hidden_states=embedding).sample
        return output


def open_pipeline(
    identifier: str, prompt: str, device: torch.device, *, size: tuple[int, int], strength: float
) -> PictureModel:
    """An image-to-image pipeline of diffusers by hub id or folder, in fp32; the prompt is encoded here, once.

    Raises InputError when it cannot be loaded, has no image-to-image form, or is not of a U-Net with one text encoder
    that predicts noise or velocity, which steps side by side need.
    """
    from diffusers import AutoPipelineForImage2Image

    offline = Path(identifier).is_dir() or not hub_answers(identifier, None, "give a folder or another hub id")
    try:
        with quiet_hub():
            pipe = AutoPipelineForImage2Image.from_pretrained(
                identifier, torch_dtype=torch.float32, local_files_only=offline, low_cpu_mem_usage=False
            )
    except (OSError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--pipeline: {identifier}: cannot be had for image-to-image ({reason})") from error
    kind = type(pipe).__name__
    lacking = [name for name in _NEEDED if getattr(pipe, name, None) is None]
    config = pipe.scheduler.config
    if lacking or getattr(pipe, "text_encoder_2", None) is not None or not hasattr(pipe.scheduler, "alphas_cumprod"):
        raise InputError(f"--pipeline: {identifier}: is a {kind}; expected one of a U-Net, as Stable Diffusion's are")
    if config.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"):
        raise InputError(f"--pipeline: {identifier}: predicts {config.prediction_type}; expected noise or velocity")
    factor = pipe.vae_scale_factor
    if size[0] % factor or size[1] % factor:
        raise InputError(f"--size: got {size[0]}x{size[1]}; {kind} needs multiples of {factor}")
    with torch.no_grad():
        embedding, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
    return PictureModel(
        pipe.unet,
        pipe.vae,
        embedding,
        pipe.scheduler.alphas_cumprod.float(),
        config.get("prediction_type", "epsilon"),
        device,
        size=size,
        strength=strength,
    )
