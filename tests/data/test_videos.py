from pathlib import Path

import av
import numpy as np
import pytest

from halfstep.data.base import SourceError
from halfstep.data.videos import VideoSequence
from halfstep.errors import InputError
from halfstep.spec import PixelSpec

PIXELS = PixelSpec(32, 32)


def write_video(path: Path, frames: int, *, fps: int = 10) -> None:
    """Frame i is noise around the grey level 48 + 8 * i, so that a decoded frame tells its number."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 32, 32, "yuv420p", 4
        stream.bit_rate = 2_000_000
        for i in range(frames):
            values = 48 + 8 * i + rng.integers(-40, 41, (32, 32, 1)).repeat(3, axis=2)
            frame = av.VideoFrame.from_ndarray(values.astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def read(sequence: VideoSequence) -> list[tuple[int, int]]:
    return [(number, round((float(load().mean()) - 48) / 8)) for number, load in sequence.frames()]


@pytest.fixture
def video(tmp_path: Path) -> Path:
    write_video(tmp_path / "v.mp4", 20)
    return tmp_path / "v.mp4"


def test_all_frames_in_order(video: Path) -> None:
    sequence = VideoSequence("v", None, video, PIXELS)
    assert sequence.expected == 20
    assert read(sequence) == [(i, i) for i in range(20)]


def test_stride_and_rate_thin_the_frames(video: Path) -> None:
    assert read(VideoSequence("v", None, video, PIXELS, stride=6)) == list(enumerate((0, 6, 12, 18)))
    sequence = VideoSequence("v", None, video, PIXELS, fps=4.0)
    # At 10 frames a second, the frames shown at 0, 1/4, 2/4, ... seconds.
    assert read(sequence) == list(enumerate((0, 2, 5, 7, 10, 12, 15, 17)))
    assert read(VideoSequence("v", None, video, PIXELS, fps=0.0001)) == [(0, 0)]
    contents = {VideoSequence("v", None, video, PIXELS, stride=s).inspect().content for s in (1, 2)}
    assert len({*contents, sequence.inspect().content}) == 3
    assert sequence.expected == 8
    with pytest.raises(InputError, match="give one of them"):
        VideoSequence("v", None, video, PIXELS, stride=2, fps=4.0)
    with pytest.raises(InputError, match="expected positive"):
        VideoSequence("v", None, video, PIXELS, stride=0)


def test_a_damaged_tail_gives_what_came_before(tmp_path: Path) -> None:
    write_video(tmp_path / "v.avi", 20)  # AVI is readable as far as it goes
    data = (tmp_path / "v.avi").read_bytes()
    (tmp_path / "v.avi").write_bytes(data[: len(data) * 2 // 3])
    got: list[int] = []
    with pytest.raises(SourceError, match=r"v.avi: (ends|damaged) after \d+ of 20 frames"):
        got.extend(number for number, _ in VideoSequence("v", None, tmp_path / "v.avi", PIXELS).frames())
    assert got == list(range(len(got)))
    assert 5 < len(got) < 20


@pytest.mark.parametrize("data", [b"", b"no video at all" * 10])
def test_what_is_no_video(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "v.mp4").write_bytes(data)
    sequence = VideoSequence("v", None, tmp_path / "v.mp4", PIXELS)
    assert sequence.expected == 0
    with pytest.raises(SourceError, match=r"v.mp4: damaged after 0 frames"):
        list(sequence.frames())


def test_the_real_clip(outside_data: Path) -> None:
    sequence = VideoSequence("clip", None, outside_data / "video" / "wan_clip.mp4", PixelSpec(104, 60), stride=20)
    frames = [load() for _, load in sequence.frames()]
    assert len(frames) == 5
    assert frames[0].shape == (60, 104, 3)
    assert frames[0].std() > 10
