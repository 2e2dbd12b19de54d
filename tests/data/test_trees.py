"""Trajectory trees, their pickles, `.pt` trees, the toy world, and finding out what a folder holds."""

import contextlib
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from halfstep.data.base import SourceError, contiguous_runs
from halfstep.data.pickles import load_pickle, load_poses
from halfstep.data.pt_tree import PtSequence, load_latent
from halfstep.data.sources import Source, SourceConfig, find_sources
from halfstep.data.toy_world import CELLS, STEP_METRES, write_toy_world
from halfstep.data.walks import WalkSequence
from halfstep.errors import InputError, UnsafePickleError
from halfstep.spec import PixelSpec

PIXELS = PixelSpec(32, 32, "4:3")


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("yaw_shape", [(5,), (5, 1)])
def test_poses_of_every_pickle_protocol(tmp_path: Path, protocol: int, yaw_shape: tuple[int, ...]) -> None:
    position, yaw = np.arange(10.0).reshape(5, 2), np.arange(5, dtype=np.float32).reshape(yaw_shape)
    (tmp_path / "t.pkl").write_bytes(pickle.dumps({"position": position, "yaw": yaw}, protocol=protocol))
    loaded = load_poses(tmp_path / "t.pkl")
    assert np.array_equal(loaded[0], position)
    assert np.array_equal(loaded[1], np.arange(5.0))


def test_pickles_written_by_old_numpy(tmp_path: Path) -> None:
    data = pickle.dumps({"position": np.zeros((2, 2)), "yaw": np.zeros(2)}, protocol=2)
    (tmp_path / "t.pkl").write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert load_poses(tmp_path / "t.pkl")[0].shape == (2, 2)


@pytest.mark.parametrize(
    "wrap", [lambda a: a, lambda a: {"position": a, "yaw": [1]}, lambda a: [np.array([a], object)]]
)
def test_a_pickle_that_runs_code_does_not(tmp_path: Path, wrap) -> None:
    marker = tmp_path / "owned"
    (tmp_path / "t.pkl").write_bytes(pickle.dumps(wrap(Attack(marker))))
    with pytest.raises(
        UnsafePickleError, match=r"asks for posix.system; only plain data|an array of 'O8'; only numbers"
    ):
        load_pickle(tmp_path / "t.pkl")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "damaged pickle"),
        (b"\x80\x04garbage", "damaged pickle"),
        (pickle.dumps([1, 2]), "expected a dict with position and yaw"),
        (pickle.dumps({"position": np.zeros((3, 2)), "yaw": np.zeros(4)}), r"got position \[3, 2\] and yaw \[4\]"),
        (pickle.dumps({"position": np.full((3, 2), np.nan), "yaw": np.zeros(3)}), "not finite"),
        (pickle.dumps({"position": "here", "yaw": np.zeros(3)}), "must be numbers"),
    ],
)
def test_bad_poses_are_named(tmp_path: Path, content: bytes, named: str) -> None:
    (tmp_path / "t.pkl").write_bytes(content)
    with pytest.raises(InputError, match=named):
        load_poses(tmp_path / "t.pkl")


def test_any_damage_to_a_pickle_is_an_input_error(tmp_path: Path) -> None:
    whole = pickle.dumps({"position": np.zeros((4, 2)), "yaw": np.zeros(4)})
    rng = np.random.default_rng(0)
    for _ in range(1500):
        data = bytearray(whole)
        for place in rng.integers(len(data), size=rng.integers(1, 4)):
            data[place] = rng.integers(256)
        (tmp_path / "t.pkl").write_bytes(data)
        with contextlib.suppress(InputError):
            load_poses(tmp_path / "t.pkl")
    assert np.array_equal(np.ones(3) + np.ones(3), np.full(3, 2.0))  # numpy itself is unharmed


def test_the_real_evaluation_indices_load(outside_data: Path) -> None:
    for name in ("time", "rollout", "navigation_eval"):
        rows = load_pickle(outside_data / "nwm_splits" / "scand_test" / f"{name}.pkl")
        assert all(isinstance(row[0], str) and len(row) == 4 for row in rows)


@pytest.fixture
def walk(toy_world: Path, tmp_path: Path) -> Path:
    shutil.copytree(toy_world / "walk_000", tmp_path / "walk")
    return tmp_path / "walk"


def test_a_whole_walk(walk: Path) -> None:
    found = WalkSequence("walk", None, walk, PIXELS).inspect()
    assert found.numbers == tuple(range(10))
    assert found.problems == ()
    assert np.array_equal(found.arrays["position"], load_poses(walk / "traj_data.pkl")[0])


def test_missing_pictures_and_missing_poses_cost_only_themselves(walk: Path) -> None:
    (walk / "4.jpg").unlink()
    shutil.copy(walk / "3.jpg", walk / "10.jpg")
    found = WalkSequence("walk", None, walk, PIXELS).inspect()
    assert found.numbers == (0, 1, 2, 3, 5, 6, 7, 8, 9)
    assert [(p.frame, p.reason.split(": ")[1]) for p in found.problems] == [
        (4, "picture 4 is missing"),
        (10, "picture 10 has no pose (10 poses in traj_data.pkl)"),
    ]
    poses = load_poses(walk / "traj_data.pkl")[0]
    assert np.array_equal(found.arrays["position"], poses[list(found.numbers)])


def test_any_change_changes_the_content(walk: Path) -> None:
    def content() -> bytes:
        return WalkSequence("walk", None, walk, PIXELS).inspect().content

    seen = {content()}
    poses = dict(zip(("position", "yaw"), load_poses(walk / "traj_data.pkl"), strict=True))
    poses["yaw"] = poses["yaw"] + 1e-12
    (walk / "traj_data.pkl").write_bytes(pickle.dumps(poses))
    seen.add(content())
    (walk / "3.jpg").write_bytes((walk / "3.jpg").read_bytes() + b"\0")
    seen.add(content())
    (walk / "9.jpg").unlink()
    seen.add(content())
    assert len(seen) == 4


def test_a_walk_with_a_malicious_pickle_fails_alone(walk: Path) -> None:
    (walk / "traj_data.pkl").write_bytes(pickle.dumps(Attack(walk / "owned")))
    with pytest.raises(SourceError, match=r"asks for posix\.system"):
        WalkSequence("walk", None, walk, PIXELS).inspect()
    assert not (walk / "owned").exists()


def test_contiguous_runs() -> None:
    assert contiguous_runs(np.array([0, 1, 2, 5, 6, 9])) == [(0, 3), (3, 5), (5, 6)]
    assert contiguous_runs(np.array([], int)) == []


LATENT = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "content",
    [
        {"latent": LATENT},
        LATENT,
        LATENT[None],
        LATENT.double(),
        torch.nn.Parameter(LATENT),
        LATENT.numpy(),
        {"latent": LATENT.numpy()},
        [LATENT],
        (LATENT,),
        [{"latent": LATENT}],
        {"mean": LATENT, "logvar": torch.zeros(4, 3, 5)},
        {"mean": LATENT, "std": torch.ones(4, 3, 5)},
    ],
)
def test_every_variant_of_a_pt_latent(tmp_path: Path, content) -> None:
    torch.save(content, tmp_path / "0.pt")
    latent, logvar = load_latent(tmp_path / "0.pt")
    assert np.array_equal(latent, LATENT.numpy())
    if isinstance(content, dict) and "mean" in content:
        assert logvar is not None
        assert (logvar == 0).all()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"weights": LATENT}, "a dict with .'weights'."),
        ([LATENT, LATENT], "a list of 2; expected one latent"),
        (LATENT[0], r"shape \[3, 5\]; expected \[C, h, w\]"),
        ("latent", "holds str"),
    ],
)
def test_other_contents_are_named(tmp_path: Path, content, named: str) -> None:
    torch.save(content, tmp_path / "0.pt")
    with pytest.raises(SourceError, match=named):
        load_latent(tmp_path / "0.pt")


def test_damaged_and_malicious_pt_files_are_refused(tmp_path: Path) -> None:
    torch.save({"latent": LATENT}, tmp_path / "0.pt")
    data = (tmp_path / "0.pt").read_bytes()
    (tmp_path / "0.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(SourceError, match="cannot be read as latents"):
        load_latent(tmp_path / "0.pt")
    torch.save(Attack(tmp_path / "owned"), tmp_path / "1.pt")
    with pytest.raises(SourceError, match="cannot be read as latents"):
        load_latent(tmp_path / "1.pt")
    (tmp_path / "2.pt").write_bytes(pickle.dumps(Attack(tmp_path / "owned")))
    with pytest.raises(SourceError, match="cannot be read as latents"):
        load_latent(tmp_path / "2.pt")
    assert not (tmp_path / "owned").exists()


def test_shapes_in_a_pt_tree_must_agree(tmp_path: Path) -> None:
    torch.save(LATENT, tmp_path / "0.pt")
    torch.save(LATENT[:, :2], tmp_path / "1.pt")
    loaders = dict(PtSequence("t", None, tmp_path, (4, 3, 5)).frames((0, 1)))
    loaders[0]()
    with pytest.raises(SourceError, match=r"1.pt: latent of shape \[4, 2, 5\]; the others have \[4, 3, 5\]"):
        loaders[1]()


def test_the_toy_world_is_the_same_for_the_same_seed(tmp_path: Path, toy_world: Path) -> None:
    write_toy_world(tmp_path / "again", walks=3, frames=10, size=(80, 60), seed=7)
    write_toy_world(tmp_path / "other", walks=3, frames=10, size=(80, 60), seed=8)
    names = sorted(path.relative_to(toy_world) for path in toy_world.rglob("*") if path.is_file())
    assert len(names) == 33
    assert all((toy_world / n).read_bytes() == (tmp_path / "again" / n).read_bytes() for n in names)
    assert any((toy_world / n).read_bytes() != (tmp_path / "other" / n).read_bytes() for n in names)
    with pytest.raises(InputError, match="name a new folder for the toy world"):
        write_toy_world(tmp_path / "again")


def test_walks_stay_inside_and_steps_stay_short(tmp_path: Path) -> None:
    write_toy_world(tmp_path / "w", walks=4, frames=60, size=(16, 12), seed=3)
    for walk in (tmp_path / "w").iterdir():
        position, yaw = load_poses(walk / "traj_data.pkl")
        steps = np.linalg.norm(np.diff(position, axis=0), axis=1)
        assert steps.max() <= STEP_METRES + 1e-9
        assert steps.mean() > 0.1
        assert ((position > 1) & (position < CELLS - 1)).all()
        # A step goes where the pose looks afterwards.
        moved = steps > 1e-3
        heading = np.arctan2(*np.diff(position, axis=0)[moved].T[::-1])
        np.testing.assert_allclose(np.cos(heading - yaw[1:][moved]), 1, atol=1e-9)


def test_kinds_are_found_out(tmp_path: Path, toy_world: Path) -> None:
    (tmp_path / "classes" / "cat").mkdir(parents=True)
    shutil.copy(toy_world / "walk_000" / "0.jpg", tmp_path / "classes" / "cat" / "a.JPG")
    shutil.copy(toy_world / "walk_000" / "1.jpg", tmp_path / "classes" / "b.jpg")
    (tmp_path / "classes" / "notes.txt").touch()
    pictures = Source.find(SourceConfig(path=tmp_path / "classes"))
    assert pictures.kind == "pictures"
    assert [(s.key, s.label) for s in pictures.sequences(PIXELS)] == [("b.jpg", None), ("cat/a.JPG", "cat")]
    assert Source.find(SourceConfig(path=toy_world)).kind == "walks"
    assert Source.find(SourceConfig(path=toy_world / "walk_000" / "0.jpg")).files == ("0.jpg",)
    (tmp_path / "pt" / "walk").mkdir(parents=True)
    torch.save(LATENT, tmp_path / "pt" / "walk" / "0.pt")
    latent_source = Source.find(SourceConfig(path=tmp_path / "pt"))
    assert (latent_source.kind, latent_source.latent_shape()) == ("latents", (4, 3, 5))


def test_keys_carry_the_folders_name_when_there_are_several(toy_world: Path, tmp_path: Path) -> None:
    shutil.copytree(toy_world, tmp_path / "second")
    first, second = find_sources([SourceConfig(path=toy_world), SourceConfig(path=tmp_path / "second", name="two")])
    assert first.sequences(PIXELS)[0].key == "world/walk_000"
    assert second.sequences(PIXELS)[2].key == "two/walk_002"
    with pytest.raises(InputError, match="repeat"):
        find_sources([SourceConfig(path=toy_world), SourceConfig(path=toy_world)])


def test_sources_that_cannot_be_used_are_named(tmp_path: Path, toy_world: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        Source.find(SourceConfig(path=tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no pictures, videos, walks or latents in it"):
        Source.find(SourceConfig(path=tmp_path / "empty"))
    shutil.copytree(toy_world, tmp_path / "mixed")
    shutil.copy(toy_world / "walk_000" / "0.jpg", tmp_path / "mixed" / "cover.jpg")
    with pytest.raises(InputError, match="holds 1 pictures and 3 walks; name one `kind`"):
        Source.find(SourceConfig(path=tmp_path / "mixed"))
    assert Source.find(SourceConfig(path=tmp_path / "mixed", kind="walks")).kind == "walks"
