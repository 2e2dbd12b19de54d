"""TrajectoryStore against a plain list of steps: what was appended is there, in every state a writer can leave."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

from halfstep.errors import BusyError, InputError, NumericsError, StoreError
from halfstep.store import (
    TrajectoryFormat,
    TrajectoryStore,
    open_trajectories,
    readable_runs,
    repair_trajectories,
    trajectory,
    verify_trajectories,
)
from halfstep.store.predictive import first_groups
from tests.support.arrays import GOLDEN

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
SHAPE = (4, 2, 16, 16)


def walk(steps: int = 21, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Latents of a smooth way: float32 [steps, C, T, H, W]."""
    rng = np.random.default_rng(seed)
    noise, clean = rng.standard_normal((2, *shape))
    t = np.linspace(0, 1, steps).reshape(-1, *[1] * len(shape))
    return ((1 - t) * noise + t * clean + 0.1 * np.sin(3 * t) * noise * clean).astype(np.float32)


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


def test_every_damaged_byte_of_the_latents_is_found_and_costs_what_follows(tmp_path: Path) -> None:
    """In its chunk: groups refer to those before them."""
    store, latents = TrajectoryStore.create(tmp_path / "s"), walk(40)
    store.add("a", latents, sigmas=np.linspace(1, 0, 40), format=TrajectoryFormat(storage="fp32"))
    store.add("b", latents, sigmas=np.linspace(1, 0, 40))
    chunk = tmp_path / "s" / "a" / "latents" / "c.0.0.0.0.0"
    good = chunk.read_bytes()
    start = len(first_groups(good, 16))
    rng = np.random.default_rng(0)
    for place in [*range(start, start + 40), *rng.integers(start, len(first_groups(good, 32)), size=60)]:
        damaged = bytearray(good)
        damaged[place] ^= 1 << int(rng.integers(8))
        chunk.write_bytes(damaged)
        with pytest.raises(StoreError, match=r"s/a: steps 16 to 31 are damaged"):
            store["a"].latents[20]
    assert np.array_equal(store["a"].latents[:16], latents[:16])
    with pytest.raises(StoreError, match=r"s/a: steps 32 to 39 are damaged"):
        store["a"].latents[39]
    report = verify_trajectories(tmp_path / "s")
    assert not report.ok
    assert len(report.problems) == 2
    repaired = repair_trajectories(tmp_path / "s")
    assert len(repaired.lost) == 1
    run = store["a"]
    assert run.steps.tolist() == list(range(16))
    assert np.array_equal(run.latents[:], latents[:16])
    assert np.array_equal(run.sigmas, np.linspace(1, 0, 40)[:16])
    assert "steps 16 to 39 (24) could not be read" in run.problems[-1]
    assert verify_trajectories(tmp_path / "s").ok
    assert len(store["b"]) == 40


def test_a_chunk_that_is_missing_costs_its_own_steps(tmp_path: Path) -> None:
    store, latents = TrajectoryStore.create(tmp_path / "s"), walk(150)
    store.add("a", latents, sigmas=np.linspace(1, 0, 150), format=TrajectoryFormat(storage="fp32"))
    (tmp_path / "s" / "a" / "latents" / "c.1.0.0.0.0").unlink()  # zarr alone would read zeros
    assert len(verify_trajectories(tmp_path / "s").problems) == 4
    assert np.array_equal(store["a"].latents[149], latents[149])
    repair_trajectories(tmp_path / "s")
    run = store["a"]
    assert run.steps.tolist() == [*range(64), *range(128, 150)]
    assert np.array_equal(run.latents[:], latents[run.steps])
    assert verify_trajectories(tmp_path / "s").ok


def test_runs_of_the_older_codec_are_read_repaired_and_finished(tmp_path: Path) -> None:
    root = shutil.copytree(GOLDEN / "trajectories_version1", tmp_path / "s")
    expected = np.load(GOLDEN / "trajectories_version1.npy")
    store = TrajectoryStore.open(root)
    assert np.array_equal(store["a"].latents[:], expected)
    assert (store["a"].prompt, store["a"].attributes["latents_format"]) == ("a cat", "predictive, fp16")
    waiting = store["killed"].latents[:]
    assert repair_trajectories(root).recovered == {"killed": 3}
    assert store["killed"].steps.tolist() == list(range(19))
    assert np.array_equal(store["killed"].latents[:16], waiting[:16])
    assert np.abs(store["killed"].latents[16:] - waiting[16:]).max() < 2e-3
    assert verify_trajectories(root).ok


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


def test_an_interrupted_repair_loses_nothing(tmp_path: Path) -> None:
    store = TrajectoryStore.create(tmp_path / "s")
    store.add("a", walk(), sigmas=np.linspace(1, 0, 21))
    (tmp_path / "s" / "a").rename(tmp_path / "s" / ".a.old")  # before the copy had its name
    (tmp_path / "s" / ".a.repair").mkdir()
    assert list(store) == []
    repair_trajectories(tmp_path / "s")
    assert list(store) == ["a"]
    assert verify_trajectories(tmp_path / "s").ok


@pytest.mark.parametrize("part", ["zarr.json", "latents/zarr.json", "sigmas/zarr.json", "sigmas/c/0", "steps/c/0"])
def test_damaged_metadata_is_named_and_costs_its_run(tmp_path: Path, part: str) -> None:
    store = TrajectoryStore.create(tmp_path / "s")
    for key in "ab":
        store.add(key, walk(), sigmas=np.linspace(1, 0, 21))
    data = (tmp_path / "s" / "a" / part).read_bytes()
    (tmp_path / "s" / "a" / part).write_bytes(data[: len(data) // 2])
    for missing in (False, True):
        if missing and part != "zarr.json":  # without its zarr.json a folder is no run
            (tmp_path / "s" / "a" / part).unlink()
        report = verify_trajectories(tmp_path / "s")
        assert len(report.problems) == 1
        assert f"{tmp_path}/s/a" in report.problems[0]
        assert len(repair_trajectories(tmp_path / "s").lost) == 1
    assert len(store["b"].latents[:]) == 21


def test_a_damaged_journal_loses_only_what_follows(tmp_path: Path) -> None:
    store, latents = TrajectoryStore.create(tmp_path / "s"), walk()
    writer = store.record("a")
    for k in range(5):
        writer.append(k, k, k, latents[k])
    writer.close()
    journal = tmp_path / "s" / "a" / "journal"
    data = journal.read_bytes()
    for cut in (len(data) - 1, 4 * len(data) // 5 + 1, 4 * len(data) // 5):
        journal.write_bytes(data[:cut])
        assert np.array_equal(store["a"].latents[:], latents[:4])


def test_a_damaged_record_in_mid_journal_costs_itself_and_is_named(tmp_path: Path) -> None:
    store, latents = TrajectoryStore.create(tmp_path / "s"), walk()
    writer = store.record("a", TrajectoryFormat(storage="fp32"))
    for k in range(10):
        writer.append(k, k, k, latents[k])
    writer.close()
    journal = tmp_path / "s" / "a" / "journal"
    good = journal.read_bytes()
    kept = [0, 1, *range(3, 10)]
    for place in (5, 30, 1000):  # in the magic, in the header, in the values
        damaged = bytearray(good)
        damaged[2 * len(good) // 10 + place] ^= 4
        journal.write_bytes(damaged)
        run = store["a"]
        assert run.steps.tolist() == kept
        assert np.array_equal(run.latents[:], latents[kept])
        assert "some steps of its journal cannot be read" in run.problems[-1]
        assert not verify_trajectories(tmp_path / "s").ok
    report = repair_trajectories(tmp_path / "s")
    assert report.recovered == {"a": 9}
    assert len(report.lost) == 1
    assert np.array_equal(store["a"].latents[:], latents[kept])
    assert "steps of the journal could not be read" in store["a"].problems[-1]
    assert verify_trajectories(tmp_path / "s").ok


def test_a_repair_that_dies_before_the_journal_is_gone_repeats_no_step(tmp_path: Path) -> None:
    """The journal has a hole, its steps have moved, and it is still there when the next repair comes."""
    store, latents = TrajectoryStore.create(tmp_path / "s"), walk()
    writer = store.record("a", TrajectoryFormat(storage="fp32"))
    for k in range(10):
        writer.append(k, k, k, latents[k])
    writer.close()
    journal = tmp_path / "s" / "a" / "journal"
    damaged = bytearray(journal.read_bytes())
    damaged[2 * len(damaged) // 10 + 1000] ^= 4
    journal.write_bytes(damaged)
    repair_trajectories(tmp_path / "s")
    journal.write_bytes(damaged)
    kept = [0, 1, *range(3, 10)]
    assert store["a"].steps.tolist() == kept
    repair_trajectories(tmp_path / "s")
    assert store["a"].steps.tolist() == kept
    assert np.array_equal(store["a"].latents[:], latents[kept])


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


def test_a_lost_zarr_json_is_named_and_that_of_the_store_is_written_again(tmp_path: Path) -> None:
    store = TrajectoryStore.create(tmp_path / "s")
    for key in "ab":
        store.add(key, walk(), sigmas=np.linspace(1, 0, 21))
    (tmp_path / "s" / "a" / "zarr.json").unlink()
    report = verify_trajectories(tmp_path / "s")
    assert len(report.problems) == 1
    assert "s/a: is no run any more, its zarr.json is missing" in report.problems[0]
    (tmp_path / "s" / "zarr.json").unlink()
    with pytest.raises(StoreError, match="`halfstep store repair` writes it again"):
        open_trajectories(tmp_path / "s")
    repair_trajectories(tmp_path / "s")
    assert list(open_trajectories(tmp_path / "s")) == ["b"]
    metadata = tmp_path / "s" / "b" / "latents" / "zarr.json"
    metadata.write_text(metadata.read_text().replace("21,", "20,", 1))
    with pytest.raises(StoreError, match="21 steps for 20 steps"):
        store["b"]


def test_a_run_without_steps_is_no_damage(tmp_path: Path) -> None:
    store = TrajectoryStore.create(tmp_path / "s")
    writer = store.record("a")
    writer.finish()
    writer.close()
    assert (len(store["a"]), store["a"].problems, store["a"].latents[:].size) == (0, (), 0)
    assert verify_trajectories(tmp_path / "s").ok


def test_a_run_opened_before_a_repair_does_not_read_other_steps(tmp_path: Path) -> None:
    store, latents = TrajectoryStore.create(tmp_path / "s"), walk(80)
    store.add("a", latents, sigmas=np.linspace(1, 0, 80))
    run = store["a"]
    next((tmp_path / "s" / "a" / "latents").glob("c.0.*")).unlink()
    repair_trajectories(tmp_path / "s")
    with pytest.raises(StoreError, match="repaired or removed after it was opened; open it again"):
        run.latents[70]
    assert store["a"].steps.tolist() == list(range(64, 80))


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


def test_damaged_metadata_of_one_run_ends_nothing_for_the_others(tmp_path: Path) -> None:
    store = TrajectoryStore.create(tmp_path / "s")
    left = store.record("a")
    for k in range(20):
        left.append(k, 1.0 - k / 20, 1.0 - k / 20, walk(20)[k])
        left.pack()
    left.close()
    store.add("b", walk(), sigmas=np.linspace(1, 0, 21))
    for name in ("latents/zarr.json", "zarr.json", "steps/zarr.json"):
        path = store.root / "a" / name
        good = path.read_bytes()
        for bad in (
            b"",
            b"{}",
            good[:-40],
            b"\xff" + good,
            good.replace(b"array", b"arrax").replace(b"group", b"groux"),
        ):
            path.write_bytes(bad)
            before = {file: file.read_bytes() for file in store.root.rglob("*") if file.is_file()}
            report = verify_trajectories(store.root)
            assert [line.startswith(f"{store.root}/a") for line in report.problems] == [True], (name, bad)
            assert (report.runs, report.steps) == (2, 21)
            assert len(repair_trajectories(store.root).lost) == 1
            assert readable_runs(store)[0].keys() == {"b"}
            assert before == {file: file.read_bytes() for file in store.root.rglob("*") if file.is_file()}
        path.write_bytes(good)
    assert repair_trajectories(store.root).recovered == {"a": 4}


@pytest.mark.parametrize("form", [TrajectoryFormat(storage="fp32"), TrajectoryFormat("raw", "fp32")])
@pytest.mark.parametrize("counted", [0, 14, 15])
def test_a_count_that_chunks_and_journal_deny_is_damage_and_overwrites_nothing(
    tmp_path: Path, form: TrajectoryFormat, counted: int
) -> None:
    store = TrajectoryStore.create(tmp_path / "s")
    writer = store.record("a", form)
    for k in range(16):
        writer.append(k, 1.0 - k / 20, 1.0 - k / 20, walk(20)[k])
    writer.pack()
    for k in range(16, 20):  # the journal holds these alone
        writer.append(k, 1.0 - k / 20, 1.0 - k / 20, walk(20)[k])
    writer.close()
    metadata = store.root / "a" / "latents" / "zarr.json"
    metadata.write_text(metadata.read_text().replace("16,", f"{counted},", 1))
    chunks = {file: file.read_bytes() for file in (store.root / "a" / "latents").glob("c*")}
    assert not verify_trajectories(store.root).ok
    assert repair_trajectories(store.root).lost
    assert chunks == {file: file.read_bytes() for file in (store.root / "a" / "latents").glob("c*")}


def test_attributes_are_under_a_checksum(tmp_path: Path) -> None:
    store = TrajectoryStore.create(tmp_path / "s")
    store.add("a", walk(3), sigmas=[1.0, 0.5, 0.0], prompt="a cat", seed=3, nested={"b": [1.5, None]})
    assert (store["a"].problems, verify_trajectories(store.root).ok) == ((), True)
    assert "crc32c" not in store["a"].attributes
    path = store.root / "a" / "zarr.json"
    path.write_text(path.read_text().replace("a cat", "a car"))
    assert "its attributes do not match their checksum" in store["a"].problems[0]
    assert not verify_trajectories(store.root).ok
    assert store["a"].prompt == "a car"
