"""Record a sampler and analyse what it did: python record_and_analyse.py [FOLDER]

The model is a flow whose denoiser is known in closed form: each "prompt" is a mixture of Gaussians in the space of
latents [8, 16, 16], so that the sampling ODE can be solved without a network. Both prompts are sampled from the
same seeds, recorded with halfstep.sampling, and compared. Afterwards:

    halfstep analyze --batch-dir FOLDER/runs -o FOLDER/analysis --compare-storage
"""

import sys
from itertools import pairwise
from pathlib import Path

import torch

from halfstep.sampling import Step, StoreRecorder
from halfstep.store import TrajectoryStore, open_trajectories

SHAPE = (8, 16, 16)
SEEDS = range(10)
STEPS = 24
SHIFT = 3.0
SPREAD = 0.15  # of each Gaussian


def smooth_field(generator: torch.Generator) -> torch.Tensor:
    """A smooth random picture [8, 16, 16] of unit variance."""
    coarse = torch.randn((1, SHAPE[0], 4, 4), generator=generator)
    field = torch.nn.functional.interpolate(coarse, SHAPE[1:], mode="bicubic")[0]
    return field / field.std()


def prompts() -> dict[str, torch.Tensor]:
    """Each prompt's centres [n, 8, 16, 16]: "a red car" makes six rather different cars, "a blue car" three alike."""
    generator = torch.Generator().manual_seed(0)
    car = smooth_field(generator)
    red = torch.stack([0.8 * car + 0.6 * smooth_field(generator) for _ in range(6)])
    blue = torch.stack([0.9 * car + 0.3 * smooth_field(generator) for _ in range(3)])
    return {"a red car": red, "a blue car": blue}


def denoise(x: torch.Tensor, sigma: float, centres: torch.Tensor) -> torch.Tensor:
    """E[clean | x] for x = (1 - sigma) * clean + sigma * noise and clean from the mixture."""
    variance = ((1 - sigma) * SPREAD) ** 2 + sigma**2
    difference = x - (1 - sigma) * centres
    weights = torch.softmax(-difference.square().sum(dim=(1, 2, 3)) / (2 * variance), dim=0)
    posterior = centres + (1 - sigma) * SPREAD**2 / variance * difference
    return (weights.reshape(-1, 1, 1, 1) * posterior).sum(dim=0)


def sample(centres: torch.Tensor, seed: int, recorder: StoreRecorder) -> None:
    """Euler's method on the flow dx/dsigma = noise - clean (Lipman et al. 2023, eq. 23), from sigma 1 to 0."""
    even = torch.linspace(1, 0, STEPS + 1)
    sigmas = (SHIFT * even / (1 + (SHIFT - 1) * even)).tolist()  # slower where it is noisy, as video models have it
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    recorder.record(Step(0, 1000.0, 1.0, x))
    for k, (sigma, following) in enumerate(pairwise(sigmas), start=1):
        x = x + (following - sigma) * (x - denoise(x, sigma, centres)) / sigma
        recorder.record(Step(k, 1000 * following, following, x))


def main(folder: Path) -> None:
    store = TrajectoryStore.create(folder / "runs")
    for p, (prompt, centres) in enumerate(prompts().items()):
        for seed in SEEDS:
            with StoreRecorder(store, f"prompt_{p:03d}_vid{seed + 1:03d}", prompt=prompt, seed=seed) as recorder:
                sample(centres, seed, recorder)
    runs = open_trajectories(folder / "runs")
    states = sum(len(runs[key]) for key in runs)
    size = sum(path.stat().st_size for path in (folder / "runs").rglob("c.*"))
    print(f"{len(runs)} runs, {states} states, {size / (states * 4 * 8 * 16 * 16):.3f} of the bytes of fp32")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("recorded"))
