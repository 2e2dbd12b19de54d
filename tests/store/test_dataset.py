import multiprocessing
import pickle
import signal
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from halfstep.errors import FileError, InputError, NumericsError, StoreError
from halfstep.spec import LatentSpec, PixelSpec
from halfstep.store import DatasetStore, DatasetWriter, Manifest, compact, verify
from tests.support.arrays import latents
from tests.support.cli import run_script

operations = st.lists(
    st.tuples(
        st.sampled_from(["append", "append", "append", "commit", "abandon", "reopen", "compact"]),
        st.sampled_from(["a", "b/c", "d e", "ü"]),
        st.integers(1, 5),
        st.integers(0, 2**16),
    ),
    max_size=25,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=operations, storage=st.sampled_from(["fp16", "bf16", "fp32"]))
def test_a_store_is_a_dict_of_arrays(operations, storage: str, manifest: Manifest) -> None:
    """Any order of writing, replacing, committing, crashing and tidying up reads as a plain dict would."""
    committed: dict[str, np.ndarray] = {}
    pending: dict[str, np.ndarray] = {}
    manifest = replace(manifest, storage=storage)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "store"

        def open_writer() -> DatasetWriter:
            return DatasetWriter(root, manifest, shard_bytes=1 << 30, commit_seconds=1e9)

        writer = open_writer()
        for action, key, frames, seed in operations:
            values = np.round(latents(frames, seed) * 64) / 64
            values = np.clip(np.round(values * 8) / 8, -16, 16)  # exact in all three types
            if action == "append":
                writer.append(key, values, frame=np.arange(frames, dtype=np.int32))
                pending[key] = values
            elif action == "commit":
                writer.commit()
                committed |= pending
                pending = {}
            elif action == "abandon":
                writer.extend(latents=values, frame=np.arange(frames, dtype=np.int32))
                writer.abandon()
            elif action == "reopen":
                writer.__exit__(RuntimeError, RuntimeError(), None)  # leaving by an error commits nothing
                pending = {}
                writer = open_writer()
            elif action == "compact":
                writer.__exit__(None, None, None)
                committed |= pending
                pending = {}
                drop = {key} if seed % 2 else set()
                removed = compact(root, drop)
                assert removed == sum(len(committed.pop(k)) for k in drop if k in committed)
                writer = open_writer()
        writer.__exit__(None, None, None)
        committed |= pending

        store = DatasetStore.open(root)
        assert store.keys() == sorted(committed)
        assert len(store) == sum(len(values) for values in committed.values())
        for key, values in committed.items():
            assert np.array_equal(store.read(key), (values - 1) * np.float32(0.5))
            assert np.array_equal(np.asarray(store.read(key, raw=True), np.float32), values)
            assert store.length(key) == len(values)
            assert np.array_equal(store.read(key, len(values) - 1), store.read(key)[-1:])
        report = verify(root)
        assert report.ok, report.problems
        assert report.items == len(store)


def test_shards_are_plain_safetensors_files(tmp_path: Path, manifest: Manifest) -> None:
    values = latents(5)
    position = np.random.default_rng(0).standard_normal((5, 2))
    with DatasetWriter(tmp_path / "s", manifest) as writer:
        writer.append("walk", values, frame=np.arange(5, dtype=np.int32), position=position, yaw=position[:, 0])
    (shard,) = (tmp_path / "s" / "shards").iterdir()
    arrays = load_file(shard)
    assert arrays["latents"].dtype == np.float16
    assert np.array_equal(arrays["latents"], values.astype(np.float16))
    assert np.array_equal(arrays["position"], position)
    assert arrays["yaw"].dtype == np.float64
    subprocess.run("sha256sum --quiet -c index/*.sha256", shell=True, check=True, cwd=tmp_path / "s")


def test_local_reads_are_views_of_the_file(tmp_path: Path, manifest: Manifest) -> None:
    with DatasetWriter(tmp_path / "s", manifest) as writer:
        writer.append("k", latents(3))
    raw = DatasetStore.open(tmp_path / "s").read("k", 1, 3, raw=True)
    assert not raw.flags.owndata
    assert not raw.flags.writeable


def test_scale_and_shift_a_channel(tmp_path: Path) -> None:
    spec = LatentSpec("test", 2, 8, scale=(2.0, 0.5), shift=(1.0, -1.0))
    values = latents(3)
    with DatasetWriter(tmp_path / "s", Manifest(spec, "fp32")) as writer:
        writer.append("k", values)
    read = DatasetStore.open(tmp_path / "s").read("k")
    assert np.array_equal(read[:, 0], (values[:, 0] - 1) * 2)
    assert np.array_equal(read[:, 1], (values[:, 1] + 1) / 2)


def test_posterior_is_model_ready(tmp_path: Path, manifest: Manifest) -> None:
    values = latents(3)
    with DatasetWriter(tmp_path / "s", replace(manifest, storage="fp32")) as writer:
        writer.append("k", values, logvar=np.full_like(values, np.log(4)))
    mean, std = DatasetStore.open(tmp_path / "s").posterior("k", 1, 2)
    assert np.array_equal(mean, (values[1:2] - 1) * np.float32(0.5))
    np.testing.assert_allclose(std, 2 * 0.5, rtol=1e-6)


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_reads_through_fsspec(tmp_path: Path, manifest: Manifest, protocol: str) -> None:
    values = {f"k{i}": latents(i + 1, seed=i) for i in range(4)}
    with DatasetWriter(tmp_path / "s", manifest, shard_bytes=200) as writer:
        for key, value in values.items():
            writer.append(key, value, label="x", yaw=np.arange(len(value), dtype=np.float64))
    url = f"file://{tmp_path}/s"
    if protocol == "memory":
        url = "memory://bucket/s"
        fsspec.filesystem("memory").put(f"{tmp_path}/s", "/bucket/s", recursive=True)
    local, remote = DatasetStore.open(tmp_path / "s"), DatasetStore.open(url)
    assert remote.keys() == local.keys()
    assert remote.spec == local.spec
    for key, value in values.items():
        assert np.array_equal(remote.read(key, 0, len(value)), local.read(key))
        assert np.array_equal(remote.read_array(key, "yaw"), local.read_array(key, "yaw"))
        assert remote.label(key) == "x"
        assert remote.labels()[key] == "x"
    with pytest.raises(StoreError, match="no store here"):
        DatasetStore.open("memory://bucket/none")


def test_an_opened_store_travels_to_other_processes(tmp_path: Path, manifest: Manifest) -> None:
    with DatasetWriter(tmp_path / "s", manifest) as writer:
        writer.append("k", latents(3))
    store = DatasetStore.open(tmp_path / "s")
    assert np.array_equal(pickle.loads(pickle.dumps(store)).read("k"), store.read("k"))


def _write_many(root: Path, manifest: Manifest, worker: int) -> None:
    with DatasetWriter(root, manifest, shard_bytes=500) as writer:
        for i in range(20):
            writer.append(f"w{worker}/{i}", latents(2, seed=100 * worker + i))


@pytest.mark.slow
def test_several_processes_write_one_store(tmp_path: Path, manifest: Manifest) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write_many, args=(tmp_path / "s", manifest, w)) for w in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    store = DatasetStore.open(tmp_path / "s")
    assert len(store.keys()) == 60
    for worker in range(3):
        for i in range(20):
            expected = (latents(2, seed=100 * worker + i) - 1) / 2
            assert np.array_equal(store.read(f"w{worker}/{i}"), expected)
    assert verify(tmp_path / "s").ok


KILLED_WRITER = """
import sys
from pathlib import Path
from halfstep.spec import LatentSpec
from halfstep.store import DatasetWriter, Manifest
from tests.support.arrays import latents
from tests.support.dying import Calls
manifest = Manifest(LatentSpec("test", 2, 8, scale=(0.5,), shift=(1.0,)), "fp16")
import pyarrow.parquet, numpy  # the calls of imports are not to be counted
with DatasetWriter(Path(sys.argv[1] + "-warm"), manifest, shard_bytes=1) as writer:
    writer.append("k", latents(2))
with Calls(int(sys.argv[2])) as calls:  # dies at an arbitrary call, inside a commit as likely as between two
    with DatasetWriter(Path(sys.argv[1]), manifest, shard_bytes=400) as writer:
        for i in range(12):
            writer.append(f"k{i:02d}", latents(2, seed=i))
print(calls.made)
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_a_whole_store(tmp_path: Path, manifest: Manifest) -> None:
    """Wherever it dies, what readers see verifies, holds no half sequence, and the next writer goes on."""
    rng = np.random.default_rng(0)
    seen = set()
    last = int(run_script(KILLED_WRITER, tmp_path / "whole", -1).stdout)
    for trial, stop in enumerate(rng.integers(1, last, size=12)):
        root = tmp_path / f"s{trial}"
        run_script(KILLED_WRITER, root, stop, check=-signal.SIGKILL)
        if not (root / "manifest.json").exists():  # died before there was a store; the next run makes it
            DatasetWriter(root, manifest).__exit__(None, None, None)
        report = verify(root)
        assert report.ok, (stop, report.problems)
        store = DatasetStore.open(root)
        for key in store.keys():
            assert np.array_equal(store.read(key), (latents(2, seed=int(key[1:])) - 1) / 2)
        # Shards are committed in order, so what is there is a beginning.
        assert store.keys() == [f"k{i:02d}" for i in range(len(store.keys()))]
        seen.add(len(store.keys()))
        with DatasetWriter(root, manifest) as writer:
            writer.append("after", latents(1))
        assert not any((root / "staging").iterdir())
        assert verify(root).items == len(store) + 1
    assert len(seen) > 2, "the kills never fell between commits"


def test_a_sequence_that_does_not_fit_is_refused_and_the_store_stays(tmp_path: Path, manifest: Manifest) -> None:
    root = tmp_path / "s"
    with DatasetWriter(root, manifest) as writer:
        writer.append("k", latents(2))
        with pytest.raises(NumericsError, match="not finite in fp16"):
            writer.append("big", latents(2) + 1e6)
        with pytest.raises(InputError, match="one store holds one shape"):
            writer.append("wide", latents(2, shape=(2, 3, 5)))
        with pytest.raises(InputError, match=r"expected \[n, 2, ...\]"):
            writer.append("deep", latents(2, shape=(3, 3, 4)))
    assert DatasetStore.open(root).keys() == ["k"]


def test_an_abandoned_sequence_of_other_arrays_leaves_no_trace(tmp_path: Path, manifest: Manifest) -> None:
    root = tmp_path / "s"
    with DatasetWriter(root, manifest) as writer:
        writer.extend(latents=latents(2), yaw=np.zeros(2))
        writer.abandon()
        with pytest.raises(InputError, match="yaw: got int64"):
            writer.extend(latents=latents(2), yaw=np.zeros(2, np.int64))
        writer.append("k", latents(3))
    assert DatasetStore.open(root).read("k").shape == (3, 2, 3, 4)
    assert verify(root).ok
    assert not any((root / "staging").iterdir())


def test_a_commit_that_fails_leaves_no_orphan(tmp_path: Path, manifest: Manifest, monkeypatch) -> None:
    root = tmp_path / "s"
    with DatasetWriter(root, manifest) as writer:
        writer.append("k", latents(2))
    from halfstep.store import writer as module

    original = module.rename_durably

    def full_disk(source: Path, target: Path) -> None:
        if target.suffix == ".parquet":
            raise OSError(28, "No space left on device", str(target))
        original(source, target)

    monkeypatch.setattr(module, "rename_durably", full_disk)
    with (
        pytest.raises(FileError, match="No space left on device; what was complete before is kept"),
        DatasetWriter(root, manifest) as writer,
    ):
        writer.append("more", latents(2))
    assert verify(root) == verify(root).__class__(1, 2, [])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weights_sha256": "other"}, r"autoencoder: test \(weights unknown\), not test \(weights other\)"),
        ({"scale": (0.25,)}, r"scale: \(0.5,\), not \(0.25,\)"),
        ({"pixels": PixelSpec(64, 64)}, r"pixels: None, not 64x64 \(crop fill\)"),
    ],
)
def test_latents_of_another_spec_are_refused(tmp_path: Path, manifest: Manifest, change, named: str) -> None:
    with DatasetWriter(tmp_path / "s", manifest) as writer:
        writer.append("k", latents(2))
    with pytest.raises(InputError, match=named):
        DatasetWriter(tmp_path / "s", replace(manifest, spec=replace(manifest.spec, **change)))
    DatasetWriter(tmp_path / "s", replace(manifest, spec=replace(manifest.spec, autoencoder="same weights elsewhere")))


def test_another_version_and_another_folder_are_refused(tmp_path: Path, manifest: Manifest) -> None:
    root = tmp_path / "s"
    with DatasetWriter(root, manifest) as writer:
        writer.append("k", latents(2))
    text = (root / "manifest.json").read_text()
    (root / "manifest.json").write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(InputError, match="format version 2; this halfstep reads version 1"):
        DatasetStore.open(root)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(InputError, match="and is no latent store"):
        DatasetWriter(tmp_path / "full", manifest)
    with pytest.raises(StoreError, match="no store here"):
        DatasetStore.open(tmp_path / "none")


def test_unknown_keys_and_frames_are_named(tmp_path: Path, manifest: Manifest) -> None:
    with DatasetWriter(tmp_path / "s", manifest) as writer:
        writer.append("k", latents(2))
    store = DatasetStore.open(tmp_path / "s")
    with pytest.raises(InputError, match=r"no sequence 'q' \(of 1\)"):
        store.read("q")
    with pytest.raises(InputError, match=r"frames \[1, 3\) asked for; the sequence has frames \[0, 2\)"):
        store.read("k", 1, 3)
    with pytest.raises(InputError, match="no array 'yaw' is stored for it; there are latents"):
        store.read_array("k", "yaw")
