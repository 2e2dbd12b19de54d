import resource
import shutil
from pathlib import Path

import numpy as np
import pytest

from halfstep.errors import BusyError, StoreError
from halfstep.files import FileLock
from halfstep.store import DatasetStore, DatasetWriter, Manifest, compact, repair, verify
from tests.support.arrays import latents


@pytest.fixture
def store(tmp_path: Path, manifest: Manifest) -> Path:
    """Twelve sequences of two frames in four shards."""
    root = tmp_path / "store"
    with DatasetWriter(root, manifest, shard_bytes=250) as writer:
        for i in range(12):
            frames = {"frame": np.arange(2, dtype=np.int32), "yaw": np.array([0.1, i])}
            writer.append(f"k{i:02d}", latents(2, seed=i), label="even" if i % 2 == 0 else "odd", **frames)
    return root


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def content(root: Path) -> dict[str, tuple[bytes, str | None, bytes]]:
    opened = DatasetStore.open(root)
    return {
        k: (opened.read(k).tobytes(), opened.label(k), opened.read_array(k, "yaw").tobytes()) for k in opened.keys()
    }


def test_verify_finds_any_flipped_bit(store: Path) -> None:
    files = [path for path in sorted(store.rglob("*")) if path.is_file() and path.stat().st_size]
    assert {path.suffix for path in files} == {".json", ".parquet", ".sha256", ".safetensors"}
    rng = np.random.default_rng(0)
    for path in files:
        bits = path.stat().st_size * 8
        for bit in {0, bits - 1, *rng.integers(bits, size=12).tolist()}:
            flip(path, bit)
            report = verify(store)
            assert not report.ok, f"bit {bit} of {path}"
            flip(path, bit)
    assert verify(store).ok


@pytest.mark.parametrize("name", ["shards/00001.safetensors", "index/00001.parquet", "index/00001.sha256"])
def test_verify_names_a_missing_file(store: Path, name: str) -> None:
    (store / name).unlink()
    assert any(Path(name).stem in problem and "missing" in problem for problem in verify(store).problems)


@pytest.mark.slow
def test_repair_brings_everything_back_but_what_is_damaged_itself(store: Path) -> None:
    """Whatever single bit flips, repair leaves a store that verifies and loses at most the one sequence it hit."""
    before = content(store)
    rng = np.random.default_rng(1)
    files = [path for path in sorted(store.rglob("*")) if path.is_file() and path.stat().st_size]
    for path in files:
        bits = path.stat().st_size * 8
        for bit in rng.integers(bits, size=6).tolist():
            damaged = store.with_name("damaged")
            shutil.rmtree(damaged, ignore_errors=True)
            shutil.copytree(store, damaged)
            flip(damaged / path.relative_to(store), bit)
            report = repair(damaged)
            assert verify(damaged).ok
            after = content(damaged)
            assert after.items() <= before.items(), f"bit {bit} of {path} changed a latent"
            lost = before.keys() - after.keys()
            if path.suffix != ".safetensors":
                assert not lost
            elif lost and bit >= 8 * 2000:  # beyond the header a flip hits one sequence
                assert lost == set(report.lost)
                assert len(lost) == 1


def test_repair_rebuilds_lost_files(store: Path) -> None:
    before = content(store)
    (store / "index" / "00000.parquet").unlink()
    (store / "index" / "00001.sha256").unlink()
    (store / "manifest.json").unlink()
    report = repair(store)
    assert report.lost == []
    assert "manifest.json" in report.rebuilt
    assert content(store) == before
    assert verify(store).ok


def test_compact_merges_and_drops(store: Path) -> None:
    before = content(store)
    assert compact(store, drop=["k03", "k04", "gone already"]) == 4
    assert content(store) == {key: value for key, value in before.items() if key not in ("k03", "k04")}
    assert len(list((store / "shards").iterdir())) == 1
    assert verify(store).ok
    assert compact(store) == 0


def test_a_reader_keeps_its_snapshot_while_the_store_is_compacted(store: Path) -> None:
    before = content(store)
    opened = DatasetStore.open(store)
    for key in opened.keys():
        opened.read(key)
    late = DatasetStore.open(store)
    compact(store, drop=["k03"])
    assert opened.read("k03").tobytes() == before["k03"][0]  # mapped before it was removed
    assert all(late.read(key).tobytes() == before[key][0] for key in before if key != "k03")  # found where it is now
    with pytest.raises(StoreError, match=r"k03: was dropped or replaced after .* was opened"):
        late.read("k03")


def test_a_shard_number_is_never_used_again(tmp_path: Path, manifest: Manifest) -> None:
    """A reader that opened the store before must not take a new shard for the old one."""
    with DatasetWriter(tmp_path / "s", manifest) as writer:
        writer.append("stays", latents(40))
        writer.commit()
        writer.append("x", latents(2, seed=1))
    old = DatasetStore.open(tmp_path / "s")
    compact(tmp_path / "s", drop=["x"], shard_bytes=100)
    with DatasetWriter(tmp_path / "s", manifest) as writer:
        writer.append("y", latents(2, seed=2))
    with pytest.raises(StoreError, match="was dropped or replaced"):
        old.read("x")
    assert verify(tmp_path / "s").ok


def test_repair_keeps_the_newest_version_and_reports_only_live_losses(tmp_path: Path, manifest: Manifest) -> None:
    root = tmp_path / "s"
    with DatasetWriter(root, manifest) as writer:
        for seed in (1, 2, 3):
            writer.append("k", latents(2, seed=seed))
            writer.append(f"other{seed}", latents(2, seed=10 + seed))
            writer.commit()
    expected = {key: DatasetStore.open(root).read(key) for key in DatasetStore.open(root).keys()}
    (root / "index" / "00000.sha256").unlink()
    (root / "index" / "00002.parquet").unlink()  # the newest shard loses its index part
    report = repair(root)
    assert report.lost == []
    assert verify(root).ok
    store = DatasetStore.open(root)
    assert {key: store.read(key).tobytes() for key in store.keys()} == {k: v.tobytes() for k, v in expected.items()}


def test_shards_of_other_arrays_are_not_merged_over_and_over(tmp_path: Path, manifest: Manifest) -> None:
    root = tmp_path / "s"
    with DatasetWriter(root, manifest) as writer:
        for i in range(6):
            poses = {"yaw": np.zeros(2)} if i % 2 else {}
            writer.append(f"k{i}", latents(2, seed=i), **poses)
    assert len(list((root / "shards").iterdir())) == 6
    compact(root)
    names = sorted(path.name for path in (root / "shards").iterdir())
    assert len(names) == 2
    compact(root)
    assert sorted(path.name for path in (root / "shards").iterdir()) == names


def test_many_small_shards_are_merged_under_a_small_limit_of_open_files(tmp_path: Path, manifest: Manifest) -> None:
    root = tmp_path / "s"
    with DatasetWriter(root, manifest, shard_bytes=1) as writer:
        for i in range(120):
            writer.append(f"k{i:03d}", latents(1, seed=i))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 30, hard))
    try:
        compact(root)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert verify(root) == verify(root).__class__(1, 120, [])


def test_maintenance_waits_for_no_writer(store: Path, manifest: Manifest) -> None:
    with DatasetWriter(store, manifest), pytest.raises(BusyError, match="being written by another process"):
        compact(store)
    lock = FileLock(store / ".writers.lock")
    assert lock.try_exclusive()
    with pytest.raises(BusyError):
        repair(store)
    lock.release()
    repair(store)


def test_no_store_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no store here"):
        verify(tmp_path)
