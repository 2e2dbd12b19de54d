"""What latents and precision save is measured on the user's own data, and told where it was measured."""

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from halfstep.cli.train import saved_line
from halfstep.data.export import export
from halfstep.data.toy_world import write_toy_world
from halfstep.errors import InputError
from halfstep.models import About
from halfstep.precision import PrecisionPolicy
from halfstep.store import DatasetStore
from halfstep.train.config import TrainConfig
from halfstep.train.data import open_data
from halfstep.train.loop import TrainReport, train
from halfstep.train.measure import Timing, measure, summed_up
from halfstep.train.measured import Case, Measured, against_fp32, conditions, read_measured, saving, types_of
from tests.support.cli import run_cli
from tests.support.encoding import run
from tests.support.training import SMALL, SMALL_CDIT, WALKS, config, log

CPU = torch.device("cpu")
REPORT = TrainReport("run", "EqM", 3, 0.5, "bf16-mixed,storage=fp16", 0, 1.0, "run/checkpoints/0000003")


def conditions_of(chosen: TrainConfig, policy: str = "bf16-mixed", processes: int = 1) -> dict[str, Any]:
    data = open_data(chosen, 1)
    about: About = chosen.about(data.latent_shape, data.num_classes)
    return conditions(chosen, about, data, PrecisionPolicy.parse(policy), CPU, processes)


def a_measurement(now: dict[str, Any]) -> Measured:
    return Measured(now, {}, {}, {}, {"speedup": 1.43, "memory": 0.73}, {"speedup": 9.0, "memory": 0.5})


def test_savings_are_ratios_of_times_and_of_memory() -> None:
    half, full = Case(0.2, 0.2, 0.3, 40.0, 730.0, 8), Case(0.286, 0.2, 0.3, 28.0, 1000.0, 6)
    assert saving(half, full) == {"speedup": 1.43, "memory": 0.73}
    assert saving(full, half) == {"speedup": 0.7, "memory": 1.37}


def test_each_process_counts_alike() -> None:
    """One that ran in a busy moment got fewer steps done."""
    busy, idle = Timing([4.0], 900.0), Timing([1.0, 1.0, 2.0, 1.0, 1.0], 1000.0)
    assert summed_up([busy, idle], samples=5) == Case(2.5, 1.0, 4.0, 2.0, 950.0, 6)


def test_the_type_of_files_is_none_of_a_step() -> None:
    for text in ("bf16-mixed", "16-mixed", "fp32", "bf16-true,islands=blocks.*|head"):
        policy = PrecisionPolicy.parse(text)
        for storage in ("fp32", "fp16", "bf16"):
            assert types_of(replace(policy, storage=storage)) == text


def test_a_measurement_holds_for_what_it_was_made_with(tmp_path: Path, latents: Path) -> None:
    now = conditions_of(config(tmp_path, latents, precision="bf16-mixed"))
    assert read_measured(tmp_path) is None
    assert against_fp32(None, now) is None
    a_measurement(now).write(tmp_path)
    found = read_measured(tmp_path)
    assert against_fp32(found, now) == {"speedup": 1.43, "memory": 0.73}
    same = config(tmp_path / "elsewhere", latents, lr=1e-5, steps=99, precision="bf16-mixed", log_every=7)
    assert against_fp32(found, conditions_of(same)) == {"speedup": 1.43, "memory": 0.73}
    others = [
        conditions_of(same, "16-mixed"),
        conditions_of(same, processes=2),
        conditions_of(config(tmp_path, latents, global_batch_size=4)),
        conditions_of(config(tmp_path, latents, model={**SMALL, "depth": 3})),
        conditions_of(config(tmp_path, latents, activation_budget=0.5)),
        conditions_of(config(tmp_path, latents, dispersive_weight=0.5)),
        {**now, "device": "another"},
    ]
    for other in others:
        assert against_fp32(found, other) is None


@pytest.mark.parametrize("content", ["", "[]", '{"conditions": {}}', '{"conditions": {}, "against_fp32": 3}'])
def test_a_measurement_that_cannot_be_read_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "measured.json").write_text(content)
    with pytest.warns(UserWarning, match=r"measured.json: not a readable measurement .*; measure again"):
        assert read_measured(tmp_path) is None


def test_what_precision_saved_is_told_where_it_was_measured() -> None:
    told = "bf16-mixed: 1.43x as fast as fp32 here, 0.73 of its memory (measured)"
    assert saved_line(replace(REPORT, against_fp32={"speedup": 1.43, "memory": 0.73})) == told
    told = "what bf16-mixed saves against fp32 was not measured here; --measure PIXELS does"
    assert saved_line(REPORT) == told
    assert saved_line(replace(REPORT, policy="fp32,storage=fp16")) is None


def test_a_run_says_what_was_measured_for_it(tmp_path: Path, latents: Path) -> None:
    """In the report and in each line of the log; a run of another precision in the same folder does not."""
    chosen = config(tmp_path, latents, precision="bf16-mixed", steps=2)
    chosen.folder.mkdir()
    a_measurement(conditions_of(chosen)).write(chosen.folder)
    assert train(chosen).against_fp32 == {"speedup": 1.43, "memory": 0.73}
    assert train(config(tmp_path, latents, precision="fp32", steps=4)).against_fp32 is None
    assert [record["against_fp32"] for record in log(tmp_path)] == [{"speedup": 1.43, "memory": 0.73}, None]


def test_what_cannot_be_measured_is_named(tmp_path: Path, latents: Path, toy_world: Path) -> None:
    """One line each, and nothing is written."""
    write_toy_world(tmp_path / "other", walks=3, frames=10, size=(80, 60), seed=8)
    shutil.copytree(toy_world, tmp_path / "fewer")
    shutil.rmtree(tmp_path / "fewer" / "walk_001")
    export(DatasetStore.open(latents), "pt-tree", tmp_path / "tree")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    walks: dict[str, Any] = {"model": SMALL_CDIT, **WALKS}
    datasets = {"recon": {"latent_folder": str(latents), "metric_waypoint_spacing": 0.25}}
    unspaced = {
        name: value for name, value in walks.items() if name not in ("goals_per_obs", "metric_waypoint_spacing")
    }
    cases: list[tuple[dict[str, Any], Path, str]] = [
        ({"data_path": str(toy_world)}, toy_world, r"holds pixels already; --measure needs a store of their latents"),
        ({"data_path": str(tmp_path / "tree")}, toy_world, r"nothing tells which autoencoder made these latents"),
        ({}, tmp_path / "nowhere", r"nowhere: no such file or folder"),
        ({}, latents, r"--measure .*: holds latents; name the pixels"),
        ({}, tmp_path / "other", r"--measure .*other: frame 0 of walk_000 is another than the latents'"),
        ({}, tmp_path / "fewer", r"--measure .*fewer: lacks 1 of the 3 sequences of the latents \(walk_001\)"),
        ({**unspaced, "data_path": None, "datasets": datasets}, toy_world, r"it does not measure datasets"),
        ({"global_batch_size": 64}, toy_world, r"a batch has 64: use a batch of 30 or less"),
        ({"model": "EqM-S/8"}, toy_world, r"got latents of 4 x 4; expected multiples of the patch, 8"),
        ({"ckpt": "/nowhere.pt"}, toy_world, r"no such file or folder; expected a checkpoint"),
        ({"precision": "fp16"}, toy_world, r"fp16 weights cannot be trained"),
        ({"results_dir": str(tmp_path), "run_name": "mine"}, toy_world, r"holds thesis.tex and is no training run"),
    ]
    for changes, pixels, told in cases:
        with pytest.raises(InputError, match=told) as error:
            measure(config(tmp_path / "results", latents, **changes), pixels)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "results").exists()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_a_measurement_and_the_run_after_it(
    tmp_path: Path, latents: Path, toy_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    sizes = [f"--set=model.{name}={value}" for name, value in SMALL.items()]
    common = [*sizes, "--data-path", latents, "-o", tmp_path, "--run-name", "run", "--global-batch-size", 8]
    command = ["train", "eqm", *common, "--precision", "bf16-mixed", "--device", "cpu", "--quiet"]
    lines = run_cli(*command, "--measure", toy_world).stdout.splitlines()
    assert lines[0].split() == ["s/step", "from", "..", "to", "samples/s", "peak", "MB"]
    assert [line[:20].strip() for line in lines[1:4]] == ["latents, bf16-mixed", "latents, fp32", "pixels, bf16-mixed"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "measured.json"]
    assert not list((tmp_path / "scratch").iterdir())

    content = json.loads((tmp_path / "run" / "measured.json").read_text())
    cases = {name: Case(**case) for name, case in content["cases"].items()}
    ours, full, pixels = cases.values()
    assert content["against_fp32"] == saving(ours, full)
    assert content["against_pixels"] == saving(ours, pixels)
    for case in cases.values():
        assert case.steps >= 4
        assert case.smallest <= case.seconds_per_step <= case.largest
        assert case.samples_per_second == pytest.approx(8 / case.seconds_per_step, rel=1e-2)
        assert case.peak_memory_mb > 50
    assert content["conditions"]["batch"] == 8

    told = run_cli(*command, "--steps", 2).stdout.splitlines()[-1]
    assert told.startswith(f"bf16-mixed: {content['against_fp32']['speedup']:.2f}x as fast as fp32 here")
    assert log(tmp_path)[-1]["against_fp32"] == content["against_fp32"]
    with pytest.raises(InputError, match="holds a run with other settings"):
        measure(config(tmp_path, latents, precision="bf16-mixed", global_batch_size=4), toy_world)


@pytest.mark.slow
def test_pixels_are_fitted_as_the_latents_were(tmp_path: Path, toy_world: Path) -> None:
    """Also where that is not square; fp32 is not measured against itself."""
    run(toy_world, tmp_path / "walks", size=(96, 64))
    found = measure(config(tmp_path, tmp_path / "walks", model=SMALL_CDIT, **WALKS), toy_world)
    assert list(found.cases) == ["latents, fp32", "pixels, fp32"]
    assert found.against_fp32 is None
    assert found.data["fitted"] == "96x64 (crop 4:3)"
    assert found.cases["pixels, fp32"].samples_per_second == pytest.approx(
        16 / found.cases["pixels, fp32"].seconds_per_step, rel=1e-2
    )
