"""Samples from trained networks: the same whatever the batch, whole or not there, in every form."""

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from halfstep.autoencoders import load_autoencoder
from halfstep.data.sources import SourceConfig
from halfstep.encode import EncodeOptions, encode
from halfstep.errors import InputError, NumericsError, StoreError
from halfstep.models import About, CDiT, EqM, read_checkpoint
from halfstep.progress import Progress
from halfstep.sample import SampleOptions, sample
from halfstep.sampling import GuidedField, drive, rollout, sample_cdit, sample_eqm
from halfstep.sampling.noise import own_generator
from halfstep.store import DatasetStore, TrajectoryStore
from halfstep.train.config import TrainConfig
from halfstep.train.loop import train
from tests.support.cli import run_cli, torchrun
from tests.support.training import SMALL, SMALL_CDIT, WALKS


@pytest.fixture(scope="module")
def runs(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three networks after two steps each: pictures, clips, walks."""
    folder = tmp_path_factory.mktemp("runs")
    common: dict[str, Any] = {
        "data_path": latents, "results_dir": folder, "precision": "fp32", "steps": 2, "lr": 1e-2, "device": "cpu"
    }  # fmt: skip
    train(TrainConfig(model=SMALL, run_name="pictures", num_classes=3, global_batch_size=8, **common))
    train(TrainConfig(model=SMALL, run_name="clips", clip_len=3, global_batch_size=2, **common))
    train(TrainConfig(model=SMALL_CDIT, run_name="walks", batch_size=4, **WALKS, **common))
    return folder


def options(runs: Path, output: Path, kind: str = "pictures", **changes: Any) -> SampleOptions:
    values: dict[str, Any] = {"number": 5, "steps": 6, "batch_size": 2, "precision": "fp32", "device": "cpu"}
    return SampleOptions(runs / kind, output, **{**values, **changes})


def pictures(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))]


def test_a_picture_is_the_samplers_decoded(runs: Path, tmp_path: Path) -> None:
    report = sample(options(runs, tmp_path / "out", labels=((2,), (0,)), guidance_scale=1.5))
    assert (report.made, report.there, report.updates) == (5, 0, 5)
    network = read_checkpoint(runs / "pictures").build()
    x = torch.stack([torch.randn(16, 4, 4, generator=own_generator(0, number)) for number in (2, 3)])
    field = GuidedField(network, torch.tensor([2, 0]), 1.5)
    expected = drive(sample_eqm(field, x, updates=5, step_size=0.0017, momentum=0.3))
    sample(options(runs, tmp_path / "raw", labels=((2,), (0,)), guidance_scale=1.5, format="npy"))
    for number, latent in zip((2, 3), expected, strict=True):
        np.testing.assert_allclose(np.load(tmp_path / "raw" / f"{number:06d}.npy"), latent, atol=1e-6)
    with np.load(tmp_path / "out" / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (5, 32, 32, 3)
        for row, picture in zip(arrays["arr_0"], pictures(tmp_path / "out"), strict=True):
            assert np.array_equal(row, picture)
    assert Image.open(tmp_path / "out" / "contact_sheet.png").size == (104, 68)


@pytest.mark.slow
def test_a_sample_is_the_same_in_every_batch_and_process(runs: Path, tmp_path: Path) -> None:
    sample(options(runs, tmp_path / "whole", number=5))
    sample(options(runs, tmp_path / "parts", number=2))
    sample(options(runs, tmp_path / "parts", number=5))
    sample(options(runs, tmp_path / "large", batch_size=5))
    command = ["sample", "--ckpt", runs / "pictures", "-o", tmp_path / "two", "-n", 5, "--steps", 6]
    torchrun(2, *command, "--batch-size", 2, "--precision", "fp32", "--device", "cpu", "--quiet")
    whole = pictures(tmp_path / "whole")
    assert len({picture.tobytes() for picture in whole}) == 5
    for other in ("parts", "two"):
        for a, b in zip(whole, pictures(tmp_path / other), strict=True):
            assert np.array_equal(a, b), other
    for a, b in zip(whole, pictures(tmp_path / "large"), strict=True):
        assert np.abs(a.astype(int) - b).max() <= 1  # other kernels may round the last bit otherwise
    content = [json.loads((tmp_path / name / "samples.json").read_text())["samples"] for name in ("whole", "two")]
    assert content[0] == content[1]


def test_what_is_there_is_left_alone(runs: Path, tmp_path: Path) -> None:
    sample(options(runs, tmp_path / "out"))
    before = pictures(tmp_path / "out")
    (tmp_path / "out" / "000003.png").unlink()
    changed = (tmp_path / "out" / "000000.png").stat().st_mtime_ns
    report = sample(options(runs, tmp_path / "out"))
    assert (report.made, report.there) == (1, 4)
    assert (tmp_path / "out" / "000000.png").stat().st_mtime_ns == changed
    for a, b in zip(before, pictures(tmp_path / "out"), strict=True):
        assert np.array_equal(a, b)
    facts = json.loads((tmp_path / "out" / "samples.json").read_text())
    (tmp_path / "out" / "samples.json").write_text(json.dumps({**facts, "samples": []}))  # as if killed just before
    (tmp_path / "out" / "contact_sheet.png").unlink()
    assert sample(options(runs, tmp_path / "out")).made == 0
    assert json.loads((tmp_path / "out" / "samples.json").read_text()) == facts
    assert (tmp_path / "out" / "contact_sheet.png").exists()
    with pytest.raises(InputError, match="steps: was 6, is 7"):
        sample(options(runs, tmp_path / "out", steps=7))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("all of it")
    with pytest.raises(InputError, match="and is no set of samples"):
        sample(options(runs, tmp_path / "other"))


@pytest.mark.parametrize("suffix", ["mp4", "gif", "png"])
def test_clips(runs: Path, tmp_path: Path, suffix: str) -> None:
    report = sample(options(runs, tmp_path, "clips", number=2, format=suffix))
    assert report.npz is None and not (tmp_path / "samples.npz").exists()  # which is of pictures
    path = tmp_path / f"000001.{suffix}"
    if suffix == "png":
        assert Image.open(path).size == (3 * 32 + 2, 32)
    else:
        with av.open(str(path)) as container:
            assert sum(1 for _ in container.decode(video=0)) == 3
    assert Image.open(tmp_path / "contact_sheet.png").size[0] == 3 * 32 + 2


def test_walks_go_on_from_real_frames_along_real_actions(runs: Path, latents: Path, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"number": 3, "data_path": latents, "frames": 4, "sampler": "ddim", "steps": 5}
    sample(options(runs, tmp_path / "out", "walks", **chosen, record=True))
    sample(options(runs, tmp_path / "raw", "walks", **chosen, format="npy"))
    assert pictures(tmp_path / "out")[0].shape == (2 * 32 + 1, 4 * 32 + 3, 3)
    fact = json.loads((tmp_path / "out" / "samples.json").read_text())["samples"][1]
    store = DatasetStore.open(latents)
    key, now = fact["walk"], fact["frame"]
    network = read_checkpoint(runs / "walks").build()
    from halfstep.data.navigation import local_steps, to_actions

    position, yaw = (store.read_array(key, name, now, now + 5) for name in ("position", "yaw"))
    actions = torch.from_numpy(to_actions(local_steps(position, yaw), 0.25)).float()
    expected = rollout(
        network, torch.from_numpy(store.read(key, now - 1, now + 1))[None], actions[None], 1 / 128,
        partial(sample_cdit, scheduler="ddim", steps=5, generators=[own_generator(0, 1)]),
    )  # fmt: skip
    raw = np.load(tmp_path / "raw" / "000001.npy")
    np.testing.assert_allclose(raw, expected[0], atol=1e-4)
    recorded = TrajectoryStore.open(tmp_path / "out" / "runs")
    assert sorted(recorded) == [f"{n:06d}-{s:03d}" for n in range(3) for s in range(4)]
    # As exact as fp16, the store's default.
    np.testing.assert_allclose(recorded["000001-002"].latents[-1], raw[2], atol=2e-3 * np.abs(raw).max())


def test_recording_changes_no_sample(runs: Path, tmp_path: Path) -> None:
    sample(options(runs, tmp_path / "plain", sampler="heun"))
    sample(options(runs, tmp_path / "recorded", sampler="heun", record=True))
    for a, b in zip(pictures(tmp_path / "plain"), pictures(tmp_path / "recorded"), strict=True):
        assert np.array_equal(a, b)
    recorded = TrajectoryStore.open(tmp_path / "recorded" / "runs")
    assert len(recorded) == 5
    assert len(recorded["000004"].latents) == 7
    assert recorded["000004"].attributes["complete"]
    sample(options(runs, tmp_path / "exact", sampler="heun", number=1, batch_size=1, record=True, storage="fp32"))
    sample(options(runs, tmp_path / "raw", sampler="heun", number=1, batch_size=1, format="npy"))
    exact = TrajectoryStore.open(tmp_path / "exact" / "runs")["000000"].latents
    assert np.array_equal(exact[-1], np.load(tmp_path / "raw" / "000000.npy"))


def test_starting_from_noised_data(runs: Path, latents: Path, tmp_path: Path) -> None:
    """Nearly all data and a tiny step: the data comes back."""
    chosen: dict[str, Any] = {"start_from": latents, "start_gamma": 1.0, "step_size": 0.0, "format": "npy"}
    sample(options(runs, tmp_path, number=2, **chosen))
    store = DatasetStore.open(latents)
    for number in range(2):
        np.testing.assert_allclose(np.load(tmp_path / f"{number:06d}.npy"), store.read(store.keys()[number], 0, 1)[0])


def test_samples_stop_by_themselves(runs: Path, tmp_path: Path) -> None:
    report = sample(options(runs, tmp_path / "all", stop_below=1e6))
    assert report.updates == 1
    report = sample(options(runs, tmp_path / "none", stop_below=1e-9))
    assert report.updates == 5


def test_a_published_checkpoint(tmp_path: Path) -> None:
    """Which says nothing of autoencoder, energy or frames."""
    network = EqM.named("EqM-S/2", (4, 4), 10, in_channels=16)
    torch.save({"model": network.state_dict(), "ema": network.state_dict()}, tmp_path / "0000100.pt")
    command = ["sample", "--ckpt", tmp_path / "0000100.pt", "--num-fid-samples", 1, "--num-sampling-steps", 3]
    result = run_cli(*command, "--folder", tmp_path / "no", check=2)
    assert "nothing says which autoencoder" in result.stderr
    assert not (tmp_path / "no").exists()
    more = ["--video", "--clip-len", 4, "--model", "EqM-S/2", "--use-bf16", "--vae", "dct8", "--ebm", "dot"]
    result = run_cli(*command, "--folder", tmp_path / "yes", *more)
    assert "1 samples of EqM-S/2 in bf16-mixed" in result.stdout
    with av.open(str(tmp_path / "yes" / "000000.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 4


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        ("pictures", {"labels": ((3,),)}, "labels: got 3; the model has classes 0 to 2"),
        ("pictures", {"labels": ((1, 2), (1,))}, "compose the same number"),
        ("pictures", {"sampler": "ddim"}, "got 'ddim'; EqM has ngd, gd, euler, heun"),
        ("pictures", {"sampler": "heun", "stop_below": 0.1}, "--stop-below needs --sampler gd or ngd"),
        ("pictures", {"model": "EqM-B/2"}, "holds EqM of depth 2.*, not EqM-B/2"),
        ("pictures", {"format": "jpg"}, "--format: got 'jpg'; expected one of png, mp4, gif, npy"),
        ("clips", {"video": True, "clip_len": 16}, "num_frames is 3, not 16"),
        ("clips", {"clip_len": 3}, "--clip-len needs --video"),
        ("pictures", {"step_size": float("nan")}, "--step-size: got nan; expected a finite number"),
        ("pictures", {"guidance_scale": float("nan")}, "--cfg-scale: got nan"),
        ("pictures", {"stop_below": float("inf")}, "--stop-below: got inf"),
        ("pictures", {"guidance_channels": 17}, "--cfg-channels: got 17; the latents have 16 channels"),
        ("pictures", {"storage": "fp32"}, "--storage needs --record"),
        ("pictures", {"storage": "int8", "record": True}, "storage: got 'int8'"),
        ("pictures", {"data_path": "LATENTS"}, "--data-path is not an option of EqM"),
        ("pictures", {"frames": 9}, "--frames is not an option of EqM"),
        ("pictures", {"start_gamma": 0.5}, "--start-gamma needs --start-from"),
        ("pictures", {"start_from": "LATENTS", "start_gamma": 1.0, "sampler": "heun"}, "below 1 for the flow's ODE"),
        (
            "pictures",
            {"start_from": "POSELESS"},
            "holds other latents than the model was trained on: pixels: .*48.*, not .*32",
        ),
        ("walks", {}, "--data-path: not given"),
        ("walks", {"data_path": "LATENTS", "frames": 20}, "no sequence has 22 frames in a row"),
        ("walks", {"data_path": "LATENTS", "guidance_scale": 9.0}, "this CDiT was trained with every action"),
        ("walks", {"data_path": "LATENTS", "spacing": 0.0}, "spacing: got 0.0; expected meters above 0"),
        ("walks", {"data_path": "LATENTS", "steps": 1001}, "steps: got 1001; expected 2 to 1000"),
        ("nothing", {}, "no such file or folder; expected a checkpoint"),
    ],
)
def test_mistakes_are_named(
    runs: Path, latents: Path, tmp_path: Path, kind: str, changes: dict[str, Any], told: str
) -> None:
    if "POSELESS" in changes.values():
        (tmp_path / "photos").mkdir()
        Image.new("RGB", (60, 60)).save(tmp_path / "photos" / "0.png")
        encode([SourceConfig(path=tmp_path / "photos")], EncodeOptions(tmp_path / "poseless", size=(48, 48)))
    places = {"LATENTS": latents, "POSELESS": tmp_path / "poseless"}
    changes = {name: places.get(value, value) if isinstance(value, str) else value for name, value in changes.items()}
    with pytest.raises(InputError, match=told):
        sample(options(runs, tmp_path / "out", kind, **changes))
    assert not (tmp_path / "out").exists()


def test_what_is_not_finite_is_no_sample(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match="sample 0 is not finite in fp32"):
        sample(options(runs, tmp_path / "out", step_size=1e30, record=True))
    assert not list((tmp_path / "out").glob("*.png"))
    assert sample(options(runs, tmp_path / "out", record=True)).made == 5  # as the error says: no sample, so no claim


def test_a_folder_goes_on_in_its_own_precision(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the machine is measured later, and however the checkpoint is called."""
    assert sample(options(runs, tmp_path / "out", number=2, precision="bf16-mixed")).policy.startswith("bf16-mixed")
    monkeypatch.chdir(runs)
    report = sample(replace(options(runs, tmp_path / "out", precision="auto"), ckpt=Path("pictures")))
    assert (report.made, report.there) == (3, 2)
    assert report.policy.startswith("bf16-mixed")
    with pytest.raises(InputError, match=r"policy: was 'bf16-mixed.*', is 'fp32"):
        sample(options(runs, tmp_path / "out", precision="fp32"))


def test_a_foreign_list_of_samples_is_left_alone(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "samples.json").write_text("[]")
    with pytest.raises(InputError, match="does not tell the settings of samples"):
        sample(options(runs, tmp_path))
    assert (tmp_path / "samples.json").read_text() == "[]"


def test_a_sample_whose_recording_failed_is_made_again(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk, pytest.raises(StoreError, match="000000: was not recorded whole"):
        disk.setattr(os, "fdatasync", full)
        sample(options(runs, tmp_path, number=2, record=True))
    assert sample(options(runs, tmp_path, number=2, record=True)).made == 2
    assert all(run.attributes["complete"] for run in TrajectoryStore.open(tmp_path / "runs").values())


def test_recordings_of_one_frame_are_open_at_a_time(runs: Path, latents: Path, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"number": 2, "data_path": latents, "frames": 4, "sampler": "ddim", "steps": 2}
    together = []

    class Watching(Progress):
        def advance(self, units: int = 1, *, written: int = 0) -> None:
            held = [path.readlink() for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
            together.append({path.parts[-2] for path in held if "/runs/" in str(path)} & keys)

    keys = {f"{n:06d}-{s:03d}" for n in range(2) for s in range(4)}
    sample(options(runs, tmp_path / "out", "walks", **chosen, record=True), Watching())
    assert set(TrajectoryStore.open(tmp_path / "out" / "runs")) == keys == set().union(*together)
    assert max(map(len, together)) == 2


def test_a_young_average_is_told(runs: Path, latents: Path, tmp_path: Path) -> None:
    """Two steps of training, of which an average with 0.9999 has seen next to nothing."""
    notes: list[str] = []

    class Listening(Progress):
        def note(self, line: str) -> None:
            notes.append(line)

    sample(options(runs, tmp_path / "average", number=1), Listening())
    assert any("100% of the average are still the weights that training began with" in line for line in notes)
    notes.clear()
    sample(options(runs, tmp_path / "last", number=1, ema=False), Listening())
    common: dict[str, Any] = {"data_path": latents, "results_dir": tmp_path, "precision": "fp32", "device": "cpu"}
    started = {"model": SMALL, "num_classes": 3, "global_batch_size": 8, "steps": 1, "ckpt": runs / "pictures"}
    train(TrainConfig(run_name="tuned", **started, **common))
    sample(options(tmp_path, tmp_path / "tuned-samples", "tuned", number=1), Listening())
    assert notes == []  # what a tuned average began with was trained


def test_walks_are_decoded_as_their_store_says(latents: Path, tmp_path: Path) -> None:
    """By a published checkpoint, which says nothing of its latents."""
    network = CDiT((4, 4), 2, 2, 384, 12, 6, in_channels=16)
    torch.save({"model": network.state_dict()}, tmp_path / "cdit.pt")
    walks = {"data_path": latents, "frames": 2, "spacing": 0.25, "sampler": "ddim"}
    made = sample(SampleOptions(tmp_path / "cdit.pt", tmp_path / "out", number=1, steps=2, device="cpu", **walks))
    assert made.network == "CDiT-S/2"
    store = DatasetStore.open(latents)
    fact = json.loads((tmp_path / "out" / "samples.json").read_text())["samples"][0]
    real = load_autoencoder("dct8").pictures(
        torch.from_numpy(store.read(fact["walk"], fact["frame"] + 1, fact["frame"] + 2))
    )
    assert np.array_equal(pictures(tmp_path / "out")[0][:32, :32], real[0])


def test_a_name_says_the_size() -> None:
    sizes = {"depth": 12, "hidden_size": 768, "num_heads": 12, "patch_size": 2}
    assert About("CDiT", sizes).name == "CDiT-B/2"
    assert About("EqM", {**sizes, "depth": 3}).name == "EqM of depth 3, width 768, 12 heads, patch 2"
