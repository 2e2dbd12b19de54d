"""Groups of runs that are many, few, still, straight, or not made alike."""

import json
import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from halfstep.analyze import Analysis, analyze, full_document, group_by_file, group_by_prompt, write_output
from halfstep.analyze.ends import last_states
from halfstep.analyze.words import findings
from halfstep.errors import InputError
from halfstep.store import TrajectoryFormat, TrajectoryStore
from halfstep.store.run import FP32, Latents, Rounding, Run

SHAPE = (4, 6, 6)
STATES = 10


def run_of(states: np.ndarray, key: str, prompt: str, seed: int, /, **attributes: object) -> Run:
    values = states.reshape(len(states), *SHAPE).astype(np.float32)
    sigmas = np.linspace(1, 0, len(states))
    kept = Latents(len(states), SHAPE, lambda k: values[k])
    return Run(key, np.arange(len(states)), sigmas, sigmas, kept, prompt, seed, attributes, ())


def bent(seed: int, bend: float = 0.3, spread: float = 0.2, prompt: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    noise, own, way = rng.standard_normal((3, math.prod(SHAPE)))
    center = np.random.default_rng(1000 + prompt).standard_normal(math.prod(SHAPE))
    t = np.linspace(0, 1, STATES)[:, None]
    return (1 - t) * noise + t * (center + spread * own) + bend * np.sin(np.pi * t) * (way + t * own)


def analyzed(runs: dict[str, Run]) -> Analysis:
    return analyze(runs, group_by_prompt(runs))


@pytest.mark.parametrize("storage", ["fp32", "fp16"])
@pytest.mark.parametrize("paired", [True, False])
def test_straight_runs_of_another_scale_have_no_shape_to_tell_apart(tmp_path: Path, storage: str, paired: bool) -> None:
    """What bends, turns and fills space in a straight run is rounding, which grows with the scale."""
    store = TrajectoryStore.create(tmp_path / "runs")
    for scale in (1.0, 1.5):
        for k in range(10):
            seed = k if paired else int(k + 100 * scale)
            start, end = np.random.default_rng(seed).standard_normal((2, 4, 16, 16))
            t = np.linspace(0, 1, 20).reshape(-1, 1, 1, 1)
            states = (scale * ((1 - t) * start + t * end)).astype(np.float32)
            form = TrajectoryFormat(storage=storage)
            store.add(f"{scale}-{k}", states, sigmas=np.linspace(1, 0, 20), prompt=str(scale), seed=seed, format=form)
    verdicts = {test.metric: test.verdict for test in analyzed(dict(store)).tests}
    shape = {
        "straightness",
        "mean_acceleration",
        "mean_turning_angle",
        "half_life",
        "effective_dimension",
        "log_volume",
        "hull_volume",
    }
    assert {verdicts.pop(name) for name in shape} <= {"not resolved", "no difference shown"}
    assert set(verdicts.values()) == {"different"}  # lengths and spreads are another


def test_rounding_of_states_is_what_was_expected() -> None:
    rng = np.random.default_rng(0)
    state = (rng.standard_normal((4, 100, 100)) * np.array([1, 0.1, 5, 1e-4]).reshape(4, 1, 1)).astype(np.float32)
    casts: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "fp16": lambda x: x.astype(np.float16).astype(np.float32),
        "bf16": lambda x: ((x.view(np.uint32) + 0x8000) & 0xFFFF0000).astype(np.uint32).view(np.float32),
    }
    for name, cast in casts.items():
        error = float(np.sqrt(np.mean(np.square(cast(state).astype(np.float64) - state))))
        assert Rounding.of({name: 1.0}).rms(state) == pytest.approx(error, rel=0.05)
    tiny = state * np.float32(1e-7)
    error = float(np.sqrt(np.mean(np.square(casts["fp16"](tiny).astype(np.float64) - tiny))))
    assert error < Rounding.of({"fp16": 1.0}).rms(tiny) < 1.5 * error  # many are below half of the smallest step
    assert Rounding.of({}, 0.3).rms(state) == pytest.approx(0.3 / math.sqrt(3))
    assert Rounding.of({"fp16": 1.0, "fp32": 1.0}).rms(state) > FP32.rms(state)


def test_a_run_says_how_it_was_rounded(tmp_path: Path) -> None:
    store = TrajectoryStore.create(tmp_path / "runs")
    states = bent(0).reshape(STATES, *SHAPE).astype(np.float32)
    kept = {
        "exact": (TrajectoryFormat(storage="fp32"), {}),
        "half": (TrajectoryFormat("raw", "fp16"), {}),
        "born": (TrajectoryFormat(storage="fp32"), {"dtype": "bfloat16"}),
        "bound": (TrajectoryFormat(max_error=0.01), {}),
    }
    for key, (form, attributes) in kept.items():
        store.add(key, states, sigmas=np.linspace(1, 0, STATES), format=form, **attributes)
    assert store["exact"].rounding == FP32
    assert store["half"].rounding == Rounding.of({"fp32": 1.0, "fp16": 1.0})
    assert store["born"].rounding == Rounding.of({"fp32": 1.0, "bf16": 1.0})
    assert store["bound"].rounding == Rounding.of({"fp32": 1.0}, 0.01)
    store.add("codec", states, sigmas=np.linspace(1, 0, STATES))
    error = np.stack([run - state for run, state in zip(store["codec"].latents, states, strict=True)])
    expected = np.mean([store["codec"].rounding.rms(state) for state in states])
    assert float(np.sqrt(np.square(error).mean())) == pytest.approx(expected, rel=0.3)


def test_inner_products_of_last_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of few runs, against all at once."""
    runs = {f"r{k}": run_of(bent(k), f"r{k}", "p", k) for k in range(7)}
    center = np.random.default_rng(0).standard_normal(math.prod(SHAPE))
    monkeypatch.setattr("halfstep.analyze.ends._AT_ONCE", 3 * 4 * math.prod(SHAPE))
    monkeypatch.setattr("halfstep.analyze.ends._COLUMNS", 50)
    ends = last_states(dict(reversed(runs.items())), center, dict.fromkeys(runs, 0.5))
    states = np.stack([run.latents[-1].reshape(-1) for run in runs.values()]) - center
    assert ends.of(list(runs)) == pytest.approx(states @ states.T, rel=1e-5, abs=1e-4)
    assert ends.errors_of(["r3"]) == pytest.approx(0.5 * math.sqrt(math.prod(SHAPE)))


def test_many_groups(tmp_path: Path) -> None:
    """Nine groups: a test of all, the pairs, a page that says no more than ten sentences and uses each color once."""
    runs = {}
    for g in range(9):
        for k in range(8):
            states = bent(k, bend=0.3 + 1.2 * (g == 3), prompt=g)
            runs[f"{g}-{k}"] = run_of(states, f"{g}-{k}", f"prompt {g}", k)
    analysis = analyzed(runs)
    of_all = {test.metric: test.verdict for test in analysis.omnibus}
    assert of_all["path_length"] == of_all["straightness"] == "different"
    assert all(test.paired for test in analysis.omnibus)
    apart = {(t.a, t.b) for t in analysis.tests if t.metric == "straightness" and t.verdict == "different"}
    bent_more = {tuple(sorted(("prompt 3", f"prompt {g}"))) for g in range(9) if g != 3}
    assert apart >= bent_more
    assert len(apart - bent_more) <= 1
    assert analysis.separations[0].a == "all groups"
    assert analysis.separations[-1].sigma == 0
    assert len(findings(analysis)) <= 10
    write_output(analysis, tmp_path / "out", "title")
    page = (tmp_path / "out" / "report.html").read_text()
    before = page[page.index("<h2>Findings") : page.index("plotly-graph-div")]
    assert before.count("<li>") == len(findings(analysis))
    assert "Which pairs of groups differ" in page
    assert "title='sum_k |x_{k+1} - x_k|, latent.'" in page  # what a metric is, on hover
    assert (tmp_path / "out" / "plots" / "pairs.png").exists()
    document = full_document(analysis, [])
    assert {test["metric"] for test in document["omnibus"]} == {test.metric for test in analysis.omnibus}


def test_colors_do_not_repeat() -> None:
    from halfstep.analyze.plots import palette

    for count in (2, 8, 9, 24, 100):
        assert len(set(palette(count))) == count


def test_five_hundred_groups() -> None:
    """Compared all together; pairs of them would be 124,750."""
    runs = {f"{g}-{k}": run_of(bent(1000 * g + k), f"{g}-{k}", f"prompt {g}", k) for g in range(500) for k in range(2)}
    analysis = analyze(runs, group_by_prompt(runs), metrics=["path_length", "straightness"])
    assert {test.metric for test in analysis.omnibus} == {
        "path_length",
        "straightness",
        "dispersion",
        "dispersion_on_axes",
    }
    assert analysis.tests == []
    assert any("500 groups are compared all together" in line for line in analysis.problems)


def test_seeds_that_not_all_groups_have_are_said_and_left_out() -> None:
    runs = {f"{g}-{k}": run_of(bent(k, prompt=g), f"{g}-{k}", f"prompt {g}", k) for g in range(3) for k in range(7 + g)}
    analysis = analyzed(runs)
    assert "3 groups: compared on 7 common seeds; 3 runs have no partner" in analysis.problems
    assert {(test.sizes, test.paired) for test in analysis.omnibus} == {((7, 7, 7), True)}


def test_groups_of_one_are_said_and_left_out() -> None:
    runs = {f"{g}-{k}": run_of(bent(k, prompt=g), f"{g}-{k}", f"prompt {g}", k) for g in range(2) for k in range(8)}
    for g in range(2, 6):
        runs[f"{g}"] = run_of(bent(0, prompt=g), f"{g}", f"prompt {g}", 0)
    analysis = analyzed(runs)
    assert analysis.omnibus == []
    assert {(test.a, test.b) for test in analysis.tests} == {("prompt 0", "prompt 1")}
    assert any("4 groups have one run and are not compared" in line for line in analysis.problems)


def test_still_and_equal_runs_get_no_verdict(tmp_path: Path) -> None:
    still = np.full((STATES, math.prod(SHAPE)), 0.7)
    runs = {f"{g}-{k}": run_of(still, f"{g}-{k}", f"prompt {g}", k) for g in range(3) for k in range(6)}
    analysis = analyzed(runs)
    assert {test.verdict for test in (*analysis.omnibus, *analysis.tests)} <= {
        "no difference shown",
        "not enough runs",
        "not resolved",
    }
    write_output(analysis, tmp_path / "out", "still")
    assert "nan%" not in (tmp_path / "out" / "report.html").read_text()


def test_one_run_makes_a_page_without_empty_charts(tmp_path: Path) -> None:
    analysis = analyzed({"a": run_of(bent(0), "a", "p", 0)})
    write_output(analysis, tmp_path / "out", "one")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "1 run of 10 states in one group" in page
    assert page.count('class="plotly-graph-div"') == 3  # where it went, how fast, its variance
    assert not (tmp_path / "out" / "plots" / "dispersion.png").exists()


def test_runs_of_another_kind_of_states_are_not_compared() -> None:
    """The same noise levels, but one scheduler scales its states and the other does not."""
    kinds = {"ddim": "(x0 + sigma noise) / sqrt(1 + sigma^2)", "euler": "x0 + sigma noise"}
    runs = {}
    for name, kind in kinds.items():
        for k in range(8 if name == "ddim" else 6):
            runs[f"{name}-{k}"] = run_of(bent(k), f"{name}-{k}", name, k, states=kind, scheduler=name)
    analysis = analyzed(runs)
    assert Counter(run.comparable for run in analysis.runs) == {True: 8, False: 6}
    assert any("its states are x0 + sigma noise, most runs'" in line for line in analysis.problems)
    assert analysis.tests == []
    unknown = {key: replace(run, attributes={}) if key.startswith("euler") else run for key, run in runs.items()}
    assert all(run.comparable for run in analyzed(unknown).runs)


def test_what_was_not_made_alike_is_said() -> None:
    runs = {
        f"{g}-{k}": run_of(
            bent(k, prompt=g), f"{g}-{k}", f"prompt {g}", k, guidance=5.0 + g, steps=10 + k % 2, model="toy"
        )
        for g in range(2)
        for k in range(8)
    }
    problems = analyzed(runs).problems
    assert (
        "not all runs have the same guidance: 5.0 (8 runs); 6.0 (8 runs); what differs between groups may come from it"
        in problems
    )
    assert "not all runs have the same steps: 10 (8 runs); 11 (8 runs); it adds to the spread within groups" in problems
    assert not any("model" in line for line in problems)


@pytest.mark.parametrize("paired", [True, False])
def test_permuting_runs_changes_no_number(paired: bool) -> None:
    runs = {}
    for g in range(3):
        for k in range(6):
            seed = k if paired else 10 * g + k
            runs[f"{g}-{k}"] = run_of(bent(seed, prompt=g), f"{g}-{k}", f"prompt {g}", seed)
    mixed = np.random.default_rng(0).permutation(list(runs)).tolist()
    one, other = analyzed(runs), analyzed({key: runs[key] for key in mixed})
    assert full_document(one, []) == full_document(other, [])


def test_long_names_that_begin_alike_stay_apart() -> None:
    from halfstep.analyze.plots import short_names

    long = "a photograph of a car on a mountain road at night, "
    names = [f"{long}{color}" for color in ("red", "blue", "green")]
    for most in (20, 24, 40):
        short = short_names(names, most)
        assert len(set(short.values())) == 3
        assert all(len(name) <= most for name in short.values())
    assert short_names([f"{'x' * 60}{k}{'y' * 60}" for k in range(3)], 24) == {
        f"{'x' * 60}{k}{'y' * 60}": f"{'x' * 16}... {k + 1}" for k in range(3)
    }
    assert short_names(["a", "b" * 99], 24) == {"a": "a", "b" * 99: f"{'b' * 21}..."}


def test_odd_names_make_a_whole_page(tmp_path: Path) -> None:
    """Half of a surrogate pair, a group named as the program names all of them, and letters that no font here has."""
    runs = {}
    for g, prompt in enumerate(["bad \ud800", "all groups", "雨 $x$ <b>"]):
        for k in range(6):
            runs[f"{g}-{k}"] = run_of(bent(k, prompt=g), f"{g}-{k}", prompt, k)
    analysis = analyzed(runs)
    assert sum("separat" in line for line in findings(analysis)) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_output(analysis, tmp_path / "out", "odd")
    assert json.loads((tmp_path / "out" / "analysis.json").read_text())["runs"]["0-0"]["prompt"] == "bad \ud800"
    assert {row["group"] for row in pq.read_table(tmp_path / "out" / "metrics.parquet").to_pylist()} == {
        r"bad \ud800", "all groups", "雨 $x$ <b>"
    }  # fmt: skip


def test_values_too_large_to_square_cost_their_run_alone() -> None:
    runs = {f"{g}-{k}": run_of(bent(k, prompt=g), f"{g}-{k}", f"prompt {g}", k) for g in range(2) for k in range(6)}
    huge = bent(9)
    huge[-1, 0] = 1e20
    analysis = analyzed({**runs, "huge": run_of(huge, "huge", "prompt 0", 9)})
    assert len(analysis.runs) == 12
    assert "huge: has values of up to 1e+20, beyond 1e+15; left out" in analysis.problems


def test_no_value_is_not_too_few_runs() -> None:
    still = np.full((STATES, math.prod(SHAPE)), 0.7)
    runs = {f"{g}-{k}": run_of(still, f"{g}-{k}", f"prompt {g}", k) for g in range(2) for k in range(6)}
    reasons = {test.metric: test.not_enough for test in analyzed(runs).tests}
    assert reasons["straightness"] == "not enough runs: it has no value in the runs of a group"


def test_an_analysis_stays_out_of_stores(tmp_path: Path) -> None:
    TrajectoryStore.create(tmp_path / "runs")
    analysis = analyzed({"a": run_of(bent(0), "a", "p", 0)})
    with pytest.raises(InputError, match="lies in the trajectory store"):
        write_output(analysis, tmp_path / "runs" / "analysis", "x")
    assert not (tmp_path / "runs" / "analysis").exists()


@pytest.mark.parametrize(
    ("text", "named"),
    [("a: [x*]\na: [y*]", "'a' stands twice"), ("{}", "no groups"), ("a: []", "a: no patterns")],
)
def test_files_of_groups_that_say_nothing(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "g.yaml").write_text(text)
    with pytest.raises(InputError, match=named):
        group_by_file({"a": run_of(bent(0), "a", "p", 0)}, tmp_path / "g.yaml")
