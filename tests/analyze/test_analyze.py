"""halfstep analyze from recorded runs to report: what it finds, what it leaves out, what it says."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from halfstep.analyze import (
    METRICS,
    analyze,
    compare_storage,
    full_document,
    group_by_file,
    group_by_prompt,
    write_output,
)
from halfstep.errors import InputError
from halfstep.store import Run, TrajectoryFormat, TrajectoryStore, open_trajectories
from halfstep.store.run import Latents
from tests.support.batches import write_batch
from tests.support.cli import run_cli

SHAPE = (4, 8, 8)
STATES = 12


def trajectory(seed: int, bend: float, spread: float) -> np.ndarray:
    """From noise to a center, bent by the way and ending `spread` away from it."""
    rng = np.random.default_rng(seed)
    noise, own = rng.standard_normal((2, *SHAPE))
    center = np.random.default_rng(99).standard_normal((2, *SHAPE))
    t = np.linspace(0, 1, STATES).reshape(-1, 1, 1, 1)
    return ((1 - t) * noise + t * (center[0] + spread * own) + bend * np.sin(np.pi * t) * center[1]).astype(np.float32)


@pytest.fixture
def store(tmp_path: Path) -> TrajectoryStore:
    """Ten runs a prompt with the same seeds: "wide" bends more and ends more widely than "narrow"."""
    store = TrajectoryStore.create(tmp_path / "runs")
    for p, (prompt, bend, spread) in enumerate([("narrow", 0.2, 0.1), ("wide", 1.5, 0.8)]):
        for seed in range(10):
            store.add(
                f"prompt_{p:03d}_vid{seed:03d}",
                trajectory(seed, bend, spread),
                sigmas=np.linspace(1, 0, STATES),
                prompt=prompt,
                seed=seed,
            )
    return store


def test_what_differs_is_found(store: TrajectoryStore) -> None:
    analysis = analyze(store, group_by_prompt(store))
    verdicts = {test.metric: test.verdict for test in analysis.tests}
    assert {test.paired for test in analysis.tests} == {True}
    for name in ("path_length", "straightness", "mean_turning_angle", "dispersion"):
        assert verdicts[name] == "different", name
    narrow, wide = analysis.groups
    assert narrow.dispersion[0] == pytest.approx(wide.dispersion[0], rel=1e-3)  # the same noise
    assert wide.dispersion[-1] > 4 * narrow.dispersion[-1]
    assert wide.log_volume > narrow.log_volume
    assert analysis.separations[0].energy == pytest.approx(0, abs=1e-2)
    assert analysis.separations[0].p_corrected > 0.05
    assert analysis.separations[5].p_corrected < 0.05
    assert len(analysis.problems) == 1
    # A bent path lies in a plane: the third axis of its volume is rounding.
    assert verdicts["log_volume"] == verdicts["hull_volume"] == "not resolved"
    assert analysis.problems[0].startswith(
        "more than half of some values may be the rounding of the stored states: log volume (20), hull volume (20) of"
    )


def test_the_same_runs_under_two_names_do_not_differ(store: TrajectoryStore) -> None:
    keys = [key for key in store if key.startswith("prompt_000")]
    groups = {key: "ab"[i % 2] for i, key in enumerate(keys)}
    analysis = analyze(store, groups)
    assert all(test.verdict != "different" for test in analysis.tests)


def test_what_cannot_be_compared_is_left_out_and_named(store: TrajectoryStore) -> None:
    latents, sigmas = trajectory(50, 0.2, 0.1), np.linspace(1, 0, STATES)
    exact = TrajectoryFormat(storage="fp32")
    store.add("other_schedule", latents, sigmas=sigmas**2, prompt="narrow", seed=50)
    store.add("other_shape", latents[:, :, :4], sigmas=sigmas, prompt="narrow", seed=51)
    store.add("one_state", latents[:1], sigmas=[1.0], prompt="narrow", seed=52)
    broken = latents.copy()
    broken[3, 0, 0, 0] = np.nan
    store.add("not_finite", broken, sigmas=sigmas, prompt="narrow", seed=53, format=exact)
    store.add("damaged", latents, sigmas=sigmas, prompt="narrow", seed=54, format=TrajectoryFormat("raw"))
    (store.root / "damaged" / "latents" / "c.5.0.0.0").unlink()
    analysis = analyze(store, group_by_prompt(store))
    assert len(analysis.groups[0].runs) == 10
    assert {run.key for run in analysis.runs if not run.comparable} == {"other_schedule"}
    for key, reason in {
        "other_schedule": "noise levels differ from most runs'; not compared",
        "other_shape": "has the shape [4, 4, 8], most runs [4, 8, 8]; left out",
        "one_state": "has 1 states of known noise level",
        "not_finite": "has values that are not finite; left out",
        "damaged": "steps 5 to 5 are damaged",
    }.items():
        assert any(key in line and reason in line for line in analysis.problems), (key, analysis.problems)
    only_broken = {"not_finite": "a"}
    with pytest.raises(InputError, match="no run can be analyzed: not_finite"):
        analyze(store, only_broken)


@pytest.mark.slow
def test_one_bad_run_does_not_stop_the_comparison_of_formats(store: TrajectoryStore) -> None:
    broken = trajectory(50, 0.2, 0.1)
    broken[3, 0, 0, 0] = np.nan
    store.add("bad", broken, sigmas=np.linspace(1, 0, STATES), prompt="narrow", seed=2**63 + 5)
    groups = group_by_prompt(store)
    exact = analyze(store, groups, metrics=["straightness"])
    assert len(compare_storage(store, groups, exact)) == 7


def test_a_missing_seed_does_not_undo_the_pairs(store: TrajectoryStore) -> None:
    store.remove("prompt_001_vid004")
    analysis = analyze(store, group_by_prompt(store))
    assert {(t.paired, t.n_a, t.n_b) for t in analysis.tests if t.metric != "dispersion"} == {(True, 9, 9)}
    assert any("compared on 9 common seeds; 1 runs have no partner" in line for line in analysis.problems)


def test_the_corrector_of_a_step_counts_not_its_predictor() -> None:
    """Heun's method records two states at one noise level; speed and curvature are between levels."""
    values = trajectory(0, 0.2, 0.1)
    sigmas = np.linspace(1, 0, STATES)
    plain = Run("a", np.arange(STATES), sigmas, sigmas, Latents(STATES, SHAPE, lambda k: values[k]), "p", 0, {}, ())
    twice = np.repeat(sigmas, 2)[1:]
    predicted = Latents(len(twice), SHAPE, lambda k: values[(k + 1) // 2] + (0.5 if k % 2 else 0.0))
    heun = Run("b", np.arange(len(twice)), twice, twice, predicted, "p", 0, {}, ())
    analysis = analyze({"a": plain, "b": heun}, {"a": "x", "b": "y"})
    # Two runs of one plane have no volume.
    assert analysis.runs[0].metrics == pytest.approx(analysis.runs[1].metrics, nan_ok=True)


def test_the_order_of_runs_changes_nothing(store: TrajectoryStore) -> None:
    runs, groups = dict(store), group_by_prompt(store)
    there, back = (analyze(dict(some), groups) for some in (runs.items(), reversed(runs.items())))
    other = {key: groups[key] for key in reversed(groups)}
    assert analyze(runs, other).explained.tolist() == there.explained.tolist() == back.explained.tolist()
    values = {run.key: run.metrics for run in there.runs}
    assert all(run.metrics == pytest.approx(values[run.key], rel=1e-9, nan_ok=True) for run in back.runs)
    found, again = (
        {test.metric: (test.p_permutation, test.p_welch, test.hedges_g) for test in analysis.tests}
        for analysis in (there, back)
    )
    assert found.keys() == again.keys()
    assert "mean_speed" not in found  # at equal noise levels it is path_length, said twice
    for name, (permutation, welch, effect) in found.items():
        assert again[name] == (pytest.approx(permutation, abs=0.02), pytest.approx(welch, rel=1e-6), effect), name


def test_states_of_unknown_noise_level_are_left_out() -> None:
    values = trajectory(0, 0.2, 0.1)
    sigmas = np.linspace(1, 0, STATES)
    sigmas[4] = np.nan
    run = Run("a", np.arange(STATES), sigmas, sigmas, Latents(STATES, SHAPE, lambda k: values[k]), "p", 0, {}, ())
    analysis = analyze({"a": run}, {"a": "p"})
    assert len(analysis.runs[0].path.sigmas) == STATES - 1
    assert np.isfinite(analysis.runs[0].profiles["speed"][1]).all()


@pytest.mark.slow
def test_half_precision_against_the_exact_analysis(store: TrajectoryStore) -> None:
    exact = analyze(store, group_by_prompt(store))
    found = {item.format: item for item in compare_storage(store, group_by_prompt(store), exact)}
    assert found["fp16"].share == 0.5
    assert 0.04 < found["predictive at fp16's error"].share < 0.4
    assert found["bf16"].differences["path_length"][1] > found["fp16"].differences["path_length"][1] > 0
    assert found["fp16"].differences["path_length"][1] < 1e-4
    for item in found.values():
        assert all(median <= largest for median, largest in item.differences.values())
    assert found["fp16"].changed == []
    coarse = found["predictive, error <= 0.1 rms"]
    assert coarse.share < found["predictive at fp16's error"].share
    assert coarse.differences["mean_turning_angle"][1] > 0.1


def test_groups_from_a_file(store: TrajectoryStore, tmp_path: Path) -> None:
    path = tmp_path / "g.yaml"
    path.write_text("first: ['prompt_000*']\nsecond: [wide]\n")
    groups = group_by_file(store, path)
    assert set(groups.values()) == {"first", "second"}
    assert len(groups) == 20
    path.write_text("first: ['prompt_000_vid00[0-3]']\n")
    assert len(group_by_file(store, path)) == 4
    for text, named in (("a: [nothing*]", "matches no run"), ("a: ['*']\nb: [wide]", "is in 'a' and in 'b'")):
        path.write_text(text)
        with pytest.raises(InputError, match=named):
            group_by_file(store, path)


@pytest.mark.slow
def test_everything_is_written(store: TrajectoryStore, tmp_path: Path) -> None:
    groups = group_by_prompt(store)
    analysis = analyze(store, groups, pairwise=True)
    storage = compare_storage(store, groups, analysis)
    files = write_output(analysis, tmp_path / "out", "A <title>", storage)
    assert all(path.exists() for path in files)
    content = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert content == full_document(analysis, storage)
    assert {"runs", "metrics", "groups", "tests", "problems", "storage"} <= content.keys()
    assert content["metrics"].keys() == METRICS.keys()
    assert content["metrics"]["straightness"]["values"].keys() == content["runs"].keys()
    table = pq.read_table(tmp_path / "out" / "metrics.parquet").to_pandas()
    assert set(table["quantity"]) >= {"path_length", "speed", "variance"}
    assert (table[table["quantity"] == "speed"].groupby("run").size() == STATES - 1).all()
    for name in ("trajectories", "speed", "variance", "dispersion", "separation", "effects"):
        with Image.open(tmp_path / "out" / "plots" / f"{name}.png") as picture:
            colors = picture.convert("RGB").getcolors(1 << 20)
        assert colors is None or len(colors) > 20  # something is drawn
        assert (tmp_path / "out" / "plots" / f"{name}.svg").stat().st_size > 5000
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h1>A &lt;title&gt;</h1>" in page
    assert page.count("Plotly.newPlot(") >= 7
    text = page[page.index("<body>") :]
    assert not re.search(r"(src|href)=[\"']https?:", text)
    assert "nan" not in re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL).lower().replace("finance", "")
    (tmp_path / "out" / "plots" / "effects.png").write_bytes(b"of yesterday")
    few = {key: groups[key] for key in list(groups)[:3]}
    write_output(analyze(store, few), tmp_path / "out", "again")
    assert not (tmp_path / "out" / "plots" / "effects.png").exists()
    store.add("huge_seed", trajectory(3, 0, 0), sigmas=np.linspace(1, 0, STATES), prompt="narrow", seed=2**64 - 1)
    write_output(analyze(store, group_by_prompt(store)), tmp_path / "out", "again")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(InputError, match=r"holds notes\.txt and is no analysis"):
        write_output(analysis, tmp_path / "mine", "t")


@pytest.mark.slow
def test_the_command_line(store: TrajectoryStore, tmp_path: Path) -> None:
    base = ["analyze", "--batch-dir", store.root]
    listed = run_cli(*base, "--list-videos").stdout
    assert listed.count("\n") == 20
    assert "prompt_001_vid003          12 states  seed 3  wide" in listed
    result = json.loads(run_cli(*base, "--json", "--quiet", "-o", tmp_path / "out").stdout)
    assert result["tests"][0]["verdict"] in ("different", "no difference shown", "not enough runs")
    assert (tmp_path / "out" / "report.html").exists()
    one = json.loads(run_cli(*base, "--video-id", "prompt_000_vid001", "--json", "--metrics", "straightness").stdout)
    assert list(one["runs"]) == ["prompt_000_vid001"]
    assert list(one["metrics"]) == ["straightness"]
    assert one["tests"] == []
    words = run_cli(*base, "--compare-videos", "prompt_000_vid001", "prompt_001_vid001").stdout
    assert "prompt_000_vid001 and prompt_001_vid001:" in words
    assert "apart at the end" in words
    assert "not enough runs" in words
    for arguments, named in [
        (["--video-id", "nothing"], "no run 'nothing'; --list-videos shows them"),
        (["--compare-videos", "prompt_000_vid001"], "give two runs or more"),
        (["stray"], "run names follow --video-id or --compare-videos"),
        (["--metrics", "beauty"], "--metrics: got 'beauty'; expected some of path_length"),
        (["--groups", "none.yaml"], "none.yaml: no such file"),
    ]:
        assert named in run_cli(*base, *arguments, check=2).stderr
    (store.root / "prompt_000_vid003" / "sigmas" / "c" / "0").unlink()
    listed = run_cli(*base, "--list-videos").stdout
    assert listed.count("states") == 19
    assert "sigmas/c/0 is missing" in listed
    left = json.loads(run_cli(*base, "--json", "--quiet", "--metrics", "straightness").stdout)
    assert len(left["runs"]) == 19
    assert "sigmas/c/0 is missing" in left["problems"][0]
    assert "no such folder" in run_cli("analyze", "--batch-dir", tmp_path / "no", check=1).stderr


def test_the_older_format_is_analyzed(tmp_path: Path) -> None:
    for number in (1, 2):
        write_batch(tmp_path / "latents" / "prompt_000" / f"vid_00{number}")
    (tmp_path / "latents" / "prompt_000" / "vid_002" / "step_003.npy.gz").write_bytes(b"cut")
    result = json.loads(run_cli("analyze", "--batch-dir", tmp_path, "--json", "--quiet").stdout)
    assert {key: run["states"] for key, run in result["runs"].items()} == {
        "prompt_000_vid001": 4,
        "prompt_000_vid002": 3,
    }
    assert any("step_003.npy.gz" in line for line in result["problems"])


def test_a_real_batch_is_analyzed(outside_data: Path) -> None:
    result = json.loads(run_cli("analyze", "--batch-dir", outside_data / "legacy_batch", "--json", "--quiet").stdout)
    assert len(result["runs"]) == 5
    assert any("step_005.pt" in line for line in result["problems"])
    assert all(test["verdict"] == "not enough runs" for test in result["tests"])
    assert result["separation"] == []  # one of its groups has one run that can be compared
    runs = open_trajectories(outside_data / "legacy_batch")
    assert result["runs"]["prompt_001_vid001"]["states"] == len(runs["prompt_001_vid001"])
