"""Training datasets: parity with the reference's numbers, seeds, workers, stores against trees against pixels."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from halfstep.data.base import Array
from halfstep.data.export import export
from halfstep.data.frames import StoreFrames, open_frames
from halfstep.data.latents import (
    ClipLatents,
    ImageLatents,
    NavigationConfig,
    NavigationDatasetConfig,
    NavigationLatents,
    SeededOrder,
    navigation_datasets,
)
from halfstep.data.navigation import goal_actions, relative_time, sample_index
from halfstep.data.pictures import load_fitted
from halfstep.data.sources import SourceConfig
from halfstep.encode import EncodeOptions, encode
from halfstep.errors import InputError
from halfstep.spec import LatentSpec, PixelSpec
from halfstep.store import DatasetStore, DatasetWriter, Manifest
from tests.support.arrays import GOLDEN, latents
from tests.support.media import overwrite, packets, write_video


def test_index_and_actions_equal_the_reference() -> None:
    golden = np.load(GOLDEN / "nwm_dataset.npz")
    facts = json.loads(str(golden["meta"]))
    positions = [golden[f"{name}.position"] for name in facts["names"]]
    yaws = [golden[f"{name}.yaw"] for name in facts["names"]]
    index = sample_index(
        [len(p) for p in positions],
        facts["context_size"],
        facts["len_traj_pred"],
        facts["min_dist_cat"],
        facts["max_dist_cat"],
    )
    assert index.dtype == np.int64
    assert np.array_equal(index, golden["index"])
    for row, pick in enumerate(golden["picks"]):
        walk, current = index[pick, :2].tolist()
        times = golden["goal_times"][row]
        actions = goal_actions(positions[walk], yaws[walk], current, times, 0.38)
        np.testing.assert_allclose(actions, golden["goal_actions"][row], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(relative_time(current, times), golden["rel_t"][row], rtol=0, atol=0)


@given(
    st.lists(st.integers(0, 40), max_size=4),
    st.integers(1, 5),
    st.integers(0, 10),
    st.integers(-8, 0),
    st.integers(0, 8),
)
def test_the_index_is_its_definition(lengths, context, horizon, smallest, largest) -> None:
    expected = [
        (walk, t, max(smallest, -t), min(largest, n - t - 1))
        for walk, n in enumerate(lengths)
        for t in range(context - 1, n - horizon)
    ]
    got = sample_index(lengths, context, horizon, smallest, largest)
    assert got.shape == (len(expected), 4)
    assert list(map(tuple, got.tolist())) == expected


def test_actions_turn_with_the_pose() -> None:
    """One waypoint ahead is x = 1 whatever the heading, which (2 (x + 2.5) / 7.5 - 1) maps to -1/15; left is +y."""
    for heading in np.linspace(-3, 3, 7):
        ahead = np.array([[5.0, 5.0], [5 + 0.25 * np.cos(heading), 5 + 0.25 * np.sin(heading)]])
        actions = goal_actions(ahead, np.array([heading, heading + 4]), 0, [1, 0], 0.25)
        np.testing.assert_allclose(actions[0, :2], [-1 / 15, 0], atol=1e-12)
        np.testing.assert_allclose(actions[:, 2], [4 - 2 * np.pi, 0], atol=1e-12)


@pytest.fixture(scope="module")
def encoded(toy_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("nav") / "store"
    encode([SourceConfig(path=toy_world)], EncodeOptions(output, storage="fp32", precision="fp32", size=(32, 32)))
    return output


SAMPLING = {"spacing": 0.25, "context_size": 2, "len_traj_pred": 3, "min_dist_cat": -4, "max_dist_cat": 4}


def test_navigation_items_from_store_tree_and_pixels_agree(encoded: Path, toy_world: Path, tmp_path: Path) -> None:
    store = DatasetStore.open(encoded)
    export(store, "pt-tree", tmp_path / "pt")
    over_store = NavigationLatents(StoreFrames(store), goals_per_obs=3, seed=5, **SAMPLING)
    over_tree = NavigationLatents(open_frames(tmp_path / "pt"), goals_per_obs=3, seed=5, **SAMPLING)
    over_pixels = NavigationLatents(
        open_frames(toy_world, PixelSpec(32, 32, "4:3")), goals_per_obs=3, seed=5, **SAMPLING
    )
    assert len(over_store) == len(over_tree) == len(over_pixels) == 3 * (10 - 3 - 1)
    for index in (0, 7, 17):
        frames, actions, rel_t = over_store[index]
        assert frames.shape == (2 + 3, 16, 4, 4)
        assert (actions.shape, rel_t.shape) == ((3, 3), (3,))
        for a, b in zip(over_tree[index], (frames, actions, rel_t), strict=True):
            assert torch.equal(a, b)
        pixels, pixel_actions, _ = over_pixels[index]
        assert torch.equal(pixel_actions, actions)
        assert pixels.shape == (5, 3, 32, 32)
        assert pixels.abs().max() <= 1


def test_items_are_what_the_definition_says(encoded: Path, toy_world: Path) -> None:
    store = DatasetStore.open(encoded)
    dataset = NavigationLatents(StoreFrames(store), goals_per_obs=8, seed=1, **SAMPLING)
    run, current, smallest, largest = dataset.index[10].tolist()
    key = store.keys()[run]
    frames, actions, rel_t = dataset[10]
    goals = (rel_t.double() * 128).round().long() + current
    assert ((goals >= current + smallest) & (goals <= current + largest)).all()
    expected = [store.read(key, t, t + 1)[0] for t in (current - 1, current, *goals.tolist())]
    assert torch.equal(frames, torch.from_numpy(np.stack(expected)))
    position, yaw = store.read_array(key, "position"), store.read_array(key, "yaw")
    np.testing.assert_allclose(
        actions, goal_actions(position, yaw, current, goals.tolist(), 0.25), rtol=1e-6, atol=1e-6
    )


@pytest.mark.slow
def test_items_depend_on_seed_epoch_and_index_alone(encoded: Path) -> None:
    def items(seed: int, epoch: int, workers: int = 0) -> list[torch.Tensor]:
        dataset = NavigationLatents(open_frames(encoded), goals_per_obs=2, seed=seed, **SAMPLING)
        dataset.set_epoch(epoch)
        loader = DataLoader(
            dataset, batch_size=6, num_workers=workers, multiprocessing_context="spawn" if workers else None
        )
        return [torch.cat([b.flatten() for b in batch]) for batch in loader]

    first = items(0, 0)
    assert all(torch.equal(a, b) for a, b in zip(items(0, 0, workers=2), first, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(items(0, 1), first, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(items(1, 0), first, strict=True))


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 4), st.integers(0, 3), st.integers(0, 3))
def test_an_order_resumes_as_an_offset(length: int, start: int, size: int, seed: int, epoch: int) -> None:
    whole = list(SeededOrder(length, seed=seed, epoch=epoch))
    assert sorted(whole) == list(range(length))
    parts = [SeededOrder(length, seed=seed, epoch=epoch, start=start, rank=r, size=size) for r in range(size)]
    assert [len(part) for part in parts] == [len(list(part)) for part in parts]
    rest = [list(part) for part in parts]
    together = [rest[i % size][i // size] for i in range(sum(map(len, rest)))]
    assert together == whole[start:]


def _store(tmp_path: Path, sequences: dict[str, tuple[Array, str | None]], **arrays: Array) -> DatasetStore:
    with DatasetWriter(tmp_path / "s", Manifest(LatentSpec("t", 2, 8, scale=(0.5,)), "fp32")) as writer:
        for key, (values, label) in sequences.items():
            numbers = np.arange(len(values), dtype=np.int32)
            writer.append(key, values, label=label, frame=numbers, **arrays)
    return DatasetStore.open(tmp_path / "s")


def test_images_with_labels(tmp_path: Path) -> None:
    store = _store(tmp_path, {f"{label}/{i}": (latents(1, seed=i), label) for i, label in enumerate("cab")})
    dataset = ImageLatents(store)
    assert dataset.classes == ["a", "b", "c"]
    for index, key in enumerate(["a/1", "b/2", "c/0"]):
        latent, label = dataset[index]
        assert label == index
        assert np.array_equal(latent, store.read(key)[0])
    with pytest.raises(IndexError):
        dataset[3]


def test_images_are_mirrored_and_drawn_anew(tmp_path: Path) -> None:
    values = latents(1)
    logvar = np.full_like(values, np.log(0.04))
    store = _store(
        tmp_path,
        {f"k{i:03d}": (values, None) for i in range(400)},
        latents_mirror=values[..., ::-1] + 100,
        logvar=logvar,
        logvar_mirror=logvar,
    )
    dataset = pickle.loads(pickle.dumps(ImageLatents(store, seed=3)))
    items = np.stack([dataset[i][0].numpy() for i in range(len(dataset))])
    flipped = items.mean(axis=(1, 2, 3)) > 25
    assert 150 < flipped.sum() < 250
    plain = items[~flipped]
    # mean +- std of the posterior, scaled by 0.5: 0.1; the standard error over 200 x 24 draws is 0.0014.
    np.testing.assert_allclose((plain - values * 0.5).std(), 0.1, atol=0.005)
    np.testing.assert_allclose((plain - values * 0.5).mean(), 0, atol=0.005)
    assert np.array_equal(dataset[0][0], ImageLatents(store, seed=3)[0][0])


def test_clips_never_span_a_missing_frame(tmp_path: Path) -> None:
    values = latents(20)
    values[:, 0, 0, 0] = np.arange(20)
    with DatasetWriter(tmp_path / "s", Manifest(LatentSpec("t", 2, 8), "fp32")) as writer:
        numbers = np.r_[0:8, 10:22].astype(np.int32)
        writer.append("gap", values, label="x", frame=numbers)
        writer.append("whole", values[:12], label="y", frame=np.arange(12, dtype=np.int32))
        writer.append("short", values[:3], label="z", frame=np.arange(3, dtype=np.int32))
    with pytest.warns(UserWarning, match="1 of 3 sequences do not have 7 consecutive frames .* 'short' with 3"):
        dataset = ClipLatents(tmp_path / "s", 4, stride=2, seed=0)
    assert len(dataset) == 2
    starts = set()
    for epoch in range(200):
        dataset.set_epoch(epoch)
        clip, label = dataset[0]
        assert (clip.shape, label) == ((2, 4, 3, 4), 0)
        places = clip[0, :, 0, 0].int().tolist()
        shown = numbers[places]
        assert (np.diff(shown) == 2).all()
        starts.add(places[0])
    assert starts == {0, 1, *range(8, 14)}
    assert dataset[1][0].shape == (2, 4, 3, 4)
    with pytest.raises(InputError, match=r"no sequence has 41 consecutive frames.*the longest is 'gap' with 12"):
        ClipLatents(tmp_path / "s", 21, stride=2)


def test_navigation_treats_a_gap_as_an_end(tmp_path: Path) -> None:
    numbers = np.r_[0:6, 7:15].astype(np.int32)
    values = latents(14)
    values[:, 0, 0, 0] = numbers
    poses = {"position": np.c_[numbers, numbers].astype(np.float64), "yaw": np.zeros(14)}
    with DatasetWriter(tmp_path / "s", Manifest(LatentSpec("t", 2, 8), "fp32")) as writer:
        writer.append("walk", values, frame=numbers, **poses)
    dataset = NavigationLatents(open_frames(tmp_path / "s"), goals_per_obs=4, **SAMPLING)
    assert len(dataset) == (6 - 3 - 1) + (8 - 3 - 1)
    for index in range(len(dataset)):
        frames, _, rel_t = dataset[index]
        shown = frames[:, 0, 0, 0]
        assert shown[1] - shown[0] == 1
        np.testing.assert_allclose(shown[2:] - shown[1], rel_t * 128)


def test_the_published_config_is_read(encoded: Path, toy_world: Path, tmp_path: Path) -> None:
    (tmp_path / "split").mkdir()
    (tmp_path / "split" / "traj_names.txt").write_text("walk_002\nwalk_000\n")
    config = tmp_path / "nwm.yaml"
    config.write_text(f"""
run_name: nwm_cdit_b
results_dir: logs
batch_size: 12
num_workers: 4
model: CDiT-B/2
lr: 6e-5
normalize: true
grad_clip_val: 10.0
context_size: 2
len_traj_pred: 3
distance: {{min_dist_cat: -4, max_dist_cat: 4}}
image_size: 32
datasets:
  recon: {{latent_folder: {encoded}, data_folder: {toy_world}, train: {tmp_path}/split, goals_per_obs: 2}}
  sacson: {{latent_folder: {tmp_path}/not-encoded-yet, data_folder: {toy_world}}}
""")
    datasets = navigation_datasets(NavigationConfig.load(config))
    assert [run[0] for run in datasets["recon"].runs] == ["walk_002", "walk_000"]
    assert datasets["recon"][0][0].shape == (4, 16, 4, 4)
    assert datasets["sacson"][0][0].shape == (3, 3, 32, 32)  # pixels until there are latents
    assert datasets["sacson"].spacing == 0.255


def test_variance_gives_fresh_samples_in_every_dataset(tmp_path: Path) -> None:
    values = np.zeros((12, 2, 3, 4), np.float32)
    numbers, poses = np.arange(12, dtype=np.int32), {"position": np.zeros((12, 2)), "yaw": np.zeros(12)}
    with DatasetWriter(tmp_path / "s", Manifest(LatentSpec("t", 2, 8, scale=(0.5,)), "fp32")) as writer:
        writer.append("walk", values, frame=numbers, logvar=values, **poses)
    (tmp_path / "pt" / "walk").mkdir(parents=True)
    for i in range(12):
        torch.save(
            {"mean": torch.zeros(2, 3, 4), "std": torch.full((2, 3, 4), 0.5)}, tmp_path / "pt" / "walk" / f"{i}.pt"
        )
    (tmp_path / "pt" / "walk" / "traj_data.pkl").write_bytes(pickle.dumps(poses))
    for folder in ("s", "pt"):
        frames = open_frames(tmp_path / folder)
        items = [NavigationLatents(frames, goals_per_obs=4, seed=s, **SAMPLING)[0][0] for s in range(40)]
        np.testing.assert_allclose(torch.stack(items).std(), 0.5, rtol=0.05)
        np.testing.assert_allclose(
            torch.stack([ClipLatents(frames, 6, seed=s)[0][0] for s in range(40)]).std(), 0.5, rtol=0.05
        )
        np.testing.assert_allclose(
            torch.stack([ImageLatents(frames, seed=s)[3][0] for s in range(200)]).std(), 0.5, rtol=0.05
        )


def test_one_store_of_several_datasets(toy_world: Path, tmp_path: Path) -> None:
    second = shutil.copytree(toy_world, tmp_path / "second")
    sources = [SourceConfig(path=toy_world, name="recon"), SourceConfig(path=second, name="sacson")]
    encode(sources, EncodeOptions(tmp_path / "latents", size=(32, 32)))
    (tmp_path / "traj_names.txt").write_text("walk_001\nwalk_999\n")
    config = tmp_path / "nwm.yaml"
    config.write_text(f"""
context_size: 2
len_traj_pred: 3
distance: {{min_dist_cat: -4, max_dist_cat: 4}}
datasets:
  recon: {{latent_folder: {tmp_path}/latents/recon, data_folder: {toy_world}, train: {tmp_path}}}
  sacson: {{latent_folder: {tmp_path}/latents/sacson}}
""")
    with pytest.warns(UserWarning, match="1 of 2 named ones are not there, 'walk_999' among them"):
        datasets = navigation_datasets(NavigationConfig.load(config))
    assert [run[0] for run in datasets["recon"].runs] == ["walk_001"]
    assert len(datasets["sacson"].runs) == 3
    store = DatasetStore.open(tmp_path / "latents")
    assert torch.equal(datasets["recon"][0][0][:2], torch.from_numpy(store.read("recon/walk_001", 0, 2)))


def test_pictures_and_videos_as_pixels(toy_world: Path, tmp_path: Path) -> None:
    for label in ("b", "a"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        shutil.copy(toy_world / "walk_000" / "0.jpg", tmp_path / "photos" / label / "p.jpg")
    pictures = ImageLatents(open_frames(tmp_path / "photos", PixelSpec(16, 16)))
    assert pictures.classes == ["a", "b"]
    assert [pictures[i][1] for i in range(2)] == [0, 1]
    expected = load_fitted(toy_world / "walk_000" / "0.jpg", PixelSpec(16, 16)).transpose(2, 0, 1) / 127.5 - 1
    seen = set()
    for epoch in range(12):
        pictures.set_epoch(epoch)
        item = pictures[0][0].numpy()
        flipped = not np.allclose(item, expected, atol=1e-6)
        np.testing.assert_allclose(item[..., ::-1] if flipped else item, expected, atol=1e-6)
        seen.add(flipped)
    assert seen == {False, True}
    (tmp_path / "videos" / "run").mkdir(parents=True)
    write_video(tmp_path / "videos" / "run" / "v.avi", 12)
    clips = ClipLatents(open_frames(tmp_path / "videos", PixelSpec(32, 32)), 4, stride=2)
    clip, label = clips[0]
    assert (clip.shape, label) == ((3, 4, 32, 32), 0)
    levels = ((clip.mean((0, 2, 3)) + 1) * 127.5 - 48) / 8
    np.testing.assert_allclose(np.diff(levels), 2, atol=0.3)


def test_clips_of_videos_that_do_not_count_their_frames(tmp_path: Path) -> None:
    write_video(tmp_path / "a.webm", 12, codec="libvpx")
    write_video(tmp_path / "b.mkv", 3)
    write_video(tmp_path / "c.mp4", 12)
    (tmp_path / "d.mp4").write_bytes(b"no video")
    reader = open_frames(tmp_path, PixelSpec(32, 32))
    with pytest.warns(UserWarning, match=r"2 of 4 sequences do not have 4 .* the first is 'b.mkv' with 3"):
        clips = ClipLatents(reader, 4)
    assert [clips.key(i) for i in range(len(clips))] == ["a.webm", "c.mp4"]
    assert clips[0][0].shape == (3, 4, 32, 32)
    levels = ((clips[0][0].mean((0, 2, 3)) + 1) * 127.5 - 48) / 8
    np.testing.assert_allclose(np.diff(levels), 1, atol=0.3)
    with pytest.warns(UserWarning, match=r"1 of 4 sequences have none to read, 'd.mp4' among them"):
        assert len(ImageLatents(reader)) == 12 + 3 + 12


def test_a_lost_frame_is_not_passed_over_in_a_clip(tmp_path: Path) -> None:
    write_video(tmp_path / "v.avi", 12)
    overwrite(tmp_path / "v.avi", lost := packets(tmp_path / "v.avi")[5], bytes(len(lost)))
    reader = open_frames(tmp_path, PixelSpec(32, 32))
    assert reader.read("v.avi", 6, 9).shape == (3, 3, 32, 32)
    with pytest.raises(InputError, match=r"v.avi: frames \[4, 8\) asked for; only 3 of them are there"):
        reader.read("v.avi", 4, 8)


def test_a_reader_opened_again_sees_what_is_there_by_then(toy_world: Path, tmp_path: Path) -> None:
    world = shutil.copytree(toy_world, tmp_path / "world")
    pixels = PixelSpec(32, 32, "4:3")
    reader = open_frames(world, pixels)
    position, yaw = reader.poses("walk_000")
    assert (reader.length("walk_000"), len(position)) == (10, 10)
    (world / "walk_000" / "9.jpg").unlink()
    (world / "walk_000" / "traj_data.pkl").write_bytes(pickle.dumps({"position": position + 1, "yaw": yaw}))
    for later in (open_frames(world, pixels), pickle.loads(pickle.dumps(reader))):
        assert later.numbers("walk_000").tolist() == list(range(9))
        assert np.array_equal(later.poses("walk_000")[0], position[:9] + 1)
    assert reader.numbers("walk_000").tolist() == list(range(10))  # the one that is open does not change its mind


def test_a_reader_keeps_few_folders(toy_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfstep.data.frames._KEPT_FOLDERS", 2)
    reader = open_frames(toy_world, PixelSpec(32, 32, "4:3"))
    assert [reader.length(key) for key in 3 * reader.keys()] == 9 * [10]
    assert len(reader._folders) == 2


def test_clips_of_an_autoencoder_over_time_are_refused(tmp_path: Path) -> None:
    spec = LatentSpec("t", 2, 8, temporal_factor=4)
    with DatasetWriter(tmp_path / "s", Manifest(spec, "fp32")) as writer:
        writer.append("v", np.zeros((3, 2, 5, 4, 4), np.float32))
    with pytest.raises(InputError, match="its items are clips already; use ImageLatents"):
        ClipLatents(tmp_path / "s", 2)
    assert ImageLatents(tmp_path / "s")[2][0].shape == (2, 5, 4, 4)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("context_size: 2", "context_size: two"), "context_size: got 'two'"),
        (("max_dist_cat: 4", "maximum: 4"), "distance.maximum: unknown key; did you mean 'max_dist_cat'"),
        (("recon:", "elsewhere:"), "datasets.elsewhere.metric_waypoint_spacing"),
        (("data_folder: here", "goals_per_obs: 1"), "neither latent_folder nor data_folder"),
        (("data_folder: here", "train: nowhere, latent_folder: LATENTS"), "no such file; the walks of a split"),
        (("data_folder: here", "latent_folder: LATENTS/nothing"), "no sequence below 'nothing/'"),
    ],
)
def test_faults_in_a_config_are_named(encoded: Path, tmp_path: Path, change: tuple[str, str], named: str) -> None:
    text = "context_size: 2\nlen_traj_pred: 3\ndistance: {min_dist_cat: -4, max_dist_cat: 4}\n"
    text += "datasets:\n  recon: {data_folder: here}\n"
    config = tmp_path / "nwm.yaml"
    config.write_text(text.replace(*change).replace("LATENTS", str(encoded)))
    with pytest.raises(InputError, match=named):
        navigation_datasets(NavigationConfig.load(config))


@pytest.mark.parametrize("named", ["walks", "/data/walks", "s3://bucket/walks", "file:///data/walks"])
def test_a_place_is_the_same_in_json_as_in_yaml(named: str) -> None:
    read = NavigationDatasetConfig(latent_folder=named)
    assert read.latent_folder == (named if named.startswith("s3") else Path(named.removeprefix("file://")))
    assert NavigationDatasetConfig.model_validate_json(read.model_dump_json()) == read
    assert NavigationDatasetConfig.model_validate_json(json.dumps({"latent_folder": named})) == read
