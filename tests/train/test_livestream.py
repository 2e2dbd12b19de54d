"""livestream through the one loop: killed and gone on with, from latents and from pixels, to a walk."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halfstep.data.frames import open_frames
from halfstep.errors import InputError
from halfstep.live.opening import open_walk
from halfstep.models import read_checkpoint
from halfstep.sample import SampleOptions, sample
from halfstep.store import TrajectoryStore
from halfstep.train.data import open_data
from halfstep.train.loop import train
from tests.support.cli import run_cli, run_script
from tests.support.training import assert_same, config, log, run_folder
from tests.train.test_loop import DYING_RUN

SIZES = {"network": "livestream", "hidden_size": 16, "depth": 2, "num_heads": 2}
STREAM: dict[str, Any] = {"model": SIZES, "context_size": 2, "metric_waypoint_spacing": 0.25, "sigma_data": 1.5}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"precision": "bf16-true", "activation_budget": 0.5}])
def test_a_killed_run_goes_on_exactly_and_walks(tmp_path: Path, latents: Path, changes: dict[str, Any]) -> None:
    chosen: dict[str, Any] = {**STREAM, "steps": 30, "ckpt_every": 5, **changes}
    train(config(tmp_path / "whole", latents, **chosen))
    parts = config(tmp_path / "parts", latents, **chosen)
    run_script(DYING_RUN, parts.model_dump_json(), 17, 1, check=-signal.SIGKILL)
    train(parts)
    assert_same(run_folder(tmp_path / "parts"), run_folder(tmp_path / "whole"))
    losses = [record["loss"] for record in log(tmp_path / "parts")]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert read_checkpoint(tmp_path / "parts" / "run").about.name == "livestream of depth 2, width 16, 2 heads"

    walks: dict[str, Any] = {"number": 2, "data_path": latents, "frames": 3, "device": "cpu"}
    made = sample(SampleOptions(tmp_path / "parts" / "run", tmp_path / "out", **walks, record=True))
    assert (made.made, made.updates) == (2, 3)
    settings = json.loads((tmp_path / "out" / "samples.json").read_text())["settings"]
    assert (settings["steps"], settings["sampler"]) == (3, None)
    store = TrajectoryStore.open(tmp_path / "out" / "runs")
    assert sorted(store) == [f"00000{n}-00{s}" for n in range(2) for s in range(3)]
    assert len(store["000001-002"].latents) == 4
    again = sample(SampleOptions(tmp_path / "parts" / "run", tmp_path / "out", **walks, record=True))
    assert (again.made, again.there) == (0, 2)


@pytest.mark.slow
def test_pixels_are_encoded_on_the_way(tmp_path: Path, toy_world: Path, latents: Path) -> None:
    """The same as from their latents."""
    train(config(tmp_path / "pixels", toy_world, **STREAM, image_size=32))
    train(config(tmp_path / "latents", latents, **STREAM))
    ours, theirs = log(tmp_path / "pixels"), log(tmp_path / "latents")
    np.testing.assert_allclose([r["loss"] for r in ours], [r["loss"] for r in theirs], rtol=1e-4)
    saved = read_checkpoint(tmp_path / "pixels" / "run").about
    assert (saved.config["in_channels"], saved.config["sigma_data"], saved.spacing) == (16, 1.5, 0.25)


@pytest.mark.slow
def test_pixels_need_no_autoencoder(tmp_path: Path, toy_world: Path) -> None:
    """Frames as they are: trained on, walked on from, and walked through."""
    train(config(tmp_path, toy_world, **{**STREAM, "sigma_data": 0.5}, autoencoder="pixels", image_size=16))
    about = read_checkpoint(tmp_path / "run").about
    assert (about.config["in_channels"], about.config["input_size"]) == (3, (16, 16))
    run_cli("encode", "-i", toy_world, "-o", tmp_path / "frames", "--autoencoder", "pixels", "--size", "16x16")
    walks: dict[str, Any] = {"number": 1, "data_path": tmp_path / "frames", "frames": 2, "device": "cpu"}
    assert sample(SampleOptions(tmp_path / "run", tmp_path / "out", **walks)).made == 1
    begun = open_walk(tmp_path / "run", torch.device("cpu"), data_path=tmp_path / "frames").begin(0).pixels
    first = open_frames(tmp_path / "frames")
    np.testing.assert_array_equal(begun, first.read(first.keys()[0], 1, 2)[0])


@pytest.mark.slow
def test_by_its_name_on_the_command_line(tmp_path: Path, latents: Path) -> None:
    options = "--steps 1 --global-batch-size 4 --precision fp32 --set metric_waypoint_spacing=0.25"
    result = run_cli("train", "--model", "livestream-S", "--data-path", latents, *options.split(), cwd=tmp_path)
    assert "livestream-S after 1 steps in fp32" in result.stdout
    command = ["sample", "--ckpt", "results/livestream-S", "-o", "out", "-n", 1, "--data-path", latents, "--frames", 2]
    assert "1 updates each" in run_cli(*command, "--steps", 1, cwd=tmp_path).stdout


def test_it_learns_the_next_frame(latents: Path, tmp_path: Path) -> None:
    """In steps of the recording, whatever the goals of a CDiT are by default."""
    data = open_data(config(tmp_path, latents, **STREAM), 1)
    frames, actions, rel_t = data.datasets[0][3]
    assert (frames.shape, actions.shape) == ((3, 16, 4, 4), (1, 3))
    assert rel_t.tolist() == [1 / 128]
    assert len(data) == 3 * (10 - 2)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"distance": {"min_dist_cat": 1, "max_dist_cat": 4}}, "distance is not a setting of livestream"),
        ({"goals_per_obs": 2}, "goals_per_obs is not a setting of livestream"),
        ({"clip_len": 2}, "clip_len is not a setting of livestream"),
        ({"model": {**SIZES, "patch_size": 4}}, "model.patch_size is not a size of livestream"),
        ({"model": "livestream-XL"}, r"got 'livestream-XL'; expected livestream-\{S,M,L\}"),
        ({"model": "EqM-S/2", "sigma_data": 1.0}, "is not a setting of EqM"),
        ({"history_noise": -1}, "history_noise: got -1"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, latents: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        train(config(tmp_path, latents, **{**STREAM, **changes}))


@pytest.mark.slow
def test_mistakes_of_sampling_are_named(tmp_path: Path, latents: Path) -> None:
    train(config(tmp_path, latents, **{**STREAM, "steps": 1}))
    for changes, told in [
        ({"guidance_scale": 2.0}, "--cfg-scale is not an option of livestream"),
        ({"sampler": "ddim"}, "got 'ddim'; livestream has euler"),
        ({"data_path": None}, "--data-path: not given; a livestream walks on"),
        ({"steps": 1001}, "steps: got 1001; expected 1 to 1000"),
        ({"steps": 0}, "--steps are at least 1"),
    ]:
        values: dict[str, Any] = {"data_path": latents, "device": "cpu", **changes}
        with pytest.raises(InputError, match=told):
            sample(SampleOptions(tmp_path / "run", tmp_path / "out", **values))
        assert not (tmp_path / "out").exists()
