"""Animated pictures: their frames as moments, and how many there are beside the first."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from halfstep.data.animations import AnimationSequence
from halfstep.data.base import SourceError
from halfstep.data.listing import list_path
from halfstep.data.pictures import PictureSequence, frames_in
from halfstep.data.sources import Source, SourceConfig
from halfstep.spec import PixelSpec

PIXELS = PixelSpec(8, 8)
GREYS = (0, 50, 100, 150, 200)


def animate(path: Path, durations: int | list[int] = 100, **options: object) -> Path:
    pictures = [Image.new("RGB", (8, 8), (gray, gray, gray)) for gray in GREYS]
    if path.suffix == ".tif":
        pictures[0].save(path, save_all=True, append_images=pictures[1:])
    else:
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, **options)
    return path


def greys(path: Path, stride: int = 1, fps: float | None = None) -> list[int]:
    frames = list(AnimationSequence("k", None, path, PIXELS, stride, fps).frames())
    assert [number for number, _ in frames] == list(range(len(frames)))
    return [round(load().mean() / 50) * 50 for _, load in frames]


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.avif", "a.tif"])
def test_all_frames_in_order(tmp_path: Path, name: str) -> None:
    path = animate(tmp_path / name)
    assert frames_in(path) == 5
    assert greys(path) == list(GREYS)
    assert greys(path, stride=2) == [0, 100, 200]
    assert AnimationSequence("k", None, path, PIXELS, 2).expected == 3
    # As a picture it is its first frame, and it is known how many are left.
    still = PictureSequence(tmp_path, name, "", PIXELS)
    assert still.inspect().unused == 4
    assert dict(still.frames((0,)))[0]().mean() < 10


def test_the_frame_shown_at_each_moment(tmp_path: Path) -> None:
    path = animate(tmp_path / "a.gif", [100, 100, 300, 20, 80])
    assert greys(path, fps=10) == [0, 50, 100, 100, 100, 150]
    assert greys(path, fps=5) == [0, 100, 100]
    assert greys(path, fps=50)[-5:] == [150, 200, 200, 200, 200]


def test_a_default_picture_is_no_frame(tmp_path: Path) -> None:
    path = animate(tmp_path / "a.png", default_image=True)
    assert greys(path) == list(GREYS[1:])


def test_single_pictures_are_single(tmp_path: Path) -> None:
    for name in ("a.gif", "a.webp", "a.png", "a.jpg", "a.ico"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
        assert frames_in(tmp_path / name) == 1
    (tmp_path / "broken.gif").write_bytes(b"GIF89a")
    assert frames_in(tmp_path / "broken.gif") == 1
    with pytest.raises(SourceError, match=r"broken.gif"):
        list(AnimationSequence("k", None, tmp_path / "broken.gif", PIXELS).frames())


def test_animations_are_clips_where_clips_are_asked_for(tmp_path: Path) -> None:
    animate(tmp_path / "moving.gif")
    Image.new("RGB", (8, 8)).save(tmp_path / "still.gif")
    clips = Source.find(SourceConfig(path=tmp_path, kind="videos", stride=2))
    (sequence,) = clips.sequences(PIXELS)
    assert (sequence.key, sequence.expected) == ("moving.gif", 3)
    assert clips.notes == (f"{tmp_path}: 1 files are left out, not read as videos: 1 .gif",)
    assert list_path(tmp_path).files == ("moving.gif", "still.gif")
    over_time = Source.find(SourceConfig(path=tmp_path)).sequences(PixelSpec(8, 8, clip_length=5))
    assert [len(list(sequence.frames(()))) for sequence in over_time] == [5, 1]


def test_a_damaged_end_keeps_the_frames_before_it(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    pictures = [Image.fromarray(values) for values in noise]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:])
    data = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "a.gif").write_bytes(data[:-600])
    sequence = AnimationSequence("k", None, tmp_path / "a.gif", PIXELS).frames()
    assert [next(sequence)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(SourceError, match=r"a.gif: cannot be read .*truncated"):
        next(sequence)
