"""Odd files among good ones: each is named, costs only itself, and takes nothing away from the store."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from halfstep.data.guarded import Unusable
from halfstep.data.keys import key_to_name
from halfstep.data.sources import SourceConfig
from halfstep.encode import EncodeOptions, encode
from halfstep.encode.runner import missing_keys
from halfstep.errors import InputError
from halfstep.store import DatasetStore
from halfstep.store.index import Index
from tests.data.test_animations import animate
from tests.data.test_pictures import wrong_exif
from tests.support.cli import run_cli
from tests.support.encoding import run


def odd_pictures(folder: Path) -> list[str]:
    """Pictures that cannot be read, and those that only look so. Returns the keys of the former."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    picture.save(folder / "exif.jpg", exif=wrong_exif(6))
    picture.save(folder / "icc.png", icc_profile=bytes(2 << 20))
    texts = PngImagePlugin.PngInfo()
    texts.add_text("workflow", "{}" * (1 << 20), zip=True)
    picture.save(folder / "workflow.png", pnginfo=texts)
    picture.save(Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")))
    picture.save(folder / "caf\ufffdE9.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("no picture")
    (folder / "nowhere.png").symlink_to("gone")
    whole = (folder / "icc.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((8, 8), np.float32)).save(folder / "float.tif")
    Image.fromarray(np.zeros((8, 8), np.int32)).save(folder / "int.tif")
    (folder / os.fsdecode(b"bad\xff.png")).write_bytes(b"no picture")
    return ["bad\ufffdFF.png", "cut.png", "empty.png", "float.tif", "int.tif", "nowhere.png", "text.jpg"]


def test_odd_pictures_among_good_ones(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(20):
        Image.new("RGB", (40, 40), (number, 0, 0)).save(folder / f"{number}.png")
    bad = odd_pictures(folder)
    planned = run(folder, tmp_path / "s", dry_run=True)
    assert [failure.key for failure in planned.failures] == ["nowhere.png"]  # the others open, or nothing is decoded
    first = run_cli("encode", "-i", folder, "-o", tmp_path / "s", "--size", 32, check=1)
    assert f"encoded 25 items, 0 unchanged, 0 removed, {len(bad)} failed" in first.stdout
    assert "1 pipes, sockets or devices are left out: pipe.png" in first.stderr
    assert "Traceback" not in first.stderr
    lines = [json.loads(line) for line in (tmp_path / "s" / "failures.jsonl").read_text().splitlines()]
    assert sorted(line["key"] for line in lines) == bad
    for line in lines:
        assert Path(key_to_name(line["source"])) == folder / key_to_name(line["key"])
        assert line["reason"].startswith(line["source"])
    keys = DatasetStore.open(tmp_path / "s").keys()
    assert len(keys) == 25
    assert {"exif.jpg", "icc.png", "workflow.png", "caf\ufffdE9.png", "caf\ufffdEF\ufffdBF\ufffdBDE9.png"} <= {*keys}
    again = encode([SourceConfig(path=folder)], EncodeOptions(tmp_path / "s"))
    assert (again.encoded, again.skipped, again.removed, again.failed) == (0, 25, 0, len(bad))


def test_a_class_whose_name_is_not_utf_8(tmp_path: Path) -> None:
    folder = tmp_path / "in" / os.fsdecode(b"caf\xe9")
    folder.mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(folder / "a.png")
    assert run(tmp_path / "in", tmp_path / "s", dry_run=True).encoded == 1
    assert run(tmp_path / "in", tmp_path / "s").encoded == 1
    store = DatasetStore.open(tmp_path / "s")
    assert [(key, store.label(key)) for key in store.keys()] == [("caf\ufffdE9/a.png", "caf\ufffdE9")]
    assert run(tmp_path / "in", tmp_path / "s").skipped == 1


def test_odd_latents_among_good_ones(tmp_path: Path) -> None:
    for walk in ("a", "b", "c"):
        (tmp_path / "pt" / walk).mkdir(parents=True)
        for number in range(3):
            torch.save(torch.full((4, 2, 2), float(number)), tmp_path / "pt" / walk / f"{number}.pt")
    torch.save(torch.zeros(3, 9, 9), tmp_path / "pt" / "a" / "0.pt")  # foreign, and the first of all
    torch.save({1: "x", "latent": torch.zeros(4, 2, 2).to_sparse()}, tmp_path / "pt" / "a" / "1.pt")
    data = bytearray((tmp_path / "pt" / "b" / "1.pt").read_bytes())
    data[60:90] = bytes(30)
    (tmp_path / "pt" / "b" / "1.pt").write_bytes(data)
    (tmp_path / "pt" / "c" / "01.pt").write_bytes(b"")
    report = run(tmp_path / "pt", tmp_path / "s", size=None)
    assert [(failure.key, failure.frame) for failure in report.failures] == [
        ("a", 0), ("a", 1), ("b", 1), ("c", None),
    ]  # fmt: skip
    assert (report.items, report.encoded) == (3, 3)
    assert run(tmp_path / "pt", tmp_path / "s", size=None).encoded == 0


def test_a_stored_walk_stays_while_a_half_of_it_is_there(world: Path, tmp_path: Path) -> None:
    run(world, tmp_path / "s")
    (tmp_path / "away").mkdir()
    for number in range(10):
        (world / "walk_000" / f"{number}.jpg").rename(tmp_path / "away" / f"{number}.jpg")
    (world / "walk_001" / "traj_data.pkl").unlink()
    planned = run(world, tmp_path / "s", dry_run=True)
    report = run(world, tmp_path / "s")
    for told in (planned, report):
        assert [failure.key for failure in told.failures] == ["walk_000", "walk_001"]
        assert (told.encoded, told.skipped, told.removed, told.missing) == (0, 10, 0, [])
    assert report.items == 30
    shutil.rmtree(world / "walk_000")
    assert (run(world, tmp_path / "s").removed) == 10  # taken away as a whole


def test_what_a_locked_folder_held_is_not_missing(tmp_path: Path) -> None:
    (tmp_path / "in" / "cat").mkdir(parents=True)
    (tmp_path / "in" / "cats").mkdir()
    for name in ("cat/0.png", "cats/0.png", "1.png"):
        Image.new("RGB", (40, 40)).save(tmp_path / "in" / name)
    run(tmp_path / "in", tmp_path / "s")
    listed = [Unusable("cat", tmp_path / "in" / "cat", "cannot be listed", folder=True)]
    assert missing_keys(EncodeOptions(tmp_path / "s"), listed, Index.read(tmp_path / "s")) == ["1.png", "cats/0.png"]


def test_two_pictures_with_one_key_are_refused(tmp_path: Path) -> None:
    for name in ("one/b/x.png", "two/x.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    sources = [SourceConfig(path=tmp_path / "one", name="a"), SourceConfig(path=tmp_path / "two", name="a/b")]
    for dry_run in (True, False):
        with pytest.raises(InputError, match=r"one/b/x.png and .*two/x.png would both be 'a/b/x.png' in the store"):
            encode(sources, EncodeOptions(tmp_path / "s"), dry_run=dry_run)
    assert not (tmp_path / "s" / "index").exists()


def test_two_pictures_of_one_number_cost_their_walk_alone(world: Path, tmp_path: Path) -> None:
    run(world, tmp_path / "s")
    Image.new("RGB", (40, 40)).save(world / "walk_001" / "3.png")
    report = run(world, tmp_path / "s")
    assert report.failures[0].reason == f"{world}/walk_001: 3.jpg and 3.png are both number 3; remove one"
    assert (report.items, report.failed, report.skipped) == (30, 1, 20)


def test_it_is_said_how_much_of_an_animation_is_left(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    animate(tmp_path / "in" / "a.gif")
    Image.new("RGB", (40, 40)).save(tmp_path / "in" / "b.gif")
    for _ in range(2):  # each time
        result = run_cli("encode", "-i", tmp_path / "in", "-o", tmp_path / "s", "--size", 32)
        assert (
            "1 animations: only the first frame of each is encoded: a.gif (1 of 5); with `kind: videos`"
            in result.stdout
        )
    assert run(tmp_path / "in", tmp_path / "t", dry_run=True).unused == {"a.gif": 4}
    report = run(tmp_path / "in", tmp_path / "v", kind="videos")
    assert (report.sequences, report.items, report.unused) == (1, 5, {})


@pytest.mark.slow
def test_animations_are_clips_for_an_autoencoder_over_time(tmp_path: Path, small_wan: Path) -> None:
    (tmp_path / "in").mkdir()
    animate(tmp_path / "in" / "a.gif")
    Image.new("RGB", (40, 40)).save(tmp_path / "in" / "b.png")
    report = run(tmp_path / "in", tmp_path / "s", autoencoder=str(small_wan), clip_length=5, batch_size=1)
    assert DatasetStore.open(tmp_path / "s").read("a.gif").shape == (1, 16, 2, 4, 4)
    assert [failure.reason for failure in report.failures] == [f"{tmp_path}/in/b.png: 1 frames; one clip has 5"]


def test_debug_shows_the_traceback_of_what_nobody_foresaw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pt" / "t").mkdir(parents=True)
    torch.save(torch.ones(4, 2, 2), tmp_path / "pt" / "t" / "0.pt")
    torch.save(torch.ones(4, 2, 2).to_sparse(), tmp_path / "pt" / "t" / "1.pt")
    for debug in (False, True):
        monkeypatch.setenv("HALFSTEP_DEBUG", "1" if debug else "")
        report = run(tmp_path / "pt", tmp_path / "s", size=None)
        assert (report.items, [failure.frame for failure in report.failures]) == (1, [1])
        assert ("Traceback" in capfd.readouterr().err) == debug
