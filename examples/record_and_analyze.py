"""Record a sampler and see what it did: python record_and_analyze.py [FOLDER [exact]]

Two "prompts" of a toy model are sampled from the same seeds and recorded: "a moving car" makes six rather different
latents, "a parked car" three alike. The states are kept at the error of fp16, or exactly. Afterwards:

    halfstep analyze --batch-dir FOLDER/runs -o FOLDER/analysis

and, from exact states, what each way to keep them changes: the same with --compare-storage.
"""

import sys
from pathlib import Path

import torch

from halfstep.errors import HalfstepError
from halfstep.sampling import StoreRecorder, drive
from halfstep.sampling.toy_flow import ToyFlow, smooth_field
from halfstep.store import TrajectoryFormat, TrajectoryStore, open_trajectories

SHAPE = (8, 16, 16)


def models() -> dict[str, ToyFlow]:
    generator = torch.Generator().manual_seed(0)
    car = smooth_field(SHAPE, generator)
    return {
        "a moving car": ToyFlow(torch.stack([0.8 * car + 0.6 * smooth_field(SHAPE, generator) for _ in range(6)])),
        "a parked car": ToyFlow(torch.stack([0.9 * car + 0.3 * smooth_field(SHAPE, generator) for _ in range(3)])),
    }


def main(folder: Path, storage: str) -> None:
    form = TrajectoryFormat(storage=storage)
    store = TrajectoryStore.create(folder / "runs")
    for p, (prompt, model) in enumerate(models().items()):
        for seed in range(12):
            name = f"prompt_{p:03d}_vid{seed + 1:03d}"
            with StoreRecorder(store, name, format=form, prompt=prompt, seed=seed) as recorder:
                drive(model.sample(seed), [recorder])
    runs = open_trajectories(folder / "runs")
    states = sum(len(runs[key]) for key in runs)
    size = sum(path.stat().st_size for path in (folder / "runs").rglob("c.*"))
    print(f"{len(runs)} runs, {states} states, {size / (4 * states * torch.Size(SHAPE).numel()):.3f} of fp32's bytes")


if __name__ == "__main__":
    folder, *exact = sys.argv[1:] or ["recorded"]
    try:
        main(Path(folder), "fp32" if exact == ["exact"] else "fp16")
    except HalfstepError as error:
        sys.exit(str(error))
