"""Walking through a CDiT: keys become actions, and the same seed and keys make the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halfstep.autoencoders import load_autoencoder
from halfstep.data.navigation import to_actions
from halfstep.data.sources import SourceConfig
from halfstep.data.toy_world import write_toy_world
from halfstep.encode import EncodeOptions, encode
from halfstep.errors import InputError
from halfstep.live import STILL, Action, LiveEngine, WalkModel
from halfstep.live.opening import open_walk
from halfstep.models import About, Checkpoint
from tests.live.worlds import CPU

CONFIG: dict[str, Any] = {
    "input_size": (3, 4), "context_size": 2, "patch_size": 1, "hidden_size": 24, "depth": 1, "num_heads": 2,
    "in_channels": 16, "predicted": "velocity", "action_scale": 100.0, "positions": "sinusoidal",
}  # fmt: skip


def tiny_checkpoint() -> Checkpoint:
    """Random weights, the last layers too."""
    about = About("CDiT", CONFIG, load_autoencoder("dct8").spec, spacing=0.25)
    torch.manual_seed(0)
    weights = {name: torch.randn_like(value) * 0.2 for name, value in about.build().state_dict().items()}
    return Checkpoint(Path("tiny"), about, weights)


def walker(step: float = 0.25) -> WalkModel:
    starts = torch.randn(3, 2, 16, 3, 4, generator=torch.Generator().manual_seed(1))
    return WalkModel(tiny_checkpoint(), load_autoencoder("dct8"), starts, CPU, step=step, spacing=0.25)


def test_the_same_seed_and_keys_make_the_same_bits() -> None:
    engine = LiveEngine(walker(), CPU, steps=2)
    keys = [Action(forward=1), Action(forward=1, turn=1), STILL, Action(turn=-1)]

    def pictures(seed: int) -> np.ndarray:
        return np.stack([engine.reset(seed).picture, *(engine.step(key).picture for key in keys)])

    first = pictures(4)
    assert first.shape == (5, 24, 32, 3)
    assert not np.array_equal(pictures(5), first)
    assert np.array_equal(pictures(4), first)
    assert not np.array_equal(pictures(4 + 3)[1:], first[1:])  # the same beginning, other noise
    assert np.array_equal(pictures(4 + 3)[0], first[0])


def test_a_frame_follows_from_what_is_pressed_and_from_what_was_seen() -> None:
    model = walker()
    state = model.begin(0).state
    made = {key: model.predict(model.network, state, key, 2) for key in (STILL, Action(forward=1), Action(turn=1))}
    assert len({tuple(one.pixels.flatten()[:50].tolist()) for one in made.values()}) == 3
    after = made[STILL].state
    assert torch.equal(after.context[:, 0], state.context[:, 1]) and after.number == 1
    assert after.context.dtype == torch.float32 and torch.equal(state.context, model.begin(0).state.context)


def test_a_livestream_is_walked_through_too() -> None:
    config = {"input_size": (3, 4), "context_size": 2, "hidden_size": 16, "depth": 1, "num_heads": 2, "in_channels": 16}
    about = About("livestream", config, load_autoencoder("dct8").spec, spacing=0.25)
    torch.manual_seed(0)
    weights = {name: torch.randn_like(value) * 0.2 for name, value in about.build().state_dict().items()}
    starts = torch.randn(1, 2, 16, 3, 4)
    model = WalkModel(
        Checkpoint(Path("tiny"), about, weights), load_autoencoder("dct8"), starts, CPU, step=0.25, spacing=0.25
    )
    frames = {}
    for precision in ("fp32", "bf16"):
        engine = LiveEngine(model, CPU, steps=2, precision=precision)
        engine.reset()
        frames[precision] = [engine.step(key).picture.astype(float) for key in (Action(forward=1), Action(turn=1))]
    assert np.abs(frames["fp32"][0] - frames["fp32"][1]).mean() > 1
    assert np.abs(frames["bf16"][0] - frames["fp32"][0]).mean() < 0.1 * frames["fp32"][0].std()


def test_keys_are_the_actions_of_training() -> None:
    model, seen = walker(step=0.5), []

    def network(x: torch.Tensor, t: torch.Tensor, actions: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        seen.append(actions)
        result: torch.Tensor = model.network(x, t, actions, *rest)
        return result

    model.predict(network, model.begin(0).state, Action(forward=-1, left=0.5, turn=1), 1)
    expected = to_actions(np.array([[-0.5, 0.25, 0.15]]), 0.25)
    np.testing.assert_allclose(seen[0].numpy(), expected, rtol=1e-6)


def test_half_types_stay_near() -> None:
    frames = {}
    for precision in ("fp32", "bf16", "fp16"):
        engine = LiveEngine(walker(), CPU, steps=2, precision=precision)
        engine.reset(1)
        frames[precision] = engine.step(Action(forward=1)).picture.astype(float)
        engine.close()
    spread = frames["fp32"].std()
    assert 0 < np.abs(frames["bf16"] - frames["fp32"]).mean() < 0.1 * spread
    assert np.abs(frames["fp16"] - frames["fp32"]).mean() < 0.02 * spread  # eight times as fine


def test_the_shipped_world_opens() -> None:
    model = open_walk(None, CPU)
    assert (model.spec.width, model.spec.height) == (128, 96)
    engine = LiveEngine(model, CPU, steps=2)
    still = engine.reset(0).picture.astype(float)
    turned = engine.step(Action(turn=1)).picture.astype(float)
    assert np.abs(turned - still).mean() > 5
    assert still.std() > 20 and turned.std() > 20  # a picture, not a fog


def test_a_world_of_ones_own(tmp_path: Path) -> None:
    write_toy_world(tmp_path / "world", walks=1, frames=6)
    encode([SourceConfig(path=tmp_path / "world")], EncodeOptions(tmp_path / "latents", size=(32, 24)))
    folder = tmp_path / "ckpt"
    folder.mkdir()
    from safetensors.torch import save_file

    checkpoint = tiny_checkpoint()
    about = About("CDiT", CONFIG, None, spacing=0.5)
    save_file(checkpoint.weights, folder / "model.safetensors", about.to_metadata())
    with pytest.raises(InputError, match="--data-path: not given"):
        open_walk(folder, CPU)
    model = open_walk(folder, CPU, data_path=tmp_path / "latents")
    frames = [LiveEngine(model, CPU, steps=1, seed=seed).reset().picture for seed in range(5)]
    assert len({frame.tobytes() for frame in frames}) == 5  # five places to begin in six frames


def test_a_network_without_actions_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    config = {"input_size": (4, 4), "patch_size": 2, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 1}
    about = About("EqM", {**config, "in_channels": 16})
    save_file(about.build().state_dict(), tmp_path / "model.safetensors", about.to_metadata())
    with pytest.raises(InputError, match="which takes no actions; expected a model of walks"):
        open_walk(tmp_path, CPU)
