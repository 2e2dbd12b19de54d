"""Train a small PeakNet on simulated frames of a detector. These are the weights that halfstep brings for its demo.

python train_peaknet.py peaknet_small.safetensors [--steps 4000]
"""

import argparse
import copy
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch.nn import functional
from torch.optim.swa_utils import get_ema_multi_avg_fn

from halfstep.data.diffraction import diffraction_frame, truth_mask
from halfstep.files import write_durably
from halfstep.models import PeakNet
from halfstep.stream import Preparation
from halfstep.stream.peaks import find_peaks, match_peaks

SIZES = {
    "backbone_hidden_sizes": (16, 24, 32, 48),
    "backbone_depths": (2, 1, 1, 1),
    "bifpn_num_blocks": 1,
    "bifpn_num_features": 24,
    "seg_out_channels": 64,
    "uses_learned_upsample": True,  # edges to a pixel, not to four
}
PIXELS = 4 * 256**2  # of a batch
LEARNING_RATE, WARMUP, EMA_DECAY = 5e-3, 100, 0.998


def make_batch(rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames [B, 1, H, W] as the network takes them, and 1 where it shall find peaks."""
    side = int(rng.choice([128, 256, 512], p=[0.25, 0.5, 0.25]))
    frames, truths = [], []
    for _ in range(PIXELS // side**2):
        gain, pedestal = 10 ** rng.uniform(0, 1.5), rng.uniform(0, 1000)
        frame = diffraction_frame(rng, (side, side), hit=rng.random() < 0.7, gain=gain, pedestal=pedestal)
        held, truth = torch.from_numpy(frame.mask), torch.from_numpy(truth_mask(frame)).float()
        values = Preparation(mask=frame.mask)(frame.values[None])[0, 0]
        if rng.random() < 0.06:  # a panel that is not read out
            values, truth = torch.zeros_like(values), torch.zeros_like(truth)
        if rng.random() < 0.8:  # normalized together with other panels, which may be fainter or brighter
            values = values * 2 ** rng.uniform(-1, 1) + rng.normal(0, 0.3)
        frames.append(torch.where(held, values, 0.0))
        truths.append(truth)
    return torch.stack(frames)[:, None], torch.stack(truths)[:, None]


def loss_of(margin: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Cross entropy, by which each frame counts nearly the same whether it has many peaks or none, and Dice (Milletari
    et al. 2016, arXiv:1606.04797), to which the many pixels that are easy do not count."""
    entropy = functional.binary_cross_entropy_with_logits(margin, truth, reduction="none").sum(dim=(1, 2, 3))
    share = margin.sigmoid()
    dice = 1 - 2 * (share * truth).sum() / (share.sum() + truth.sum() + 1)
    return (entropy / (100 * (truth.sum(dim=(1, 2, 3)) + 30)).sqrt()).mean() + dice


@torch.inference_mode()
def score(network: PeakNet, side: int, frames: int) -> str:
    """How many of the peaks it finds, and how many of those found are some, on frames that it was not trained on."""
    fused, right, found, there = network.fused().eval(), 0, 0, 0
    for seed in range(10_000, 10_000 + frames):
        frame = diffraction_frame(np.random.default_rng(seed), (side, side))
        margin = fused(Preparation(mask=frame.mask)(frame.values[None]))
        peaks = find_peaks(margin[0].numpy() > 0)
        right += match_peaks(peaks[:, 1:], frame.peaks)
        found, there = found + len(peaks), there + len(frame.peaks)
    return f"{side} x {side}: recall {right / max(there, 1):.4f}, precision {right / max(found, 1):.4f}"


def main(output: Path, steps: int) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    network = PeakNet(**SIZES)
    ema, average = copy.deepcopy(network), get_ema_multi_avg_fn(EMA_DECAY)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    begin = time.perf_counter()
    for step in range(steps):
        frames, truth = make_batch(rng)
        logits = network(frames)
        loss = loss_of(logits[:, 1:] - logits[:, :1], truth)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average(list(ema.parameters()), list(network.parameters()), step)
        if step % 100 == 99 or step == steps - 1:
            print(f"step {step + 1}: loss {loss.item():.3f}, {time.perf_counter() - begin:.0f} s", flush=True)
    write_durably(output, save(ema.state_dict()))
    for side in (256, 512):
        print(score(ema, side, frames=min(steps, 100)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=4000)
    main(**vars(parser.parse_args()))
