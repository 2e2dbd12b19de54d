"""Evaluation against plain oracles: Gaussians, pictures with known noise, planners with known goals."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.linalg import sqrtm
from torch import nn

from halfstep.data.outputs import write_npz
from halfstep.data.sources import SourceConfig
from halfstep.data.toy_world import write_toy_world
from halfstep.encode import EncodeOptions, encode
from halfstep.errors import InputError, NumericsError
from halfstep.evaluate.energy import compare_energies
from halfstep.evaluate.fid import fid
from halfstep.evaluate.pictures import PictureMetrics
from halfstep.evaluate.planning import cross_entropy_method
from halfstep.evaluate.walks import WalkOptions, evaluate_walks
from halfstep.models import EqM, read_checkpoint
from halfstep.sampling import Prediction, SamplerState, energy_score
from halfstep.store import DatasetStore
from halfstep.train.config import TrainConfig
from halfstep.train.loop import train
from tests.support.cli import run_cli
from tests.support.training import SMALL, SMALL_CDIT, WALKS


class Corners(nn.Module):
    """Eight numbers of a picture, far from zero mean so that fp32 sums would lose the covariance."""

    num_features = 8

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures[:, 0, 0, :8].double() + 1e5


def some_pictures(count: int, seed: int, spread: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((count, 8)) @ rng.standard_normal((8, 8)) * spread + 128
    pictures = np.zeros((count, 8, 8, 3), np.uint8)
    pictures[:, 0, :, 0] = mixed.clip(0, 255).astype(np.uint8)
    return pictures


def test_fid_is_the_frechet_distance_of_the_features(tmp_path: Path) -> None:
    a, b = some_pictures(70, 0, 8), some_pictures(40, 1, 14)
    (tmp_path / "a").mkdir()
    for number, picture in enumerate(a):
        Image.fromarray(picture).save(tmp_path / "a" / f"{number:06d}.png")
    Image.fromarray(a[0]).resize((99, 99)).save(tmp_path / "a" / "contact_sheet.png")  # which is no sample
    write_npz(tmp_path / "b.npz", iter(b), b.shape)
    report = fid(tmp_path / "a", tmp_path / "b.npz", features=Corners())
    assert (report.pictures_a, report.pictures_b) == (70, 40)
    features = [side[:, 0, :, 0].astype(np.float64) for side in (a, b)]
    means, covariances = [f.mean(axis=0) for f in features], [np.cov(f, rowvar=False) for f in features]
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert report.fid == pytest.approx(expected, rel=1e-3)
    assert fid(tmp_path / "a", tmp_path / "a", features=Corners()).fid == pytest.approx(0, abs=1e-2)


def test_fid_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "one" / "0.png")
    with pytest.raises(InputError, match="holds 1 pictures; a covariance needs two"):
        fid(tmp_path / "one", tmp_path / "one", features=Corners())
    Image.new("RGB", (9, 8)).save(tmp_path / "one" / "1.png")
    with pytest.raises(InputError, match=r"1.png: is 9x8, others are 8x8"):
        fid(tmp_path / "one", tmp_path / "one", features=Corners())
    for bad in (np.zeros((3, 4)), np.zeros((3, 8, 8, 4), np.uint8), np.zeros((3, 3, 8, 8), np.uint8)):
        np.savez(tmp_path / "x.npz", arr_0=bad)
        with pytest.raises(InputError, match=r"arr_0: got .*; expected uint8 \[N, H, W, 3\]"):
            fid(tmp_path / "x.npz", tmp_path / "one", features=Corners())
    for content in (b"", b"no zip", (tmp_path / "x.npz").read_bytes()[:100]):
        (tmp_path / "y.npz").write_bytes(content)
        with pytest.raises(InputError, match=r"cannot be read as an \.npz"):
            fid(tmp_path / "y.npz", tmp_path / "one", features=Corners())
    many = tmp_path / "many"
    many.mkdir()
    for number in range(40):
        Image.new("RGB", (8, 8) if number < 32 else (9, 9)).save(many / f"{number:02d}.png")
    with pytest.raises(InputError, match=r"32.png: is 9x9, others are 8x8"):
        fid(many, many, features=Corners())
    write_npz(tmp_path / "b.npz", iter(np.zeros((3, 8, 8, 3), np.uint8)), (3, 8, 8, 3))
    # Neither the network's package nor its weights are part of this package, and nothing is downloaded in a test.
    missing = tmp_path / "inception.pth"
    result = run_cli("eval", "fid", tmp_path / "b.npz", tmp_path / "b.npz", "--weights", missing, check=2)
    assert "torch_fidelity is not installed" in result.stderr or "Inception weights are not there" in result.stderr


def test_pictures_are_measured_by_their_definitions() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(40, 200, (3, 32, 32, 3), dtype=np.uint8)
    b = a.copy()
    b[1] += 10
    b[2] = rng.integers(40, 200, b[2].shape, dtype=np.uint8)
    metrics = PictureMetrics(torch.device("cpu"))
    same, brighter, other = metrics(a, b)
    assert same["psnr"] == 100 and same["ssim"] == pytest.approx(1)
    assert brighter["psnr"] == pytest.approx(20 * np.log10(255 / 10), abs=1e-3)
    assert other["ssim"] < 0.1 < brighter["ssim"]
    assert set(metrics.not_measured) | set(same) == {"psnr", "ssim", "lpips", "dreamsim"}


def test_the_planner_finds_a_known_goal() -> None:
    goal = np.array([[0.3, -0.1, 0.5], [0.2, 0.4, -0.2]])
    rounds = []

    def cost(points: np.ndarray) -> np.ndarray:
        rounds.append(len(points))
        return ((points - goal) ** 2).sum(axis=(1, 2))

    chosen: dict[str, Any] = {"candidates": 200, "elites": 20, "generator": np.random.default_rng(0)}
    found = cross_entropy_method(cost, np.zeros((2, 3)), np.ones((2, 3)), iterations=12, **chosen)
    assert np.abs(found - goal).max() < 0.15
    assert rounds == [200] * 12
    at_the_goal = cross_entropy_method(cost, goal, np.ones((2, 3)), iterations=1, **chosen)
    assert np.array_equal(at_the_goal, goal)  # the mean is a candidate


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of walks and, beside it, a CDiT and an EqM with an energy after two steps."""
    folder = tmp_path_factory.mktemp("world")
    write_toy_world(folder / "walks", walks=2, frames=12, size=(80, 60), seed=3)
    options = EncodeOptions(folder / "latents", size=(32, 32), precision="fp32", storage="fp32")
    encode([SourceConfig(path=folder / "walks")], options)
    common: dict[str, Any] = {
        "data_path": folder / "latents", "results_dir": folder, "precision": "fp32", "steps": 2, "device": "cpu"
    }  # fmt: skip
    train(TrainConfig(model=SMALL_CDIT, run_name="cdit", batch_size=4, **WALKS, **common))
    train(TrainConfig(model=SMALL, run_name="eqm", energy="dot", global_batch_size=4, **common))
    return folder


def test_a_model_that_knows_the_way_is_right(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the network's frames, those that the actions really lead to: every score is then perfect, which it
    can only be when context, actions and horizons belong together."""
    from halfstep.data.navigation import goal_actions
    from halfstep.evaluate import walks as module

    store = DatasetStore.open(world / "latents")
    known: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for key in store.keys():
        frames, position, yaw = store.read(key), *(store.read_array(key, n) for n in ("position", "yaw"))
        for now in range(len(frames)):
            ahead = list(range(now, len(frames)))
            known.append((frames[now], frames[ahead], goal_actions(position, yaw, now, ahead, 0.25)))

    def look_up(asked: Prediction, **_: Any) -> Iterator[SamplerState]:
        found = []
        for last, action in zip(asked.context[:, -1].numpy(), asked.actions.numpy(), strict=True):
            ahead = next((f, a) for now, f, a in known if np.allclose(now, last))
            found.append(ahead[0][np.abs(ahead[1] - action).sum(axis=1).argmin()])
        yield SamplerState(0, 0.0, 0.0, torch.from_numpy(np.stack(found)))

    monkeypatch.setattr(module, "sample_cdit", look_up)
    options = WalkOptions(world / "cdit", world / "latents", horizons=(1, 4), walks=6, plans=2, plan_steps=2,
                          candidates=40, elites=8, precision="fp32", device="cpu")  # fmt: skip
    report = evaluate_walks(options)
    for scores in (report.direct, report.rollout):
        assert all(values["psnr"] > 90 for values in scores.values())
    assert report.copy["4"]["psnr"] < report.copy["1"]["psnr"] < 40
    assert report.walks == 6
    assert report.plan is not None
    assert report.plan.end <= report.plan.mean_step_end


def test_plans_are_scored_by_their_definitions(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planner that stays where it is, against the poses of every walk that can be asked about."""
    from halfstep.evaluate import walks as module

    monkeypatch.setattr(module, "cross_entropy_method", lambda _, mean, *__, **___: np.zeros_like(mean))
    options = WalkOptions(world / "cdit", world / "latents", horizons=(2,), walks=99, plans=99, plan_steps=2, steps=1,
                          precision="fp32", device="cpu")  # fmt: skip
    plan = evaluate_walks(options).plan
    store = DatasetStore.open(world / "latents")
    paths, every = [], []
    for key in store.keys():
        position, yaw = (store.read_array(key, name).astype(np.float64) for name in ("position", "yaw"))
        place, turn = position @ [1, 1j], yaw.reshape(-1)
        every += [((place[n + 1] - place[n]) * np.exp(-1j * turn[n]), turn[n + 1] - turn[n]) for n in range(11)]
        paths += [
            ((place[n + 1 : n + 3] - place[n]) * np.exp(-1j * turn[n]), np.diff(turn[n : n + 3])) for n in range(1, 10)
        ]
    step, angle = np.mean([s for s, _ in every]), np.mean([a for _, a in every])
    mean = np.array([step, step + step * np.exp(1j * angle)])
    expected = {
        "end": [abs(path[-1]) for path, _ in paths],
        "path": [abs(path) for path, _ in paths],
        "step": [abs(np.diff(path, prepend=0)) for path, _ in paths],
        "turn": [abs(turns) for _, turns in paths],
        "mean_step_end": [abs(path[-1] - mean[-1]) for path, _ in paths],
        "mean_step_path": [abs(path - mean) for path, _ in paths],
    }
    assert asdict(plan) == {name: pytest.approx(np.mean(values), rel=1e-3) for name, values in expected.items()}


def test_the_command_evaluates_a_real_model(world: Path) -> None:
    command = ["eval", "nwm", "--ckpt", world / "cdit", "--data-path", world / "latents", "--horizons", "1,3"]
    options = ["--walks", 3, "--steps", 3, "--plans", 1, "--plan-steps", 2, "--candidates", 4, "--device", "cpu"]
    report = json.loads(run_cli(*command, *options, "--json").stdout)
    assert set(report["direct"]) == set(report["rollout"]) == {"1", "3"}
    assert 0 < report["direct"]["1"]["psnr"] < 60
    assert report["plan"]["mean_step_end"] > 0
    assert "planned: ends" in run_cli(*command, *options).stdout


def test_there_are_no_more_walks_than_there_are(world: Path, tmp_path: Path) -> None:
    options = WalkOptions(world / "cdit", world / "latents", horizons=(8,), walks=50, steps=2, plans=0,
                          precision="fp32", device="cpu")  # fmt: skip
    assert evaluate_walks(options).walks == 6  # two walks of 12 frames, two of context and eight ahead
    (tmp_path / "traj_names.txt").write_text("walk_001\n")
    assert evaluate_walks(replace(options, names=tmp_path / "traj_names.txt")).walks == 3
    (tmp_path / "traj_names.txt").write_text("walk_007\n")
    with pytest.raises(InputError, match="names no walk that is there and long enough; there is 'walk_000'"):
        evaluate_walks(replace(options, names=tmp_path / "traj_names.txt"))


def test_a_broken_network_gets_no_scores(world: Path, tmp_path: Path) -> None:
    for kind in ("cdit", "eqm"):
        checkpoint = read_checkpoint(world / kind)
        weights = {name: tensor.clone() for name, tensor in checkpoint.weights.items()}
        weights["final_layer.linear.bias"][0] = torch.nan
        save_file(weights, tmp_path / f"{kind}.safetensors", checkpoint.about.to_metadata())
    with pytest.raises(NumericsError, match="frames 1 ahead are not finite in fp32"):
        evaluate_walks(WalkOptions(tmp_path / "cdit.safetensors", world / "latents", precision="fp32", device="cpu"))
    with pytest.raises(NumericsError, match=r"energies of .* are not finite"):
        compare_energies(tmp_path / "eqm.safetensors", world / "latents", device="cpu")


def test_energies_tell_sets_apart(world: Path, tmp_path: Path) -> None:
    """What is stored, each frame once and without noise, beside what no walk looks like."""
    network = read_checkpoint(world / "eqm").build()
    assert isinstance(network, EqM)
    store = DatasetStore.open(world / "latents")
    ours = torch.cat([energy_score(network, torch.from_numpy(store.read(key))) for key in store.keys()])
    write_noise(tmp_path / "noise")
    encode([SourceConfig(path=tmp_path / "noise")], EncodeOptions(tmp_path / "store", size=(32, 32), precision="fp32"))
    noise = DatasetStore.open(tmp_path / "store")
    theirs = torch.cat([energy_score(network, torch.from_numpy(noise.read(key))) for key in noise.keys()])
    report = compare_energies(world / "eqm", world / "latents", tmp_path / "store", device="cpu")
    assert (report.items, report.other_items) == (24, 20)
    assert report.mean == pytest.approx(float(ours.mean()), rel=1e-3)
    assert report.deviation == pytest.approx(float(ours.std(correction=0)), rel=1e-3)
    assert report.other_mean == pytest.approx(float(theirs.mean()), rel=1e-3)
    higher = (theirs[:, None] > ours).double() + 0.5 * (theirs[:, None] == ours)
    assert report.auroc == pytest.approx(float(higher.mean()), abs=1e-3)
    assert abs(report.auroc - 0.5) > 0.2  # so that it is seen which way round it is counted
    result = run_cli("eval", "energy", "--ckpt", world / "eqm", "--data-path", world / "latents")
    assert "24 items" in result.stdout
    with pytest.raises(InputError, match="is of a CDiT"):
        compare_energies(world / "cdit", world / "latents")
    with pytest.raises(InputError, match="holds other latents than the model was trained on: pixels"):
        encode([SourceConfig(path=tmp_path / "noise")], EncodeOptions(tmp_path / "large", size=(64, 64)))
        compare_energies(world / "eqm", tmp_path / "large")


def write_noise(folder: Path) -> None:
    folder.mkdir()
    rng = np.random.default_rng(4)
    for number in range(20):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{number:02d}.png")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"ckpt": "eqm"}, "expected a CDiT"),
        ({"horizons": (11,)}, "no sequence has 13 frames in a row"),
        ({"spacing": -1.0}, "spacing: got -1.0"),
        ({"sampler": "ancestral", "plan_sampling_steps": 1}, "steps: got 1; expected 2 to 1000"),
        ({"horizons": ()}, "at least 1"),
        ({"elites": 50}, "elites: got 50 of 32"),
        ({"sampler": "euler"}, "got 'euler'; expected one of ancestral"),
    ],
)
def test_mistakes_are_named(world: Path, changes: dict[str, Any], told: str) -> None:
    values = {"ckpt": "cdit", "precision": "fp32", "device": "cpu", **changes}
    with pytest.raises(InputError, match=told):
        evaluate_walks(WalkOptions(world / values.pop("ckpt"), world / "latents", **values))
