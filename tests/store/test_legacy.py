"""Batches of one file a step: every variant that exists, what is wrong with them, and conversion there and back."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from halfstep.errors import InputError, StoreError, UnsafePickleError
from halfstep.store import TrajectoryFormat, TrajectoryStore, open_trajectories, verify_trajectories
from halfstep.store.convert import to_batch, to_store
from halfstep.store.legacy import read_step
from tests.support.batches import SIGMAS, write_batch
from tests.support.cli import run_cli


def test_the_real_batch_is_its_truth(outside_data: Path) -> None:
    truth = np.load(outside_data / "legacy_batch" / "truth.npz")
    for path in (outside_data / "legacy_batch", outside_data / "legacy_batch" / "latents"):
        runs = open_trajectories(path)
        assert sorted(runs) == sorted(truth)
        for key in runs:
            run = runs[key]
            half = run.attributes["dtype"] == "torch.float16"
            expected = truth[key][run.steps]
            if half:
                expected = expected.astype(np.float16).astype(np.float32)
            assert np.array_equal(run.latents[:], expected)
    assert runs["prompt_001_vid001"].steps.tolist() == [0, 2, 4]
    cut = runs["p000_b000_s001"]
    assert cut.steps.tolist() == [0, 1, 2, 3, 4]
    assert any("step_005.pt" in line for line in cut.problems)
    assert any("summary.json" in line for line in cut.problems)
    assert all(runs[key].problems == () for key in runs if key != "p000_b000_s001")
    whole = runs["prompt_000_vid001"]
    assert (whole.seed, whole.attributes["guidance"]) == (100, 6.5)
    labels = whole.attributes["sigma_labels"]
    assert whole.sigmas.tolist() == [*labels[1:], 0.0]
    assert whole.timesteps.tolist() == [*whole.attributes["timestep_labels"][1:], 0.0]
    # Every second step was stored: the noise levels between come from the runs with the same schedule.
    assert runs["prompt_001_vid001"].sigmas.tolist() == whole.sigmas[::2].tolist()
    assert "naïve “quotes”" in runs["prompt_001_vid001"].prompt


@pytest.mark.parametrize("suffix", [".npy", ".npy.gz", ".pt", ".pt.gz"])
def test_every_form_of_file(tmp_path: Path, suffix: str) -> None:
    latents = write_batch(tmp_path / "latents" / "prompt_003" / "vid_002", suffix=suffix)
    runs = open_trajectories(tmp_path)
    assert list(runs) == ["prompt_003_vid002"]
    assert np.array_equal(runs["prompt_003_vid002"].latents[:], latents)
    assert runs["prompt_003_vid002"].sigmas.tolist() == [0.9, 0.7, 0.4, 0.0]
    for cut in (0.2, 0.5, 0.99):
        broken = shutil.copytree(tmp_path, tmp_path / f"cut{cut}") / "latents/prompt_003/vid_002" / f"step_001{suffix}"
        broken.write_bytes(broken.read_bytes()[: int(cut * broken.stat().st_size)])
        run = open_trajectories(tmp_path / f"cut{cut}")["prompt_003_vid002"]
        assert np.array_equal(run.latents[:], latents[[0, 2, 3]])
        assert run.sigmas.tolist() == [0.9, 0.4, 0.0]
        assert any(f"step_001{suffix}" in line for line in run.problems)


@pytest.mark.parametrize(
    ("place", "key"),
    [
        ("latents/prompt_000/vid_001", "prompt_000_vid001"),
        ("latents/p000_b000_s000/vid_001", "p000_b000_s000"),
        ("latents/p000_b000_s000/vid_002", "p000_b000_s000_vid002"),
        ("latents/prompt_000", "v"),  # the flat layout, named in its metadata
        ("prompt_000/vid_001", "prompt_000_vid001"),
    ],
)
def test_every_layout(tmp_path: Path, place: str, key: str) -> None:
    write_batch(tmp_path / place)
    assert list(open_trajectories(tmp_path)) == [key]


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    root = tmp_path / "latents"
    write_batch(root / "short" / "vid_001", [0, 1, 2], summary=False)
    write_batch(root / "gap" / "vid_001", [0, 1, 3], summary=False)
    write_batch(root / "gone" / "vid_001")
    (root / "gone" / "vid_001" / "step_002.npy.gz").unlink()
    write_batch(root / "stale" / "vid_001", [0, 1, 2])
    (root / "stale" / "vid_001" / "step_003.npy.gz").write_bytes(
        (root / "stale" / "vid_001" / "step_002.npy.gz").read_bytes()
    )
    write_batch(root / "mixed" / "vid_001", [3], seed=6)
    write_batch(root / "mixed" / "vid_001", [0, 1, 2], summary=False)
    (root / "mixed" / "vid_001" / "summary.json").unlink()
    write_batch(root / "unlabeled" / "vid_001")
    (root / "unlabeled" / "vid_001" / "step_003_metadata.json").write_text("{")
    write_batch(root / "nosum" / "vid_001")
    (root / "nosum" / "vid_001" / "summary.json").write_text("[]")
    runs = open_trajectories(tmp_path)
    expected = {
        "short": ([0, 1, 2], ["missing: summary.json", "short: it ends after step 2 of 4"]),
        "gap": ([0, 1, 3], ["missing: summary.json", "missing: the latents of step 2"]),
        "gone": ([0, 1, 3], ["missing: the latents of step 2"]),
        "stale": ([0, 1, 2], ["missing: the metadata of step 3", "stale: step_003.npy.gz is not among"]),
        "mixed": (
            [0, 1, 2],
            ["missing: summary.json", "stale: the metadata of step 3", "stale: step_003.npy.gz belongs"],
        ),
        "unlabeled": ([0, 1, 2, 3], ["damaged: step_003_metadata.json", "missing: the metadata of step 3"]),
        "nosum": ([0, 1, 2, 3], ["damaged: summary.json"]),
    }
    for key, (steps, problems) in expected.items():
        run = runs[key]
        assert run.steps.tolist() == steps, key
        assert len(run.problems) >= len(problems)
        for problem in problems:
            assert any(line.startswith(problem) for line in run.problems), (key, problem, run.problems)
    assert runs["unlabeled"].sigmas.tolist() == [0.9, 0.7, 0.4, 0.0]  # the other runs know the schedule


def test_a_damage_that_only_reading_finds_names_the_file(tmp_path: Path) -> None:
    write_batch(tmp_path / "latents" / "a" / "vid_001")
    path = tmp_path / "latents" / "a" / "vid_001" / "step_001.npy.gz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    run = open_trajectories(tmp_path)["a"]
    with pytest.raises(StoreError, match=r"step_001.npy.gz: damaged"):
        run.latents[1]
    assert run.latents[2].shape == (4, 8, 8)


def test_files_of_torch_are_read_without_running_them(tmp_path: Path) -> None:
    views = torch.arange(24.0).reshape(4, 6)
    for tensor in (views, views[1:3, ::2], views.T, views.bfloat16(), views.double(), views[0, 0]):
        torch.save(tensor, tmp_path / "t.pt")
        assert np.array_equal(read_step(tmp_path / "t.pt"), tensor.float().numpy())
    torch.save({"a": views}, tmp_path / "dict.pt")
    with pytest.raises(StoreError, match="holds a dict; expected one tensor"):
        read_step(tmp_path / "dict.pt")

    class Attack:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return eval, ("1/0",)

    torch.save(Attack(), tmp_path / "attack.pt")
    with pytest.raises(UnsafePickleError, match=r"names builtins.eval|names __builtin__.eval"):
        read_step(tmp_path / "attack.pt")


@pytest.mark.parametrize("storage", ["fp16", "fp32"])
def test_there_and_back(tmp_path: Path, storage: str) -> None:
    latents = write_batch(tmp_path / "b" / "latents" / "prompt_000" / "vid_001")
    write_batch(tmp_path / "b" / "latents" / "other" / "vid_001", [0, 1], summary=False)
    original = open_trajectories(tmp_path / "b")
    report = to_store(original, tmp_path / "s", TrajectoryFormat(storage=storage))
    assert (report.converted, report.skipped, report.steps) == (2, 0, 6)
    assert to_store(original, tmp_path / "s", TrajectoryFormat(storage=storage)).skipped == 2
    with pytest.raises(
        InputError,
        match=r"holds a run with other settings \(format: was 'predictive, fp.*', is 'raw, fp32'\); name another",
    ):
        to_store(original, tmp_path / "s", TrajectoryFormat("raw", "fp32"))
    assert verify_trajectories(tmp_path / "s").ok
    to_batch(open_trajectories(tmp_path / "s"), tmp_path / "back")
    assert to_batch(open_trajectories(tmp_path / "s"), tmp_path / "back").skipped == 1  # the other did not finish
    with pytest.raises(InputError, match="is a trajectory store; name a folder for the batch"):
        to_batch(original, tmp_path / "s")
    write_batch(tmp_path / "else" / "latents" / "prompt_000" / "vid_001", seed=6)
    with pytest.raises(InputError, match="seed: was 5, is 6"):
        to_store(open_trajectories(tmp_path / "else"), tmp_path / "s", TrajectoryFormat(storage=storage))
    with pytest.raises(InputError, match="seed: was 5, is 6"):
        to_batch(open_trajectories(tmp_path / "else"), tmp_path / "back")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(InputError, match="is no batch of recorded runs; name a new"):
        to_batch(original, tmp_path / "mine")
    tolerance = 0.0 if storage == "fp32" else 2e-3
    for runs in (open_trajectories(tmp_path / "s"), open_trajectories(tmp_path / "back")):
        run, other = runs["prompt_000_vid001"], runs["other"]
        assert np.abs(run.latents[:] - latents).max() <= tolerance
        assert run.sigmas.tolist() == [0.9, 0.7, 0.4, 0.0]
        assert run.attributes["sigma_labels"] == SIGMAS
        assert (run.prompt, run.seed, run.attributes["guidance"], run.problems) == ("p", 5, 6.5, ())
        assert "short: it ends after step 1 of 4" in other.problems
    before, after = (
        json.loads((tmp_path / root / "latents/prompt_000/vid_001/step_002_metadata.json").read_text())
        for root in ("b", "back")
    )
    assert after == before | {"video_id": "prompt_000_vid001", "generation_time": None}


def test_a_damaged_step_or_a_missing_label_stops_no_conversion(tmp_path: Path) -> None:
    write_batch(tmp_path / "b" / "latents" / "a" / "vid_001")
    latents = write_batch(tmp_path / "b" / "latents" / "b" / "vid_001")
    path = tmp_path / "b" / "latents" / "a" / "vid_001" / "step_001.npy.gz"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    for metadata in (tmp_path / "b" / "latents" / "b" / "vid_001").glob("step_*_metadata.json"):
        metadata.unlink()
    report = to_store(open_trajectories(tmp_path / "b"), tmp_path / "s", TrajectoryFormat(storage="fp32"))
    assert (report.converted, report.steps) == (2, 7)
    assert any("step 1 was left out" in note for note in report.notes)
    runs = open_trajectories(tmp_path / "s")
    assert runs["a"].steps.tolist() == [0, 2, 3]
    assert np.array_equal(runs["b"].latents[:], latents)
    assert np.isnan(runs["b"].sigmas).all()


def test_going_back_invents_no_noise_level(tmp_path: Path) -> None:
    store = TrajectoryStore.create(tmp_path / "s")
    writer = store.record("cut")
    for k in range(5):
        writer.append(k, 1000 - 20 * k, 1 - 0.02 * k, np.ones((2, 4, 4), np.float32))
    writer.close()
    store.add("sparse", np.ones((4, 2, 4, 4), np.float32), steps=[0, 2, 4, 6], sigmas=[1.0, 0.8, 0.4, 0.0])
    report = to_batch(store, tmp_path / "back")
    back = open_trajectories(tmp_path / "back")
    assert np.isnan(back["cut"].sigmas[-1])
    assert back["cut"].sigmas[0] == 0.98
    assert any("sparse: missing: the noise levels before some steps" in note for note in report.notes)


@pytest.mark.parametrize("suffix", [".npy", ".npy.gz", ".pt", ".pt.gz"])
def test_any_flipped_bit_is_a_named_damage_or_harmless(tmp_path: Path, suffix: str) -> None:
    write_batch(tmp_path / "latents" / "a" / "vid_001", [0], suffix=suffix)
    path = tmp_path / "latents" / "a" / "vid_001" / f"step_000{suffix}"
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in [*range(min(len(good), 160)), *rng.integers(len(good), size=150)]:
        damaged = bytearray(good)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            steps = open_trajectories(tmp_path)["a"].latents
            _ = [step.shape for step in steps]
        except (StoreError, UnsafePickleError) as error:
            assert str(path) in str(error)


def test_a_run_of_its_own_is_not_replaced(tmp_path: Path) -> None:
    write_batch(tmp_path / "b" / "latents" / "a" / "vid_001")
    store = TrajectoryStore.create(tmp_path / "s")
    store.add("a", np.ones((2, 4, 8, 8), np.float32), sigmas=[1, 0], format=TrajectoryFormat(storage="fp32"))
    with pytest.raises(InputError, match="a run 'a' of its own"):
        to_store(open_trajectories(tmp_path / "b"), tmp_path / "s", TrajectoryFormat())
    assert np.array_equal(store["a"].latents[:], np.ones((2, 4, 8, 8)))
    # What was recorded here counts the initial noise as step 0, which the older format has no place for.
    report = to_batch(store, tmp_path / "back")
    assert report.notes == ["a: the initial noise has no place in this format and was left out"]
    run = open_trajectories(tmp_path / "back")["a"]
    assert (run.steps.tolist(), run.sigmas.tolist(), run.attributes["sigma_labels"]) == ([0], [0.0], [1.0])


def test_the_command_line(tmp_path: Path) -> None:
    write_batch(tmp_path / "b" / "latents" / "prompt_000" / "vid_001")
    out = run_cli("store", "convert", tmp_path / "b", "-o", tmp_path / "s", "--json").stdout
    assert json.loads(out)["converted"] == 1
    assert "4 steps in 1 runs" in run_cli("store", "verify", tmp_path / "s").stdout
    assert "1 runs, 4 steps" in run_cli("store", "inspect", tmp_path / "s").stdout
    facts = json.loads(run_cli("store", "inspect", tmp_path / "b", "--json").stdout)
    assert facts["runs"]["prompt_000_vid001"]["steps"] == 4
    run_cli("store", "convert", tmp_path / "s", "-o", tmp_path / "back")
    assert (tmp_path / "back" / "latents" / "prompt_000" / "vid_001" / "step_003.npy.gz").exists()
    chunk = next((tmp_path / "s" / "prompt_000_vid001" / "latents").glob("c.*"))
    chunk.write_bytes(chunk.read_bytes()[:-1])
    assert "NOT ok" in run_cli("store", "verify", tmp_path / "s", check=1).stdout
    assert "1 losses" in run_cli("store", "repair", tmp_path / "s", check=1).stdout
    assert "ok, 0 steps in 1 runs" in run_cli("store", "verify", tmp_path / "s").stdout
    assert "could not be read and were dropped" in run_cli("store", "inspect", tmp_path / "s").stdout
    assert "`halfstep store inspect` says what is wrong" in run_cli("store", "verify", tmp_path / "b", check=2).stderr
    assert "--to: got 'zip'" in run_cli("store", "convert", tmp_path / "b", "-o", "x", "--to", "zip", check=2).stderr
