"""Pictures into other pictures, by an image-to-image pipeline of diffusers.

Its denoising steps are taken side by side: a call of the network takes the newest picture a first step and each of the
ones before it a further one, so that a frame costs one call however many steps it takes, and comes that many frames
late (Kodaira et al. 2023, "StreamDiffusion", arXiv 2312.12491, section 3.1).

Axes: S steps, C channels, h w latents, H height and W width of a picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from halfstep.live.frames import Action, FrameSpec, Made, Network, Picture
from halfstep.sampling.noise import own_generator

_NEEDED = ("unet", "vae", "scheduler", "tokenizer", "text_encoder")
_PREDICTED = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class Passing:
    """Pictures on their way: noised latents [S - 1, C, h, w] that have 1 to S - 1 steps behind them, None before the
    first picture; and the seed of the noise, which is the same for all pictures, or they would flicker."""

    seed: int
    latents: torch.Tensor | None = None


class PictureModel:
    """`unet` between the encoder and the decoder of `vae`, for one prompt. `conditions`: of `conditions_of`;
    `levels`: abar of the scheduler's timesteps; `velocity`: that is predicted, not noise; `strength`: the share of the
    levels that a picture is noised by."""

    def __init__(
        self,
        unet: nn.Module,
        vae: Any,
        conditions: tuple[torch.Tensor, ...],
        levels: torch.Tensor,
        device: torch.device,
        *,
        velocity: bool,
        size: tuple[int, int],
        strength: float,
    ) -> None:
        self.network: nn.Module = _Denoiser(unet).to(device).eval()
        self._vae, self._device = vae.to(device).eval(), device
        self._conditions, self._levels = [told.to(device) for told in conditions], levels.to(device)
        self._velocity, self._strength = velocity, strength
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
        told = [one.expand(steps, *one.shape[1:]) for one in self._conditions]
        output = network(x, timesteps, *told).float()
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

    def forward(
        self, x: torch.Tensor, timesteps: torch.Tensor, embedding: torch.Tensor, *added: torch.Tensor
    ) -> torch.Tensor:
        more = {"added_cond_kwargs": dict(zip(("text_embeds", "time_ids"), added, strict=True))} if added else {}
        output: torch.Tensor = self.unet(x, timesteps, encoder_hidden_states=embedding, **more).sample
        return output


def predicted_by(scheduler: Any) -> str:
    """What a network predicts, as diffusers calls it."""
    predicted: str = scheduler.config.get("prediction_type", "epsilon")
    return predicted


def conditions_of(pipe: Any, prompt: str, size: tuple[int, int]) -> tuple[torch.Tensor, ...] | None:
    """What the U-Net of an image-to-image pipeline is told of `prompt` besides the timestep, each [1, ...]: the
    embedding, and of Stable Diffusion XL (Podell et al. 2023, arXiv 2307.01952, section 2.2) its pooled form and the
    picture's size. None where steps side by side are not for it: another network, another sampler, or more to be
    told."""
    unet = getattr(pipe, "unet", None)
    if unet is None or any(getattr(pipe, name, None) is None for name in _NEEDED) or hasattr(pipe, "controlnet"):
        return None
    told = unet.config.get("addition_embed_type")
    xl = getattr(pipe, "text_encoder_2", None) is not None and told == "text_time"
    if not hasattr(pipe.scheduler, "alphas_cumprod") or unet.config.get("time_cond_proj_dim") or bool(told) != xl:
        return None
    if pipe.vae.config.get("latents_mean") is not None or predicted_by(pipe.scheduler) not in _PREDICTED:
        return None
    with torch.no_grad():
        if not xl:
            embedding, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
            return (embedding,)
        embedding, _, pooled, _ = pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
    width, height = size
    sizes = [height, width, 0, 0, height, width]  # before a crop, its place, and after it
    return embedding, pooled, torch.tensor([sizes], dtype=torch.float32)
