"""A toy world, encoded, as batches for a navigation world model: context and goal latents, actions, relative times."""

import tempfile
from pathlib import Path

from torch.utils.data import DataLoader

from halfstep.data.frames import open_frames
from halfstep.data.latents import NavigationLatents, SeededOrder
from halfstep.data.sources import SourceConfig
from halfstep.data.toy_world import write_toy_world
from halfstep.encode import EncodeOptions, encode

with tempfile.TemporaryDirectory() as scratch:
    world, latents = Path(scratch) / "world", Path(scratch) / "latents"
    write_toy_world(world, walks=4, frames=32)
    encode([SourceConfig(path=world)], EncodeOptions(latents))

    dataset = NavigationLatents(
        open_frames(latents),
        spacing=0.25,
        context_size=4,
        len_traj_pred=8,
        min_dist_cat=-8,
        max_dist_cat=8,
        goals_per_obs=4,
    )
    order = SeededOrder(len(dataset), seed=0, epoch=0, start=16)  # as if resumed after 16 samples
    frames, actions, rel_t = next(iter(DataLoader(dataset, batch_size=8, sampler=order)))
    print(
        f"{len(dataset)} samples; frames {list(frames.shape)}, actions {list(actions.shape)}, rel_t {list(rel_t.shape)}"
    )
