"""What a folder holds: walks through links, kinds, what cannot be used, what is left out, and names as keys."""

import os
import pickle
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from halfstep.data.base import SourceError
from halfstep.data.frames import open_frames
from halfstep.data.keys import key_to_name, name_to_key
from halfstep.data.latents import read_names
from halfstep.data.listing import list_path
from halfstep.data.sources import Source, SourceConfig, find_sources
from halfstep.data.tree import list_tree
from halfstep.data.walks import numbered_files
from halfstep.errors import InputError
from halfstep.spec import PixelSpec

PIXELS = PixelSpec(32, 32)


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(path, "PNG")
    return path


def poses(folder: Path, count: int = 3) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "traj_data.pkl").write_bytes(pickle.dumps({"position": np.zeros((count, 2)), "yaw": np.zeros(count)}))


@given(st.binary(min_size=1, max_size=12) | st.text("\ufffdE9\udce9é", min_size=1).map(os.fsencode))
def test_a_name_and_its_key_are_one_to_one(data: bytes) -> None:
    name = data.decode("utf-8", "surrogateescape")
    key = name_to_key(name)
    assert key_to_name(key) == name
    assert key.encode("utf-8").decode("utf-8") == key


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")))
def test_ordinary_names_are_their_keys(name: str) -> None:
    assert name_to_key(name) == name


def test_a_byte_that_is_no_utf_8_is_written_out(tmp_path: Path) -> None:
    assert name_to_key(os.fsdecode(b"caf\xe9.png")) == "caf\ufffdE9.png"
    # A file that has the name of the escape gives way: no two names have one key.
    assert name_to_key("caf\ufffdE9.png") == "caf\ufffdEF\ufffdBF\ufffdBDE9.png"
    assert name_to_key("old \ufffd name.png") == "old \ufffd name.png"


def test_every_link_is_followed_and_only_cycles_are_cut(tmp_path: Path) -> None:
    picture(tmp_path / "all" / "x" / "1.png")
    root = tmp_path / "root"
    for split in ("test", "train"):
        (root / split).mkdir(parents=True)
        (root / split / "x").symlink_to(tmp_path / "all" / "x")
    (root / "train" / "up").symlink_to(root)
    (root / "train" / "up2").symlink_to(root / "train")
    (root / "both").symlink_to(root / "train")
    assert list_tree(root).files == ["both/x/1.png", "test/x/1.png", "train/x/1.png"]


def test_a_single_link_keeps_its_name(tmp_path: Path) -> None:
    picture(tmp_path / "blobs" / "0a1b2c")
    (tmp_path / "snapshot").mkdir()
    link = tmp_path / "snapshot" / "cat.png"
    link.symlink_to("../blobs/0a1b2c")
    assert [s.key for s in Source.find(SourceConfig(path=link)).sequences(PIXELS)] == ["cat.png"]
    (tmp_path / "one").symlink_to(tmp_path / "snapshot")
    (tmp_path / "two").symlink_to(tmp_path / "snapshot")
    found = find_sources([SourceConfig(path=tmp_path / name) for name in ("one", "two")])
    assert [s.key for source in found for s in source.sequences(PIXELS)] == ["one/cat.png", "two/cat.png"]


def test_what_systems_leave_behind_is_no_data(tmp_path: Path) -> None:
    for folder in ("", "cat/", "@eaDir/a.png/", "cat/@eaDir/", "__MACOSX/cat/", ".git/", "lost+found/", "#recycle/"):
        picture(tmp_path / f"{folder}a.png")
    picture(tmp_path / "cat" / "._a.png")
    assert list_path(tmp_path).files == ("a.png", "cat/a.png")


def test_pipes_and_sockets_are_named_and_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.jpg")
        (tmp_path / "away.png").symlink_to("nowhere")
        (tmp_path / "self.png").symlink_to("self.png")
        listing = list_path(tmp_path)
    assert listing.files == ("a.png", "away.png", "self.png")  # reading a broken link says what is wrong with it
    assert listing.notes == (f"{tmp_path}: 2 pipes, sockets or devices are left out: pipe.png, socket.jpg",)


def test_a_pipe_beside_numbered_pictures_is_none(tmp_path: Path) -> None:
    picture(tmp_path / "0.png")
    os.mkfifo(tmp_path / "1.png")
    assert numbered_files(tmp_path, frozenset({".png"})) == {0: tmp_path / "0.png"}


def test_media_that_nobody_reads_are_counted(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    for name in ("b.heic", "c.HEIC", "d.cr2", "notes.txt", "e"):
        (tmp_path / name).write_bytes(b"x")
    assert list_path(tmp_path).notes == (f"{tmp_path}: 3 files are left out, not read as pictures: 2 .heic, 1 .cr2",)
    (tmp_path / "f.mp4").write_bytes(b"x")
    assert "4 files are left out, not read as pictures: 2 .heic" in list_path(tmp_path, "pictures").notes[0]


@pytest.mark.parametrize("name", ["a.jfif", "a.JPE", "a.avif", "a.tga", "a.apng", "a.j2k", "a.pnm", "a.ico", "a.qoi"])
def test_every_picture_that_pillow_opens_is_listed(tmp_path: Path, name: str) -> None:
    picture(tmp_path / name)
    assert (list_path(tmp_path).kind, list_path(tmp_path).files) == ("pictures", (name,))


@pytest.mark.parametrize("name", ["a.ts", "a.flv", "a.3gp", "a.MTS", "a.m2ts", "a.ogv", "a.mpg", "a.vob"])
def test_every_container_of_videos_is_listed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    assert (list_path(tmp_path).kind, list_path(tmp_path).files) == ("videos", (name,))


@contextmanager
def as_nobody(folder: Path) -> Iterator[Path]:
    """As a user who owns a folder below `folder` and for whom, unlike root, some are locked."""
    if os.geteuid() != 0:
        yield folder
        return
    folder.chmod(0o755)
    (folder / "own").mkdir()
    os.chown(folder / "own", 65534, 65534)
    os.seteuid(65534)
    try:
        yield folder / "own"
    finally:
        os.seteuid(0)


def half_copied(root: Path) -> Path:
    for name in ("a", "no_poses"):
        for number in range(3):
            picture(root / name / f"{number}.png")
    poses(root / "a")
    poses(root / "deep" / "no_pictures")
    picture(root / "a" / "depth" / "0.png")  # inside a walk
    return root


def test_half_copied_walks_are_named(tmp_path: Path) -> None:
    root = half_copied(tmp_path / "r")
    shutil.rmtree(root / "a" / "depth")
    found = Source.find(SourceConfig(path=root), "r")
    assert (found.kind, found.files) == ("walks", ("a",))
    assert [(lost.key, lost.reason.split(";")[0]) for lost in found.lost] == [
        ("r/deep/no_pictures", f"{root}/deep/no_pictures: has traj_data.pkl but no numbered pictures"),
        ("r/no_poses", f"{root}/no_poses: has 3 pictures but no traj_data.pkl"),
    ]
    with pytest.raises(SourceError, match="no_poses: has 3 pictures but no traj_data"):
        found.lost[1].inspect()
    with (
        pytest.warns(UserWarning, match="no_pictures: has traj_data"),
        pytest.warns(UserWarning, match="no_poses: has 3 pictures but no traj_data"),
    ):
        assert open_frames(root, PIXELS).keys() == ["a"]


def test_who_names_a_kind_gets_that(tmp_path: Path) -> None:
    root = half_copied(tmp_path / "r")
    with pytest.raises(InputError, match="holds 1 pictures and 1 walks"):
        list_path(root)
    only = list_path(root, "walks")
    assert (only.files, list(only.lost)) == (("a",), ["deep/no_pictures", "no_poses"])
    assert only.notes == (f"{root}: 1 files are left out, not read as walks: 1 .png",)
    loose = list_path(root, "pictures")
    assert loose.files == ("a/depth/0.png", "no_poses/0.png", "no_poses/1.png", "no_poses/2.png")
    assert loose.notes == (f"{root}: 3 files are left out, not read as pictures: 3 .png",)
    shutil.rmtree(root / "a")
    with pytest.raises(InputError, match=r"no walks in it; .*no_pictures: has traj_data.pkl but no numbered"):
        list_path(root, "walks")


def test_a_walk_may_hold_folders(tmp_path: Path) -> None:
    for name in ("0.png", "depth/0.png"):
        picture(tmp_path / "walk" / name)
    poses(tmp_path / "walk")
    poses(tmp_path / "walk" / "more")
    listing = list_path(tmp_path / "walk", "walks")
    assert (listing.root, listing.files) == (tmp_path, ("walk",))
    assert list(listing.lost) == ["walk/more"]
    assert listing.notes == (f"{tmp_path}/walk: 1 files are left out, not read as walks: 1 .png",)


def test_latents_with_poses_alone_are_named(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    torch.save(torch.zeros(4, 2, 2), tmp_path / "t" / "0.pt")
    poses(tmp_path / "empty")
    listing = list_path(tmp_path)
    assert (listing.kind, listing.files, list(listing.lost)) == ("latents", ("t",), ["empty"])


def test_one_odd_latent_does_not_decide_the_shape(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    torch.save(torch.zeros(3, 8, 8), tmp_path / "t" / "0.pt")
    for number in range(1, 4):
        torch.save(torch.zeros(4, 2, 2), tmp_path / "t" / f"{number}.pt")
    assert Source.find(SourceConfig(path=tmp_path)).latent_shape() == (4, 2, 2)


def test_one_number_means_one_file(tmp_path: Path) -> None:
    for name in ("0.png", "3.png", "03.jpg"):
        picture(tmp_path / name)
    with pytest.raises(SourceError, match=r"03.jpg and 3.png are both number 3; remove one"):
        numbered_files(tmp_path, frozenset({".png", ".jpg"}))
    (tmp_path / "3.png").rename(tmp_path / "99999999999.png")
    with pytest.raises(SourceError, match=r"99999999999.png is numbered above 2147483647"):
        numbered_files(tmp_path, frozenset({".png", ".jpg"}))


def test_a_folder_that_cannot_be_listed_is_named() -> None:
    with tempfile.TemporaryDirectory() as scratch, as_nobody(Path(scratch)) as root:
        picture(root / "a.png")
        (root / "locked").mkdir(mode=0)
        found = Source.find(SourceConfig(path=root))
        assert found.files == ("a.png",)
        assert [(lost.key, lost.folder, lost.reason) for lost in found.lost] == [
            ("locked", True, f"{root}/locked: cannot be listed (Permission denied)")
        ]
        with pytest.raises(InputError, match=r"locked: cannot be listed \(Permission denied\)"):
            Source.find(SourceConfig(path=root / "locked"))


@pytest.mark.parametrize("data", [b"\xef\xbb\xbfa\r\nb\r\n", b"a\nb", b"\n a \n\nb\n"])
def test_names_of_a_split(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "traj_names.txt").write_bytes(data)
    assert read_names(tmp_path / "traj_names.txt") == ["a", "b"]


def test_names_of_a_split_are_text(tmp_path: Path) -> None:
    (tmp_path / "traj_names.txt").write_bytes(b"a\ncaf\xe9\n")
    with pytest.raises(InputError, match="not UTF-8 at byte 5; save the names as UTF-8 text"):
        read_names(tmp_path / "traj_names.txt")
