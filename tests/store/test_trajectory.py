"""TrajectoryStore against a plain list of steps: what was appended is there, in every state a writer can leave."""

import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
import zarr

from halfstep.errors import BusyError, InputError, NumericsError, StoreError
from halfstep.store import (
    TrajectoryFormat,
    TrajectoryStore,
    open_trajectories,
    repair_trajectories,
    trajectory,
    verify_trajectories,
)
from halfstep.store.trajectory_layout import sealed
from tests.support.arrays import walk
from tests.support.cli import run_cli

FORMATS = [
    TrajectoryFormat(),
    TrajectoryFormat(strict=True),
    TrajectoryFormat(storage="bf16"),
    TrajectoryFormat(storage="fp32"),
    TrajectoryFormat(max_error=0.01),
    TrajectoryFormat("blosc"),
    TrajectoryFormat("blosc", "fp32"),
    TrajectoryFormat("raw"),
    TrajectoryFormat("raw", "fp32"),
]


def tolerance(form: TrajectoryFormat, latents: np.ndarray) -> float:
    if form.max_error is not None:
        return form.max_error
    largest = float(np.abs(latents).max())
    return {"fp32": 0.0, "fp16": largest * 2**-11, "bf16": largest * 2**-8}[form.storage]


@pytest.mark.parametrize("steps", [1, 16, 21, 33])
@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f"{f.codec}-{f.storage}-{f.max_error}")
def test_what_was_recorded_is_read(tmp_path: Path, form: TrajectoryFormat, steps: int) -> None:
    latents, sigmas = walk(steps), np.linspace(1, 0, steps)
    store = TrajectoryStore.create(tmp_path / "s")
    store.add("a", latents, sigmas=sigmas, timesteps=1000 * sigmas, format=form, prompt="a cat", seed=3, guidance=5.0)
    run = open_trajectories(tmp_path / "s")["a"]
    assert run.latents.shape == latents.shape
    for k in (0, -1, steps // 2):
        assert np.abs(run.latents[k] - latents[k]).max() <= tolerance(form, latents)
    assert np.abs(run.latents[:] - latents).max() <= tolerance(form, latents)
    assert np.abs(np.stack(list(run.latents)) - latents).max() <= tolerance(form, latents)
    assert np.array_equal(run.sigmas, sigmas)
    assert np.array_equal(run.timesteps, 1000 * sigmas)
    assert run.steps.tolist() == list(range(steps))
    assert (run.prompt, run.seed, run.attributes["guidance"], run.problems) == ("a cat", 3, 5.0, ())
    assert run.attributes["complete"]
    assert verify_trajectories(tmp_path / "s").ok
    with pytest.raises(IndexError):
        run.latents[steps]


@pytest.mark.parametrize("codec", ["blosc", "raw"])
def test_stock_codecs_need_only_zarr(tmp_path: Path, codec: str) -> None:
    TrajectoryStore.create(tmp_path / "s").add(
        "a", walk(), sigmas=np.linspace(1, 0, 21), format=TrajectoryFormat(codec, "fp32")
    )
    script = "import sys, zarr, numpy; g = zarr.open_group(sys.argv[1], mode='r')['a']\n"
    script += "assert not any(name.split('.')[0] in ('halfstep', 'torch') for name in sys.modules)\n"
    script += "assert g.attrs['complete'] and g['sigmas'].shape == (21,)\n"
    script += "assert g['latents'].metadata.dimension_names[0] == 'step'\n"
    script += "numpy.save(sys.argv[2], g['latents'][:])"
    subprocess.run([sys.executable, "-c", script, tmp_path / "s", tmp_path / "out.npy"], check=True)
    assert np.array_equal(np.load(tmp_path / "out.npy"), walk())


def test_of_a_run_without_a_step_nothing_is_left(tmp_path: Path) -> None:
    store = TrajectoryStore.create(tmp_path / "s")
    store.record("a", prompt="p").close()
    assert [path.name for path in store.root.iterdir()] == ["zarr.json"]


@pytest.mark.parametrize("appended", [1, 15, 16, 17, 40])
def test_a_run_that_was_left_is_read_and_repaired(tmp_path: Path, appended: int) -> None:
    store = TrajectoryStore.create(tmp_path / "s")
    latents = walk(40)
    writer = store.record("a", TrajectoryFormat(storage="fp32"), prompt="p")
    for k in range(appended):
        writer.append(k, 1000 - k, 1 - k / 40, latents[k])
        writer.pack()
    assert store["a"].problems[0] == "incomplete: it is being recorded"
    assert repair_trajectories(tmp_path / "s").recovered == {}  # not while someone writes
    writer.close()
    for repaired in (False, True):
        run = store["a"]
        assert run.problems[0] == "incomplete: its recording did not finish"
        assert run.steps.tolist() == list(range(appended))
        assert run.sigmas.tolist() == [1 - k / 40 for k in range(appended)]
        assert all(np.array_equal(run.latents[k], latents[k]) for k in range(appended))
        report = verify_trajectories(tmp_path / "s")
        assert (report.ok, report.steps, report.incomplete) == (True, appended, ["a"])
        if not repaired:
            assert sum(repair_trajectories(tmp_path / "s").recovered.values()) == appended % 16
    assert not list((tmp_path / "s" / "a").glob("journal"))


def test_a_reader_follows_the_steps_from_the_journal_to_the_arrays(tmp_path: Path) -> None:
    store, latents = TrajectoryStore.create(tmp_path / "s"), walk(40)
    writer = store.record("a", TrajectoryFormat(storage="fp32"))
    for k in range(10):
        writer.append(k, k, k, latents[k])
    early = store["a"]
    assert np.array_equal(early.latents[7], latents[7])
    for k in range(10, 40):
        writer.append(k, k, k, latents[k])
        writer.pack()
    assert np.array_equal(early.latents[7], latents[7])
    writer.finish()
    writer.close()
    assert np.array_equal(early.latents[:], latents[:10])


def test_few_groups_are_held_however_many_runs_are_open(tmp_path: Path) -> None:
    store = TrajectoryStore.create(tmp_path / "s")
    for i in range(12):
        store.add(f"r{i:02d}", walk(20, seed=i), sigmas=np.linspace(1, 0, 20), format=TrajectoryFormat(storage="fp32"))
    runs = [store[key] for key in store]
    for k in range(20):
        assert all(np.array_equal(run.latents[k], walk(20, seed=i)[k]) for i, run in enumerate(runs))
    assert len(trajectory._cache._groups) <= trajectory._GROUPS_KEPT
    runs[0].latents[0][:] = 7  # what a reader does with a step stays its own
    assert np.array_equal(runs[0].latents[0], walk(20, seed=0)[0])


def test_unknown_noise_levels_are_kept_as_unknown(tmp_path: Path) -> None:
    store, latents = TrajectoryStore.create(tmp_path / "s"), walk(20)
    store.add("a", latents, sigmas=[np.nan] * 20, format=TrajectoryFormat(storage="fp32"))
    writer = store.record("b", TrajectoryFormat(storage="fp32"))
    for k in range(5):
        writer.append(k, np.nan, np.nan, latents[k])
        writer.pack()
    assert np.array_equal(store["b"].latents[:], latents[:5])
    writer.close()
    repair_trajectories(tmp_path / "s")
    for key, count in (("a", 20), ("b", 5)):
        assert np.isnan(store[key].sigmas).all()
        assert np.array_equal(store[key].latents[:], latents[:count])


def test_a_name_is_free_until_its_run_is_there(tmp_path: Path) -> None:
    """What a writer leaves that is killed at its first breath, or in mid-removal, blocks nothing."""
    store = TrajectoryStore.create(tmp_path / "s")
    (tmp_path / "s" / ".a.123.new").mkdir()
    (tmp_path / "s" / ".a.123.new" / "journal").touch()
    (tmp_path / "s" / ".a.124.gone").mkdir()
    store.add("a", walk(), sigmas=np.linspace(1, 0, 21))
    assert list(store) == ["a"]
    repair_trajectories(tmp_path / "s")
    assert not list((tmp_path / "s").glob(".a.*"))
    store.remove("a")
    assert list(store) == []
    store.add("a", walk(), sigmas=np.linspace(1, 0, 21))
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / ".zarr.json.77.tmp").touch()
    assert len(TrajectoryStore.create(tmp_path / "t")) == 0


def test_a_run_that_is_being_recorded_is_not_removed(tmp_path: Path) -> None:
    store = TrajectoryStore.create(tmp_path / "s")
    writer = store.record("a")
    with pytest.raises(BusyError, match="another process is recording this run"):
        store.remove("a")
    writer.append(0, 1, 1, walk()[0])
    writer.finish()
    writer.close()
    writer.close()
    assert len(store["a"]) == 1


def test_many_processes_may_create_one_store(tmp_path: Path) -> None:
    script = "import sys; from halfstep.store import TrajectoryStore; TrajectoryStore.create(sys.argv[1])"
    children = [subprocess.Popen([sys.executable, "-c", script, tmp_path / "s"]) for _ in range(4)]
    assert [child.wait() for child in children] == [0, 0, 0, 0]


def test_a_run_without_steps_is_no_damage(tmp_path: Path) -> None:
    store = TrajectoryStore.create(tmp_path / "s")
    writer = store.record("a")
    writer.finish()
    writer.close()
    assert (len(store["a"]), store["a"].problems, store["a"].latents[:].size) == (0, (), 0)
    assert verify_trajectories(tmp_path / "s").ok


def test_values_that_are_not_finite_are_kept_and_noted(tmp_path: Path) -> None:
    store, latents = TrajectoryStore.create(tmp_path / "s"), walk(5)
    latents[3, 0, 0, 0, :2] = np.nan, np.inf
    store.add("a", latents, sigmas=np.linspace(1, 0, 5))
    run = store["a"]
    assert np.array_equal(np.isfinite(run.latents[3]), np.isfinite(latents[3]))
    assert run.problems == ("step 3: 2 values are not finite",)
    with pytest.raises(NumericsError, match="not finite in fp16"):
        store.add("b", latents, sigmas=np.linspace(1, 0, 5), format=TrajectoryFormat("raw"))
    assert store["b"].steps.tolist() == [0, 1, 2]
    assert store["b"].problems[0].startswith("incomplete")


def test_bad_input_is_named_and_loses_nothing(tmp_path: Path) -> None:
    store, latents = TrajectoryStore.create(tmp_path / "s"), walk(5)
    sigmas = np.linspace(1, 0, 5)
    store.add("a", latents, sigmas=sigmas)
    with pytest.raises(InputError, match="a run of this name is already in the store; choose another name"):
        store.add("a", latents, sigmas=sigmas)
    with pytest.raises(InputError, match="b: got 6 sigmas for 5 steps"):
        store.add("b", latents, sigmas=np.linspace(1, 0, 6))
    assert "b" not in store
    with pytest.raises(InputError, match="attributes must be JSON"):
        store.add("b", latents, sigmas=sigmas, model=object())
    for name in ("", "../x", "a b", ".hidden", "a/b"):
        with pytest.raises(InputError, match="a name is 1 to 128"):
            store.record(name)
    writer = store.record("c")
    writer.append(0, 1000, 1, latents[0])
    with pytest.raises(InputError, match=r"step 1 has the shape \[4, 2, 16\], the steps before \[4, 2, 16, 16\]"):
        writer.append(1, 900, 0.9, latents[1, ..., 0])
    with pytest.raises(InputError, match="got step 0 after step 0"):
        writer.append(0, 900, 0.9, latents[1])
    with pytest.raises(InputError, match="expected numbers"):
        writer.append(1, 900, np.inf, latents[1])
    with pytest.raises(InputError, match="already being recorded by another process"):
        store.record("c")
    writer.append(1, 900, 0.9, latents[1])
    writer.close()
    assert store["c"].steps.tolist() == [0, 1]
    with pytest.raises(InputError, match="no run 'z'"):
        store["z"]
    assert [form.is_exact for form in (TrajectoryFormat(), TrajectoryFormat(storage="fp32"))] == [False, True]
    assert TrajectoryFormat(max_error=0.0).is_exact
    assert not TrajectoryFormat(storage="fp32", max_error=0.1).is_exact
    with pytest.raises(InputError, match="codec: got 'zip'"):
        TrajectoryFormat("zip")
    with pytest.raises(InputError, match="storage: got 'bf16'; expected one of fp16, fp32 with raw"):
        TrajectoryFormat("raw", "bf16")
    with pytest.raises(StoreError, match="no such folder"):
        open_trajectories(tmp_path / "nothing")
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "note.txt").touch()
    with pytest.raises(InputError, match="is no trajectory store"):
        TrajectoryStore.create(tmp_path / "else")
    with pytest.raises(StoreError, match="no recorded steps here"):
        open_trajectories(tmp_path / "else")
    zarr.create_group(tmp_path / "other")
    with pytest.raises(StoreError, match="a Zarr group of something else"):
        open_trajectories(tmp_path / "other")


def test_inspect_says_what_latents_take_and_how_far_they_are_off(tmp_path: Path) -> None:
    store = TrajectoryStore.create(tmp_path / "s")
    sigmas = np.linspace(1, 0, 21)
    store.add("born-half", walk().astype(np.float16).astype(np.float32), sigmas=sigmas.tolist())
    store.add("half", walk(shape=(4, 32, 32)), sigmas=sigmas.tolist(), format=TrajectoryFormat(strict=True))
    store.add("raw", walk(), sigmas=sigmas.tolist(), format=TrajectoryFormat("raw"))
    told = [line for line in run_cli("store", "inspect", tmp_path / "s").stdout.splitlines() if "fp32's" in line]
    assert "of fp32's bytes; exact" in told[0]
    error = store["half"].attributes["latents_error"]
    assert 0 < error["all"] <= error["state"] <= error["channel"] <= 1.0
    assert f"{error['channel']:.2f} in the worst channel of a step" in told[1]
    assert told[2].strip() == "0.500 of fp32's bytes"


def test_runs_are_read_behind_a_url(tmp_path: Path) -> None:
    """Whole and unfinished ones; what is damaged is named as on disk. The memory file system stands for a bucket."""
    local = TrajectoryStore.create(tmp_path / "runs")
    states = walk(40)
    local.add("a", states, sigmas=np.linspace(1, 0, 40), prompt="p", seed=1)
    writer = local.record("b")
    for k in range(5):
        writer.append(k, float(5 - k), 1 - k / 5, states[k])
    writer.close()
    bucket = fsspec.filesystem("memory")
    url = f"memory://{tmp_path.name}/runs"
    for path in (tmp_path / "runs").rglob("*"):
        if path.is_file():
            bucket.pipe(f"/{tmp_path.name}/runs/{path.relative_to(tmp_path / 'runs')}", path.read_bytes())
    remote = open_trajectories(url)
    assert list(remote) == ["a", "b"]
    assert np.array_equal(remote["a"].latents[:], local["a"].latents[:])
    assert np.array_equal(remote["b"].latents[3], states[3])
    assert remote["b"].problems == ("incomplete: its recording did not finish",)
    report = verify_trajectories(url)
    assert (report.ok, report.steps, report.incomplete) == (True, 45, ["b"])
    assert isinstance(remote, TrajectoryStore)
    with pytest.raises(InputError, match="a URL can be read only"):
        remote.record("c")
    chunk = bucket.glob(f"/{tmp_path.name}/runs/a/latents/c.*")[0]
    bucket.pipe(chunk, bucket.cat(chunk)[:-9] + bytes(9))
    assert "steps 32 to 39 are damaged" in verify_trajectories(url).problems[0]
    with pytest.raises(StoreError, match="no trajectories here"):
        open_trajectories(f"memory://{tmp_path.name}/none")
    with pytest.raises(InputError, match=r"cannot be opened \(Unsupported filesystem: 'zz'\)"):
        open_trajectories("zz://bucket/runs")


def test_file_urls_on_the_command_line(tmp_path: Path) -> None:
    store = TrajectoryStore.create(tmp_path / "runs")
    store.add("a", walk(5), sigmas=np.linspace(1, 0, 5))
    url = f"file://{tmp_path / 'runs'}"
    assert "1 runs, 5 steps" in run_cli("store", "inspect", url).stdout
    assert "ok, 5 steps in 1 runs" in run_cli("store", "verify", url).stdout
    assert run_cli("analyze", "--batch-dir", url, "--list-videos").stdout.startswith("a ")
    run_cli("store", "convert", url, "-o", tmp_path / "plain", "--to", "store", "--codec", "blosc")
    assert zarr.open_array(str(tmp_path / "plain"), path="a/latents", mode="r").shape == (5, *walk(5).shape[1:])


@pytest.mark.parametrize(
    ("attributes", "named"),
    [
        ({"prompt": 5}, "got prompt=5; expected text"),
        ({"prompt": ["a"]}, r"got prompt=\['a'\]; expected text"),
        ({"seed": [1, 2]}, r"got seed=\[1, 2\]; expected a whole number"),
        ({"seed": True}, "got seed=True; expected a whole number"),
        ({"problems": "x"}, "'problems' is an attribute that the store keeps itself"),
        ({"complete": "no"}, "'complete' is an attribute that the store keeps itself"),
    ],
)
def test_attributes_of_other_types_are_refused(tmp_path: Path, attributes: dict[str, object], named: str) -> None:
    store = TrajectoryStore.create(tmp_path / "s")
    with pytest.raises(InputError, match=named):
        store.record("a", **attributes)
    assert list(store) == []


def test_attributes_of_other_types_that_are_there_are_named(tmp_path: Path) -> None:
    """As another program may have left them."""
    store = TrajectoryStore.create(tmp_path / "s")
    store.add("a", walk(5), sigmas=np.linspace(1, 0, 5), prompt="p", seed=1)
    group = zarr.open_group(str(tmp_path / "s"), path="a", mode="r+")
    group.update_attributes(sealed({**group.attrs.asdict(), "prompt": 5, "seed": [1], "states": {}, "dtype": ["x"]}))
    run = store["a"]
    assert (run.prompt, run.seed) == (None, None)
    assert [line for line in run.problems if line.startswith("odd: ")] == [
        f"odd: its {name} is {value!r}, which is left out" for name, value in run_odd(group.attrs.asdict())
    ]
    assert run_cli("analyze", "--batch-dir", tmp_path / "s", "--list-videos").stdout.startswith("a ")


@pytest.mark.parametrize("noted", [7, "text", [1], {"a": 1}])
def test_problems_that_are_no_lines_are_named(tmp_path: Path, noted: object) -> None:
    store = TrajectoryStore.create(tmp_path / "s")
    store.add("a", walk(5), sigmas=np.linspace(1, 0, 5), prompt="p", format=TrajectoryFormat("blosc", "fp16"))
    group = zarr.open_group(str(tmp_path / "s"), path="a", mode="r+")
    group.update_attributes(sealed({**group.attrs.asdict(), "problems": noted, "latents_error": noted}))
    run = store["a"]
    damage, odd = f"damaged: its problems are {noted!r}, which are no lines", "odd: its latents_error is"
    assert run.problems == (damage, f"{odd} {noted!r}, which is left out") and run.prompt == "p"
    assert "which are no lines" in run_cli("store", "verify", tmp_path / "s", check=1).stdout
    run_cli("store", "inspect", tmp_path / "s")


def run_odd(attributes: dict[str, object]) -> list[tuple[str, object]]:
    return [(name, value) for name, value in attributes.items() if name in ("prompt", "seed", "states", "dtype")]


@pytest.mark.parametrize("options", [{"channel_axis": 1.0}, {"channel_axis": "1"}, {"max_error": "x"}])
def test_formats_of_other_types_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InputError, match="expected a number"):
        TrajectoryFormat(**options)  # type: ignore[arg-type]
