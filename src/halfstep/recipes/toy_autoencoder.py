"""python -m halfstep.recipes.toy_autoencoder OUT: train the tiny autoencoder of the playground.

AutoencoderTiny of diffusers (TAESD, Bohan 2023): 4 channels, factor 8. It learns from crops by squared error; noise on
its latents teaches the decoder to bear the errors of whoever predicts them, and a penalty holds each channel near unit
variance.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from halfstep.autoencoders import to_pixels
from halfstep.data.toy_world import PLAYGROUND_SIZE, playground, render, walk
from halfstep.machine import device_name
from halfstep.precision import prepare, settle

CHANNELS, WIDTH = 4, 24
_PICTURES, _HELD_OUT = 6000, 200
_BATCH, _CROP = 16, 64
_RATE = 2e-3
_NOISE = 0.1  # of the latents' unit deviation
_PENALTY = 0.01


def pictures(number: int, seed: int) -> torch.Tensor:
    """Frames of walks through the playground, uint8 [number, H, W, 3]."""
    rng, world = np.random.default_rng(seed), playground()
    found: list[np.ndarray] = []
    while len(found) < number:
        walked = walk(world, 40, rng, play=True)
        found += [render(world, walked.position[k], float(walked.yaw[k]), PLAYGROUND_SIZE) for k in range(0, 40, 4)]
    return torch.from_numpy(np.stack(found[:number]))


def network() -> Any:
    from diffusers import AutoencoderTiny

    widths = (WIDTH,) * 4
    return AutoencoderTiny(
        latent_channels=CHANNELS, encoder_block_out_channels=widths, decoder_block_out_channels=widths
    )


def train(steps: int, frames: torch.Tensor) -> Any:
    """The trained network, in fp32."""
    torch.manual_seed(0)
    model = network()
    policy = settle("auto", "cpu", "train").policy
    prepare(model.encoder, policy)
    prepare(model.decoder, policy)
    optimizer = torch.optim.AdamW(model.parameters(), _RATE, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps, pct_start=0.05)
    rng = np.random.default_rng(0)
    height, width = frames.shape[1:3]
    started = time.monotonic()
    for step in range(1, steps + 1):
        chosen = frames[torch.from_numpy(rng.integers(len(frames), size=_BATCH))]
        y, x = int(rng.integers(height - _CROP + 1)), int(rng.integers(width - _CROP + 1))
        pixels = to_pixels(chosen[:, y : y + _CROP, x : x + _CROP])
        latents = model.encoder(pixels).float()
        shown = model.decoder(latents + _NOISE * torch.randn_like(latents)).float()
        error = (shown - pixels).square().mean()
        spread = latents.square().mean(dim=(0, 2, 3)) - 1
        (error + _PENALTY * spread.square().mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 200 == 0:
            sys.stderr.write(
                f"step {step}, {time.monotonic() - started:.0f} s, {-10 * math.log10(float(error) / 4):.2f} dB\n"
            )
    plain = network()
    plain.load_state_dict(model.state_dict())
    return plain.eval()


@torch.no_grad()
def judge(model: Any, frames: torch.Tensor) -> dict[str, Any]:
    """PSNR (dB) of whole pictures, clipped and rounded, and what the latents are like."""
    errors, latents = [], []
    for batch in torch.split(frames, 20):
        z = model.encoder(to_pixels(batch))
        shown = ((model.decoder(z) + 1) * 127.5).round().clamp(0, 255)
        errors += [float((a - b).square().mean()) for a, b in zip(shown.movedim(1, -1), batch.float(), strict=True)]
        latents.append(z)
    all_latents = torch.cat(latents)
    return {
        "psnr": round(10 * math.log10(255**2 / float(np.mean(errors))), 2),
        "mean": [round(float(v), 3) for v in all_latents.mean(dim=(0, 2, 3))],
        "deviation": [round(float(v), 3) for v in all_latents.std(dim=(0, 2, 3))],
    }


def main(output: Path, steps: Annotated[int, typer.Option(min=100)] = 6000) -> None:
    """Train and write the folder OUTPUT, as diffusers loads it, with weights in fp16 and facts.json beside them."""
    started = time.monotonic()
    model = train(steps, pictures(_PICTURES, seed=0))
    held_out = pictures(_HELD_OUT, seed=1)
    facts = judge(model, held_out)
    model.register_to_config(scaling_factor=round(1 / float(np.mean(facts["deviation"])), 4))
    model.half().save_pretrained(output)
    config = json.loads((output / "config.json").read_text())
    del config["block_out_channels"]  # which the library writes, and warns of when it reads it
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    facts = {
        **judge(model.float(), held_out),
        "steps": steps,
        "seconds": round(time.monotonic() - started),
        "device": device_name(torch.device("cpu")),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    (output / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    sys.stderr.write(f"{output}: {facts}\n")


if __name__ == "__main__":
    typer.run(main)
