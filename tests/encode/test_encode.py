"""The encode run: what it stores, what it does when sources change, fail or disappear."""

import json
import pickle
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from halfstep.autoencoders import load_autoencoder
from halfstep.data.base import digest
from halfstep.data.pickles import load_poses
from halfstep.data.pictures import load_fitted
from halfstep.data.sources import Source, SourceConfig
from halfstep.encode import EncodeOptions, encode
from halfstep.encode.job import settle
from halfstep.errors import BusyError, InputError
from halfstep.files import FileLock
from halfstep.spec import PixelSpec
from halfstep.store import DatasetStore, verify
from halfstep.store.writer import read_manifest
from tests.support.encoding import content, run, same
from tests.support.media import write_video
from tests.support.training import Listening


def test_latents_are_what_the_autoencoder_gives(world: Path, tmp_path: Path) -> None:
    report = run(world, tmp_path / "s")
    assert (report.sequences, report.items, report.encoded, report.failed) == (3, 30, 30, 0)
    store = DatasetStore.open(tmp_path / "s")
    codec = load_autoencoder()
    pixels = PixelSpec(32, 32, "4:3")
    for key in store.keys():
        pictures = np.stack([load_fitted(world / key / f"{i}.jpg", pixels) for i in range(10)])
        values = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        expected = codec.scaled(codec.encode(values).mean).numpy()
        np.testing.assert_allclose(store.read(key), expected, rtol=1e-5, atol=1e-5)
        position, yaw = load_poses(world / key / "traj_data.pkl")
        assert np.array_equal(store.read_array(key, "position"), position)
        assert np.array_equal(store.read_array(key, "yaw"), yaw)
        assert store.read_array(key, "frame").tolist() == list(range(10))
    assert verify(tmp_path / "s").ok


@pytest.mark.parametrize("storage", ["fp16", "fp32"])
def test_bytes_are_told_against_the_sources_and_fp32(world: Path, tmp_path: Path, storage: str) -> None:
    """Of the pictures that became latents, not of poses and what else lies there."""
    (world / "notes.txt").write_text("not read")
    sources = sum(path.stat().st_size for path in world.rglob("*.jpg"))
    report = run(world, tmp_path / "s", storage=storage)
    fp32 = 30 * 16 * 4 * 4 * 4
    assert (report.source_bytes, report.fp32_bytes, report.bytes) == (sources, fp32, fp32 // (2 - (storage == "fp32")))
    assert run(world, tmp_path / "s", storage=storage).source_bytes == sources
    planned = encode([SourceConfig(path=world)], EncodeOptions(tmp_path / "s"), dry_run=True)
    assert (planned.source_bytes, planned.fp32_bytes) == (None, 0)


def test_a_source_counts_once_and_what_failed_does_not(toy_world: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(3):
        shutil.copy(toy_world / "walk_000" / f"{number}.jpg", photos)
    (photos / "again.jpg").symlink_to("0.jpg")
    sources = sum((photos / f"{number}.jpg").stat().st_size for number in range(3))
    (photos / "broken.jpg").write_bytes(b"no picture")
    report = run(photos, tmp_path / "s")
    assert (report.items, report.failed, report.source_bytes) == (4, 1, sources)
    write_video(tmp_path / "clip.mp4", 6)
    assert run(tmp_path / "clip.mp4", tmp_path / "v").source_bytes == (tmp_path / "clip.mp4").stat().st_size


def test_sources_that_are_not_all_there_are_not_compared_with(world: Path, tmp_path: Path) -> None:
    run(world, tmp_path / "s")
    assert run(world, tmp_path / "s", limit=10).source_bytes is None
    (world / "walk_001" / "traj_data.pkl").unlink()
    report = run(world, tmp_path / "s")
    assert (report.items, report.failed, report.source_bytes) == (30, 1, None)
    shutil.rmtree(world / "walk_001")
    assert run(world, tmp_path / "s", keep_missing=True).source_bytes is None
    left = sum(path.stat().st_size for path in world.rglob("*.jpg"))
    assert run(world, tmp_path / "s").source_bytes == left


def test_a_rerun_encodes_nothing(world: Path, tmp_path: Path) -> None:
    run(world, tmp_path / "s")
    before = {path: path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.is_file()}
    report = run(world, tmp_path / "s")
    assert (report.encoded, report.skipped, report.removed) == (0, 30, 0)
    assert before == {path: path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.is_file()}


def test_only_what_changed_is_encoded(world: Path, tmp_path: Path) -> None:
    run(world, tmp_path / "s")
    before = content(tmp_path / "s")
    shutil.copy(world / "walk_001" / "0.jpg", world / "walk_000" / "3.jpg")
    (world / "walk_002" / "9.jpg").touch()  # a newer date is no change
    report = run(world, tmp_path / "s")
    assert (report.encoded, report.skipped) == (1, 29)
    after = content(tmp_path / "s")
    changed = [(k, i) for k in before for i in range(10) if not np.array_equal(before[k][i], after[k][i])]
    assert changed == [("walk_000", 3)]
    assert np.array_equal(after["walk_000"][3], before["walk_001"][0])


def test_new_poses_are_stored_without_encoding(world: Path, tmp_path: Path) -> None:
    run(world, tmp_path / "s")
    before = content(tmp_path / "s")
    position, yaw = load_poses(world / "walk_001" / "traj_data.pkl")
    (world / "walk_001" / "traj_data.pkl").write_bytes(pickle.dumps({"position": position + 1, "yaw": yaw}))
    report = run(world, tmp_path / "s")
    assert (report.encoded, report.skipped) == (0, 30)
    assert np.array_equal(DatasetStore.open(tmp_path / "s").read_array("walk_001", "position"), position + 1)
    assert same(content(tmp_path / "s"), before)


def test_other_settings_encode_anew(world: Path, tmp_path: Path) -> None:
    run(world, tmp_path / "s")
    with pytest.raises(
        InputError, match=r"made with other settings \(policy: was 'fp32', is 'fp32,storage=fp16'\); with --limit"
    ):
        run(world, tmp_path / "s", storage="fp16", limit=1)
    assert run(world, tmp_path / "s", storage="fp16").encoded == 30
    assert run(world, tmp_path / "s", storage="fp16").encoded == 0
    assert run(world, tmp_path / "s", storage="fp16", mirror=True).encoded == 30
    assert run(world, tmp_path / "s", storage="fp16", mirror=True, precision="bf16-true").encoded == 30
    assert run(world, tmp_path / "s", precision="auto", storage=None, mirror=True).encoded == 0  # keeps what it has
    again = EncodeOptions(tmp_path / "s", mirror=True)  # what is not said is taken from the store
    assert encode([SourceConfig(path=world)], again).encoded == 0
    with pytest.raises(InputError, match=r"pixels: 32x32 .crop 4:3., not 64x64 .crop 4:3.\); encode into a new folder"):
        run(world, tmp_path / "s", size=(64, 64))
    assert verify(tmp_path / "s").ok


def test_what_is_gone_is_dropped_and_told(world: Path, tmp_path: Path) -> None:
    run(world, tmp_path / "s")
    shutil.rmtree(world / "walk_001")
    kept = run(world, tmp_path / "s", keep_missing=True)
    assert (kept.removed, kept.missing, kept.items) == (0, ["walk_001"], 30)
    report = run(world, tmp_path / "s")
    assert (report.removed, report.missing, report.items) == (10, ["walk_001"], 20)
    assert DatasetStore.open(tmp_path / "s").keys() == ["walk_000", "walk_002"]


def test_a_run_never_drops_everything(world: Path, toy_world: Path, tmp_path: Path) -> None:
    run(world, tmp_path / "s")
    (tmp_path / "other").mkdir()
    shutil.copytree(toy_world / "walk_000", tmp_path / "other" / "another")
    with pytest.raises(
        InputError, match=r"the sources have none of them; if only their names changed, .* --keep-missing adds"
    ):
        run(tmp_path / "other", tmp_path / "s")
    assert run(tmp_path / "other", tmp_path / "s", keep_missing=True).items == 40


def test_a_limit_takes_the_first_and_drops_nothing(world: Path, tmp_path: Path) -> None:
    assert run(world, tmp_path / "s", limit=15).items == 20
    assert run(world, tmp_path / "s").items == 30
    assert run(world, tmp_path / "s", limit=1).items == 30


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(world: Path, tmp_path: Path) -> None:
    options = EncodeOptions(tmp_path / "s", size=(32, 32), batch_size=4)
    report = encode([SourceConfig(path=world)], options, dry_run=True)
    assert (report.encoded, report.items) == (30, 0)
    assert not (tmp_path / "s").exists()
    encode([SourceConfig(path=world)], options)
    shutil.copy(world / "walk_001" / "0.jpg", world / "walk_000" / "3.jpg")
    shutil.rmtree(world / "walk_002")
    before = {path: path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.is_file()}
    report = encode([SourceConfig(path=world)], options, dry_run=True)
    assert (report.encoded, report.skipped, report.removed) == (1, 19, 10)
    assert before == {path: path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.is_file()}


@pytest.mark.parametrize("storage", ["fp16", "bf16"])
def test_half_storage_is_half_the_bytes_and_loses_no_quality(world: Path, tmp_path: Path, storage: str) -> None:
    full, half = run(world, tmp_path / "full"), run(world, tmp_path / "half", storage=storage)
    assert half.bytes * 2 == full.bytes
    codec = load_autoencoder()

    def psnr(root: Path) -> float:
        errors = []
        store = DatasetStore.open(root)
        for key in store.keys():
            decoded = codec.decode(codec.unscaled(torch.from_numpy(store.read(key)))).clamp(-1, 1)
            pictures = np.stack([load_fitted(world / key / f"{i}.jpg", PixelSpec(32, 32, "4:3")) for i in range(10)])
            original = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
            errors.append(float((decoded - original).square().mean()) / 4)
        return -10 * np.log10(np.mean(errors))

    assert abs(psnr(tmp_path / "full") - psnr(tmp_path / "half")) < 0.05


def test_mirrored_latents_are_those_of_the_flipped_picture(world: Path, tmp_path: Path) -> None:
    flipped = tmp_path / "flipped"
    for walk in world.iterdir():
        (flipped / walk.name).mkdir(parents=True)
        shutil.copy(walk / "traj_data.pkl", flipped / walk.name)
        for path in walk.glob("*.jpg"):
            picture = Image.fromarray(load_fitted(path, PixelSpec(32, 32, "4:3")))
            picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).resize((40, 30)).save(
                flipped / walk.name / f"{path.stem}.png"
            )
            picture.resize((40, 30)).save(walk / f"{path.stem}.png")
            path.unlink()
    run(world, tmp_path / "s", mirror=True, batch_size=5)
    run(flipped, tmp_path / "f")
    store, other = DatasetStore.open(tmp_path / "s"), DatasetStore.open(tmp_path / "f")
    for key in store.keys():
        assert np.array_equal(store.read(key, name="latents_mirror", raw=True), other.read(key, raw=True))


def test_moments_keep_mean_and_variance(world: Path, tmp_path: Path, small_vae: Path) -> None:
    run(world, tmp_path / "m", autoencoder=str(small_vae), moments=True, limit=1)
    store = DatasetStore.open(tmp_path / "m")
    pictures = np.stack([load_fitted(world / "walk_000" / f"{i}.jpg", PixelSpec(32, 32, "4:3")) for i in range(10)])
    values = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    posterior = load_autoencoder(str(small_vae)).encode(values)
    np.testing.assert_allclose(store.read("walk_000", raw=True), posterior.mean, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(store.read_array("walk_000", "logvar"), posterior.logvar, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="dct8 has no variance"):
        run(world, tmp_path / "d", moments=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16-true"])
@pytest.mark.parametrize("autoencoder", ["dct8", "small_vae"])
def test_the_result_does_not_depend_on_threads_or_neighbors(
    world: Path, tmp_path: Path, autoencoder: str, precision: str, request: pytest.FixtureRequest, monkeypatch
) -> None:
    """Other numbers of decode threads, lanes and sequences beside one: the same bits."""
    name = autoencoder if autoencoder == "dct8" else str(request.getfixturevalue(autoencoder))
    options = {"autoencoder": name, "precision": precision}
    run(world, tmp_path / "a", workers=1, **options)
    monkeypatch.setattr("halfstep.encode.encoder.lane_count", lambda device, shared: 3)
    run(world, tmp_path / "b", workers=5, **options)
    whole = content(tmp_path / "a")
    assert same(content(tmp_path / "b"), whole)
    (tmp_path / "alone").mkdir()
    shutil.copytree(world / "walk_001", tmp_path / "alone" / "walk_001")
    shutil.copytree(world / "walk_000", tmp_path / "alone" / "zzz")
    run(tmp_path / "alone", tmp_path / "c", **options)
    alone = content(tmp_path / "c")
    assert np.array_equal(alone["walk_001"], whole["walk_001"])
    assert np.array_equal(alone["zzz"], whole["walk_000"])


def test_stores_made_before_there_was_a_choice_of_last_clip_stay(toy_world: Path, tmp_path: Path) -> None:
    run(toy_world, tmp_path / "s")
    manifest = read_manifest(tmp_path / "s")
    assert "last_clip" not in manifest.recipe  # as it was before; "drop" is what those stores did
    notes = Listening()
    options = EncodeOptions(tmp_path / "s", precision="fp32", storage="fp32", size=(32, 32), batch_size=4)
    report = encode([SourceConfig(path=toy_world)], options, progress=notes)
    assert (report.encoded, report.skipped, notes.notes) == (0, 30, [])
    job, _ = settle(options, [Source.find(SourceConfig(path=toy_world))], None, "cpu", 1)
    spec = replace(job.spec, autoencoder="", revision="")
    old = digest(json.dumps([asdict(spec), str(job.policy), job.tiled, job.moments, job.mirror]).encode())
    assert job.recipe == old
    assert len({old, *(replace(job, last_clip=last).recipe for last in ("drop", "pad", "overlap"))}) == 3


def test_latents_of_another_tool_are_repacked(world: Path, tmp_path: Path) -> None:
    from halfstep.data.export import export

    run(world, tmp_path / "s")
    export(DatasetStore.open(tmp_path / "s"), "pt-tree", tmp_path / "pt")
    torch.save(torch.full((16, 4, 4), torch.inf), tmp_path / "pt" / "walk_002" / "9.pt")
    report = run(tmp_path / "pt", tmp_path / "again", size=None)
    assert (report.items, report.failed) == (29, 1)
    assert report.source_bytes == sum(path.stat().st_size for path in (tmp_path / "pt").rglob("*.pt"))
    ours, theirs = DatasetStore.open(tmp_path / "again"), DatasetStore.open(tmp_path / "s")
    assert np.array_equal(ours.read("walk_000"), theirs.read("walk_000"))
    assert np.array_equal(ours.read_array("walk_001", "position"), theirs.read_array("walk_001", "position"))
    with pytest.raises(InputError, match="repacked as they are, without --mirror and --size"):
        run(tmp_path / "pt", tmp_path / "m", mirror=True)


def test_options_that_do_not_fit_are_named(world: Path, tmp_path: Path, small_wan: Path) -> None:
    for options, named in (
        ({"size": (30, 32)}, "--size: got 30x32; dct8 needs multiples of 8"),
        ({"precision": "fp8"}, "precision: got 'fp8'"),
        ({"storage": "fp8"}, "precision.storage: got 'fp8'"),
        ({"clip_length": 5}, "--clip-length: dct8 encodes single frames"),
        ({"last_clip": "pad"}, "--last-clip: dct8 encodes single frames"),
        ({"last_clip": "mirror"}, "--last-clip: got 'mirror'; expected drop, pad, overlap"),
        ({"autoencoder": str(small_wan)}, "compresses time, but each frame of a walk has its own pose"),
        ({"device": "cuda:7"}, "device: got 'cuda:7'"),
    ):
        with pytest.raises(InputError, match=named):
            run(world, tmp_path / "s", **options)
        assert not (tmp_path / "s").exists()
    (tmp_path / "pictures").mkdir()
    shutil.copy(world / "walk_000" / "0.jpg", tmp_path / "pictures")
    with pytest.raises(InputError, match="cropped differently"):
        run([world, tmp_path / "pictures"], tmp_path / "s")


def test_links_are_followed_and_hidden_files_are_not(toy_world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "linked").symlink_to(toy_world / "walk_000")
    (folder / "loop").symlink_to(folder)
    shutil.copy(toy_world / "walk_001" / "0.jpg", folder / "own.jpg")
    shutil.copy(toy_world / "walk_001" / "0.jpg", folder / "._own.jpg")
    with pytest.raises(InputError, match="holds 1 pictures and 1 walks"):
        run(folder, tmp_path / "s")
    (folder / "own.jpg").unlink()
    assert run(folder, tmp_path / "s").items == 10
    assert DatasetStore.open(tmp_path / "s").keys() == ["linked"]


def test_a_single_walk_is_named_after_its_folder(toy_world: Path, tmp_path: Path) -> None:
    assert run(toy_world / "walk_001", tmp_path / "s").items == 10
    assert DatasetStore.open(tmp_path / "s").keys() == ["walk_001"]


def test_a_strip_of_a_picture_does_not_take_all_memory(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    Image.new("RGB", (1, 60000), "red").save(tmp_path / "p" / "strip.png")
    assert run(tmp_path / "p", tmp_path / "s", size=(256, 256)).items == 1


def test_poses_that_disappear_disappear_from_the_store(world: Path, tmp_path: Path) -> None:
    from halfstep.data.export import export

    run(world, tmp_path / "s")
    export(DatasetStore.open(tmp_path / "s"), "pt-tree", tmp_path / "pt")
    run(tmp_path / "pt", tmp_path / "again", size=None)
    (tmp_path / "pt" / "walk_000" / "traj_data.pkl").unlink()
    shutil.copy(tmp_path / "pt" / "walk_001" / "3.pt", tmp_path / "pt" / "walk_000" / "10.pt")
    report = run(tmp_path / "pt", tmp_path / "again", size=None)
    assert (report.encoded, report.items, report.failed) == (1, 31, 0)
    store = DatasetStore.open(tmp_path / "again")
    assert store.arrays("walk_000") == {"frame", "latents"}
    assert "yaw" in store.arrays("walk_001")
    small = torch.zeros(16, 2, 2)
    torch.save(small, tmp_path / "pt" / "walk_000" / "11.pt")
    report = run(tmp_path / "pt", tmp_path / "again", size=None)
    assert "latent of shape [16, 2, 2]; the others have [16, 4, 4]" in report.failures[0].reason


def test_two_runs_do_not_share_a_store(world: Path, tmp_path: Path) -> None:
    run(world, tmp_path / "s")
    before = content(tmp_path / "s")
    lock = FileLock(tmp_path / "s" / ".encode.lock")
    assert lock.try_exclusive()
    with pytest.raises(BusyError, match="is being written by another process"):
        run(world, tmp_path / "s")
    lock.release()
    assert run(world, tmp_path / "s").skipped == 30
    assert same(content(tmp_path / "s"), before)


def test_several_sources_in_one_store(world: Path, toy_world: Path, tmp_path: Path) -> None:
    second = shutil.copytree(toy_world, tmp_path / "second")
    assert run([world, second], tmp_path / "both").sequences == 6
    assert "second/walk_002" in DatasetStore.open(tmp_path / "both").keys()


@pytest.mark.slow
def test_the_real_clip_and_photographs_with_taef2(tmp_path: Path, outside_data: Path) -> None:
    from skimage import data

    (tmp_path / "photos").mkdir()
    for name in ("astronaut", "coffee", "chelsea"):
        Image.fromarray(getattr(data, name)()).save(tmp_path / "photos" / f"{name}.png")
    autoencoder = str(outside_data / "autoencoders")
    report = run(tmp_path / "photos", tmp_path / "p", autoencoder=autoencoder, size=(128, 128), storage="fp16")
    assert (report.items, report.failed) == (3, 0)
    again = encode([SourceConfig(path=tmp_path / "photos")], EncodeOptions(tmp_path / "p"))
    assert (again.encoded, again.skipped) == (0, 3)  # the store knows where its autoencoder is
    store = DatasetStore.open(tmp_path / "p")
    codec = load_autoencoder(autoencoder)
    for key in store.keys():
        decoded = codec.decode(codec.unscaled(torch.from_numpy(store.read(key)))).clamp(-1, 1)
        original = load_fitted(tmp_path / "photos" / key, PixelSpec(128, 128))
        error = (
            decoded - (torch.from_numpy(np.array(original)).permute(2, 0, 1)[None] / 127.5 - 1)
        ).square().mean() / 4
        assert -10 * torch.log10(error) > 24
    clip = SourceConfig(path=outside_data / "video" / "wan_clip.mp4", stride=27)
    options = EncodeOptions(tmp_path / "v", autoencoder=autoencoder, size=(208, 120), batch_size=1)
    assert encode([clip], replace(options, precision="fp32")).items == 3
