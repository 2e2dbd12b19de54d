"""What cannot be read or encoded costs itself alone, and heals when it is mended."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from halfstep.data.pickles import load_poses
from halfstep.encode.counts import StoppedError
from halfstep.store import DatasetStore, verify
from tests.support.encoding import content, run, same
from tests.support.networks import tiny_autoencoder


def test_a_bad_picture_costs_only_itself(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    (folder / "cat").mkdir(parents=True)
    for i in range(6):
        shutil.copy(world / "walk_000" / f"{i}.jpg", folder / "cat" / f"{i}.jpg")
    data = (folder / "cat" / "1.jpg").read_bytes()
    (folder / "cat" / "1.jpg").write_bytes(data[: len(data) // 2])
    (folder / "cat" / "2.jpg").write_bytes(b"")
    (folder / "cat" / "3.jpg").write_bytes(b"not a picture")
    report = run(folder, tmp_path / "s")
    assert (report.items, report.encoded, report.failed) == (3, 3, 3)
    lines = [json.loads(line) for line in (tmp_path / "s" / "failures.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["cat/1.jpg", "cat/2.jpg", "cat/3.jpg"]
    assert all(line["source"].endswith(line["key"]) and line["reason"] for line in lines)
    assert DatasetStore.open(tmp_path / "s").label("cat/0.jpg") == "cat"
    again = run(folder, tmp_path / "s")
    assert (again.encoded, again.failed) == (0, 3)
    (folder / "cat" / "1.jpg").write_bytes(data)
    (folder / "cat" / "2.jpg").unlink()
    (folder / "cat" / "3.jpg").unlink()
    healed = run(folder, tmp_path / "s")
    assert (healed.items, healed.encoded, healed.failed) == (4, 1, 0)
    assert not (tmp_path / "s" / "failures.jsonl").exists()


def test_a_sequence_that_fails_now_keeps_its_older_version(world: Path, tmp_path: Path) -> None:
    run(world, tmp_path / "s")
    before = content(tmp_path / "s")
    (world / "walk_001" / "traj_data.pkl").write_bytes(b"broken")
    report = run(world, tmp_path / "s")
    assert (report.failed, report.removed) == (1, 0)
    assert same(content(tmp_path / "s"), before)


def test_a_bad_frame_leaves_a_gap_that_heals(world: Path, tmp_path: Path) -> None:
    good = (world / "walk_000" / "4.jpg").read_bytes()
    (world / "walk_000" / "4.jpg").write_bytes(good[:300])
    report = run(world, tmp_path / "s")
    assert (report.items, report.failed, report.failures[0].frame) == (29, 1, 4)
    store = DatasetStore.open(tmp_path / "s")
    numbers = [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert store.read_array("walk_000", "frame").tolist() == numbers
    position, _ = load_poses(world / "walk_000" / "traj_data.pkl")
    assert np.array_equal(store.read_array("walk_000", "position"), position[numbers])
    shards = sorted(path.name for path in (tmp_path / "s" / "shards").iterdir())
    again = run(world, tmp_path / "s")
    assert (again.encoded, again.failed) == (0, 1)
    assert sorted(path.name for path in (tmp_path / "s" / "shards").iterdir()) == shards  # nothing was rewritten
    (world / "walk_000" / "4.jpg").write_bytes(good)
    healed = run(world, tmp_path / "s")
    assert (healed.encoded, healed.skipped, healed.failed, healed.items) == (1, 29, 0, 30)
    run(world, tmp_path / "whole")
    assert same(content(tmp_path / "s"), content(tmp_path / "whole"))


def test_a_frame_that_breaks_keeps_its_older_latent(world: Path, tmp_path: Path) -> None:
    run(world, tmp_path / "s")
    before = content(tmp_path / "s")
    good = (world / "walk_000" / "4.jpg").read_bytes()
    (world / "walk_000" / "4.jpg").write_bytes(good[:300])
    for _ in range(2):  # told every time
        report = run(world, tmp_path / "s")
        assert (report.encoded, report.failed, report.items) == (0, 1, 30)
        assert same(content(tmp_path / "s"), before)
    shutil.copy(world / "walk_001" / "0.jpg", world / "walk_000" / "4.jpg")
    report = run(world, tmp_path / "s")
    assert (report.encoded, report.failed) == (1, 0)
    assert np.array_equal(content(tmp_path / "s")["walk_000"][4], before["walk_001"][0])


def test_strict_stops_and_keeps_what_was_complete(world: Path, tmp_path: Path) -> None:
    (world / "walk_001" / "4.jpg").write_bytes(b"")
    with pytest.raises(StoppedError, match=r"walk_001/4.jpg: an empty file; stopped because of --strict"):
        run(world, tmp_path / "s", strict=True, batch_size=2)
    assert "4.jpg: an empty file" in (tmp_path / "s" / "failures.jsonl").read_text()
    store = DatasetStore.open(tmp_path / "s")
    assert store.keys() == ["walk_000"]
    assert verify(tmp_path / "s").ok
    assert run(world, tmp_path / "s").items == 29


def test_latents_beyond_the_storage_type_are_quarantined(world: Path, tmp_path: Path) -> None:
    model = tiny_autoencoder([8])
    with torch.no_grad():
        model.quant_conv.weight.mul_(1e6)
    model.save_pretrained(tmp_path / "hot")
    options = {"autoencoder": str(tmp_path / "hot"), "limit": 1}
    report = run(world, tmp_path / "s", storage="fp16", **options)
    assert report.items == 0
    assert report.failed == 10
    assert "use --storage bf16 or fp32" in report.failures[0].reason
    assert DatasetStore.open(tmp_path / "s").manifest.numerics["refused"] == 10
    assert run(world, tmp_path / "s", storage="bf16", **options).failed == 0


def test_overflow_in_half_precision_is_repeated_in_fp32_and_counted(world: Path, tmp_path: Path) -> None:
    model = tiny_autoencoder([8])
    with torch.no_grad():
        model.encoder.conv_out.weight.mul_(1e6)
        model.encoder.conv_out.bias.mul_(1e6)
        model.quant_conv.weight.mul_(1e-7)
    model.save_pretrained(tmp_path / "hot")
    options = {"autoencoder": str(tmp_path / "hot"), "limit": 1, "storage": "fp16"}
    report = run(world, tmp_path / "half", precision="16-true", **options)
    run(world, tmp_path / "exact", precision="fp32", **options)
    assert (report.failed, report.retried_in_fp32) == (0, 10)
    assert DatasetStore.open(tmp_path / "half").manifest.numerics["retried_in_fp32"] == 10
    assert same(content(tmp_path / "half"), content(tmp_path / "exact"))
