"""Damage to a TrajectoryStore: it is found and named, costs what it must, and repair keeps the rest."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from halfstep.errors import StoreError
from halfstep.store import (
    TrajectoryFormat,
    TrajectoryStore,
    open_trajectories,
    readable_runs,
    repair_trajectories,
    verify_trajectories,
)
from halfstep.store.predictive import first_groups
from tests.support.arrays import GOLDEN, walk


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


def test_a_run_opened_before_a_repair_does_not_read_other_steps(tmp_path: Path) -> None:
    store, latents = TrajectoryStore.create(tmp_path / "s"), walk(80)
    store.add("a", latents, sigmas=np.linspace(1, 0, 80))
    run = store["a"]
    next((tmp_path / "s" / "a" / "latents").glob("c.0.*")).unlink()
    repair_trajectories(tmp_path / "s")
    with pytest.raises(StoreError, match="repaired or removed after it was opened; open it again"):
        run.latents[70]
    assert store["a"].steps.tolist() == list(range(64, 80))


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


@pytest.mark.parametrize(("broken", "kept"), [(0, []), (1, range(16))])
def test_the_journal_is_recovered_behind_what_is_whole(tmp_path: Path, broken: int, kept: Sequence[int]) -> None:
    store, latents = TrajectoryStore.create(tmp_path / "s"), walk(36)
    writer = store.record("a", TrajectoryFormat(storage="fp32"))
    for k in range(36):
        writer.append(k, 1.0 - k / 36, 1.0 - k / 36, latents[k])
        writer.pack()
    writer.close()
    chunk = store.root / "a" / "latents" / "c.0.0.0.0.0"
    damaged = bytearray(chunk.read_bytes())
    damaged[len(first_groups(bytes(damaged), 16 * broken)) + 60] ^= 1
    chunk.write_bytes(damaged)
    report = repair_trajectories(store.root)
    assert (len(report.lost), report.recovered) == (1, {"a": 4})
    run = store["a"]
    assert run.steps.tolist() == [*kept, *range(32, 36)]
    assert np.array_equal(run.latents[:], latents[run.steps])
    assert verify_trajectories(store.root).ok
