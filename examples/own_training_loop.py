"""EqM in a loop of one's own: latents of a toy world, the loss, and the sampler, at the precision that is asked for.

python own_training_loop.py [fp32|bf16-mixed|auto]
"""

import sys
import tempfile
from pathlib import Path

import torch

from halfstep.data.sources import SourceConfig
from halfstep.data.toy_world import write_toy_world
from halfstep.encode import EncodeOptions, encode
from halfstep.models import EqM
from halfstep.models.objectives import eqm_loss
from halfstep.precision import prepare, settle
from halfstep.sampling import GuidedField, drive, sample_eqm
from halfstep.store import DatasetStore

STEPS, BATCH = 150, 16


def toy_latents(folder: Path) -> torch.Tensor:
    write_toy_world(folder / "world", walks=4, frames=32)
    encode([SourceConfig(path=folder / "world")], EncodeOptions(folder / "latents"))
    store = DatasetStore.open(folder / "latents")
    return torch.cat([torch.from_numpy(store.read(key)).float() for key in store.keys()])


def main(precision: str = "fp32") -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        latents = toy_latents(Path(scratch))
    _, channels, height, width = latents.shape
    model = EqM((height, width), 4, 128, 3, 4, num_classes=1, in_channels=channels)
    policy = settle(precision, "cpu", "train").policy
    prepare(model.train(), policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0, fused=True)
    labels = torch.zeros(BATCH, dtype=torch.int64)
    for step in range(STEPS):
        batch = latents[torch.randint(len(latents), (BATCH,))]
        loss = eqm_loss(model, batch, labels).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            print(f"step {step + 1}: loss {loss.item():.3f} in {policy}")
    noise = torch.randn(4, channels, height, width)
    samples = drive(sample_eqm(GuidedField(model.eval(), labels[:4]), noise, updates=49, step_size=0.0085))
    print(f"latents {latents.mean():.2f} +- {latents.std():.2f}, samples {samples.mean():.2f} +- {samples.std():.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
