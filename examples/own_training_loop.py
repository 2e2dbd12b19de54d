"""EqM in a loop of one's own: latents of a toy world, the loss, and the sampler, at the precision that is asked for,
with the loss scale and the checks that training in half needs.

python own_training_loop.py [fp32|bf16-mixed|16-mixed|auto]
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
from halfstep.precision import LossScale, Movement, check_scale, check_types, prepare, settle
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
    scale = LossScale(policy, "cpu")  # does nothing to the loss in a policy without one
    weights = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0, fused=True)
    labels = torch.zeros(BATCH, dtype=torch.int64)
    for step in range(STEPS):
        batch = latents[torch.randint(len(latents), (BATCH,))]
        loss = eqm_loss(model, batch, labels).mean()
        scale.backward(loss)
        looking = step % 50 == 49  # only then is the device waited for
        movement = Movement(weights) if looking else None
        scale.step(optimizer)
        if movement is not None:
            print(f"step {step + 1}: loss {loss.item():.3f}, {int(scale.skipped)} updates left out, in {scale.policy}")
            for line in [*check_scale(scale), *check_types(model), *movement.stalled(optimizer).lines()]:
                print(line)
            if scale.collapsed:
                scale.to_bf16(model)
        optimizer.zero_grad()
    noise = torch.randn(4, channels, height, width)
    samples = drive(sample_eqm(GuidedField(model.eval(), labels[:4]), noise, updates=49, step_size=0.0085))
    print(f"latents {latents.mean():.2f} +- {latents.std():.2f}, samples {samples.mean():.2f} +- {samples.std():.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
