"""Videos: whole, cut and damaged ones of every container, their frames in the order and at the times shown."""

import itertools
import struct
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from halfstep.data.base import SourceError, digest, file_digest
from halfstep.data.pictures import fit
from halfstep.data.videos import VideoSequence
from halfstep.errors import InputError
from halfstep.spec import PixelSpec
from tests.support.media import overwrite, packets, write_video

PIXELS = PixelSpec(32, 32)


# Of each container: file name, and how it is written. All have 20 frames, 10 a second.
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}
WHOLE = {
    "h264.mp4": {"codec": "libx264"},  # with B-frames, as all of x264 and those with bf
    "fast.mp4": {"codec": "libx264", "options": {"movflags": "faststart"}},
    "fragments.mp4": {"codec": "libx264", "options": FRAGMENTS},
    "sound.mov": {"codec": "libx264", "audio": "aac"},
    "mpeg4.avi": {},
    "b-frames.avi": {"codec_options": {"bf": "2"}},
    "h264.avi": {"codec": "libx264"},
    "h264.mkv": {"codec": "libx264", "audio": "libopus"},
    "vp8.webm": {"codec": "libvpx"},
    "vp9.webm": {"codec": "libvpx-vp9", "audio": "libopus"},
    "sound.ts": {"codec": "libx264", "audio": "aac"},
    "sound.mpg": {"codec": "mpeg2video", "audio": "mp2", "fps": 25},
    "wmv2.wmv": {"codec": "wmv2"},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the videos of `WHOLE`; not to be changed, copy them."""
    folder = tmp_path_factory.mktemp("whole")
    for name, how in WHOLE.items():
        write_video(folder / name, 20, **how)
    return folder


def read(sequence: VideoSequence) -> list[tuple[int, int]]:
    return [(number, round((float(load().mean()) - 48) / 8)) for number, load in sequence.frames()]


def read_damaged(sequence: VideoSequence) -> tuple[list[tuple[int, int]], str]:
    """What can be read, and the failure that says what cannot."""
    got = []
    with pytest.raises(SourceError) as failure:
        got.extend((number, round((float(load().mean()) - 48) / 8)) for number, load in sequence.frames())
    return got, str(failure.value)


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


@pytest.mark.parametrize("name", WHOLE)
def test_whole_files_of_every_container(whole: Path, name: str) -> None:
    fps = WHOLE[name].get("fps", 10)
    sequence = VideoSequence("v", None, whole / name, PIXELS)
    assert read(sequence) == [(i, i) for i in range(20)]
    assert sequence.expected == 20
    for rate in (fps, fps / 2, 2 * fps, 30000 / 1001):
        sequence = VideoSequence("v", None, whole / name, PIXELS, fps=rate)
        exact = Fraction(rate).limit_denominator(1001)
        shown = [int(k / exact * fps) for k in range(1000) if k / exact * fps < 20]
        assert read(sequence) == list(enumerate(shown))
        assert sequence.expected == len(shown)
    sequence = VideoSequence("v", None, whole / name, PIXELS, stride=3)
    assert (len(read(sequence)), sequence.expected) == (7, 7)


@pytest.mark.parametrize(
    "name", ["fast.mp4", "fragments.mp4", "mpeg4.avi", "h264.avi", "h264.mkv", "vp8.webm", "vp9.webm"]
)
@pytest.mark.parametrize("part", [0.5, 0.8, 0.97])
def test_a_cut_download_gives_what_came_before_and_one_failure(
    whole: Path, tmp_path: Path, name: str, part: float
) -> None:
    data = (whole / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(len(data) * part)])
    sequence = VideoSequence("v", None, tmp_path / name, PIXELS)
    got, failure = read_damaged(sequence)
    assert got == [(i, i) for i in range(len(got))]
    assert 3 < len(got) <= 20
    missing = len(data) - int(len(data) * part)
    assert f"{name}: ends after {len(got)} " in failure
    assert f"({missing} bytes are missing)" in failure or name == "fragments.mp4"  # which tells of one fragment alone
    assert sequence.expected >= len(got)


@pytest.mark.parametrize("name", ["fast.mp4", "mpeg4.avi", "h264.mkv", "vp8.webm", "vp9.webm"])
@pytest.mark.parametrize("which", [6, 19])
def test_a_damaged_packet_leaves_a_gap(whole: Path, tmp_path: Path, name: str, which: int) -> None:
    data, packet = (whole / name).read_bytes(), packets(whole / name)[which]
    (tmp_path / name).write_bytes(data.replace(packet, bytes(len(packet))))
    got, failure = read_damaged(VideoSequence("v", None, tmp_path / name, PIXELS))
    (lost,) = set(range(20)) - {number for number, _ in got}
    assert lost == which  # noise is not worth a B-frame, so that packets are in the order shown
    assert f"{name}: damaged: frame {lost} cannot be decoded" in failure
    assert len(got) == 19
    assert all(level == number for number, level in got if number < lost)
    # At twice the rate each frame is there twice, but for the one that is lost.
    twice, _ = read_damaged(VideoSequence("v", None, tmp_path / name, PIXELS, fps=20.0))
    assert [number for number, _ in twice] == [n for n in range(40) if n // 2 != lost]


def test_a_damaged_packet_among_b_frames(tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", 20, codec_options={"bf": "2"})
    with av.open(str(tmp_path / "v.mp4")) as container:
        times = [(packet.pts, bytes(packet)) for packet in container.demux(video=0) if packet.size]
    assert times != sorted(times)
    packet = sorted(times)[7][1]
    overwrite(tmp_path / "v.mp4", packet, bytes(len(packet)))
    got, failure = read_damaged(VideoSequence("v", None, tmp_path / "v.mp4", PIXELS))
    assert [number for number, _ in got] == [i for i in range(20) if i != 7]
    assert "damaged: frame 7 cannot be decoded" in failure


def test_a_frame_that_decodes_in_part_is_lost(whole: Path, tmp_path: Path) -> None:
    data, packet = (whole / "mpeg4.avi").read_bytes(), packets(whole / "mpeg4.avi")[6]
    half = packet[: len(packet) // 2] + b"\xff" * (len(packet) - len(packet) // 2)
    (tmp_path / "v.avi").write_bytes(data.replace(packet, half))
    got, failure = read_damaged(VideoSequence("v", None, tmp_path / "v.avi", PIXELS))
    assert [number for number, _ in got] == [i for i in range(20) if i != 6]
    assert "frame 6 cannot be decoded" in failure


def test_a_hole_between_packets_is_told(whole: Path, tmp_path: Path) -> None:
    write_video(tmp_path / "v.mkv", 20, options={"cluster_time_limit": "500"})
    data, middle = bytearray((tmp_path / "v.mkv").read_bytes()), packets(tmp_path / "v.mkv")[7]
    at = data.index(middle)
    data[at - 20 : at + len(middle)] = bytes(len(middle) + 20)  # with the header of its block
    (tmp_path / "v.mkv").write_bytes(data)
    got, failure = read_damaged(VideoSequence("v", None, tmp_path / "v.mkv", PIXELS))
    numbers = [number for number, _ in got]
    assert numbers[-1] > len(numbers) - 1 > 6
    assert "on the file is broken" in failure
    data[len(data) * 3 // 4 :] = bytes(len(data) - len(data) * 3 // 4)  # as downloads are, of which the end is to come
    (tmp_path / "v.mkv").write_bytes(data)
    assert "ends after" in read_damaged(VideoSequence("v", None, tmp_path / "v.mkv", PIXELS))[1]


@settings(max_examples=12, deadline=None)
@given(
    steps=st.lists(st.integers(1, 700), min_size=2, max_size=8),
    rate=st.sampled_from([1.0, 5.0, 7.5, 24.0, 30000 / 1001]),
)
def test_at_a_rate_the_frame_is_taken_that_is_shown_then(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], rate: float
) -> None:
    path = tmp_path_factory.mktemp("rate") / "v.mp4"
    times = [0, *itertools.accumulate(steps)]
    write_video(path, len(times), milliseconds=times)
    got = read(VideoSequence("v", None, path, PIXELS, fps=rate))
    exact = Fraction(rate).limit_denominator(1001)
    last = Fraction(times[-1], 1000)
    due = [k / exact * 1000 for k in range(len(got))]
    assert got == [(k, max(i for i, time in enumerate(times) if time <= now)) for k, now in enumerate(due)]
    assert (len(got) - 1) / exact <= last + 1  # how long the last one is shown is the writer's choice
    assert len(got) / exact > last
    assert VideoSequence("v", None, path, PIXELS, fps=rate).expected == len(got)


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "v.avi"])
def test_the_rate_of_broadcasts_is_exact(tmp_path: Path, name: str) -> None:
    ntsc = 30000 / 1001
    write_video(tmp_path / name, 20, fps=ntsc)
    assert read(VideoSequence("v", None, tmp_path / name, PIXELS, fps=ntsc)) == [(i, i) for i in range(20)]
    shown = [int(k * Fraction(30000, 1001) / 24) for k in range(17)]
    assert [level for _, level in read(VideoSequence("v", None, tmp_path / name, PIXELS, fps=24.0))] == shown[:17]


def write_avi(path: Path, pictures: list[bytes], declared: int) -> None:
    """Motion JPEG, ten moments a second; an empty picture says to show the one before again."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)

    main = struct.pack("<14I", 100_000, 0, 0, 0x10, declared, 0, 1, 0, 32, 32, 0, 0, 0, 0)
    stream = b"vidsMJPG" + struct.pack("<IHH8I4h", 0, 0, 0, 0, 1, 10, 0, declared, 0, 2**32 - 1, 0, 0, 0, 32, 32)
    shape = struct.pack("<IiiHH4sIiiII", 40, 32, 32, 1, 24, b"MJPG", 32 * 32 * 3, 0, 0, 0, 0)
    header = chunk(b"LIST", b"strl" + chunk(b"strh", stream) + chunk(b"strf", shape))
    index, at = b"", 4
    for picture in pictures:
        index += struct.pack("<4sIII", b"00dc", 0x10 if picture else 0, at, len(picture))
        at += 8 + len(picture) + len(picture) % 2
    movie = b"movi" + b"".join(chunk(b"00dc", picture) for picture in pictures)
    lists = chunk(b"LIST", b"hdrl" + chunk(b"avih", main) + header) + chunk(b"LIST", movie)
    path.write_bytes(chunk(b"RIFF", b"AVI " + lists + chunk(b"idx1", index)))


def test_repeats_and_miscounts_of_avi(tmp_path: Path) -> None:
    pictures = []
    for i in range(12):
        file = BytesIO()
        Image.new("RGB", (32, 32), (48 + 8 * i,) * 3).save(file, "JPEG", quality=95)
        pictures.append(file.getvalue())
    path = tmp_path / "v.avi"
    for declared in (11, 12, 13):
        write_avi(path, pictures, declared)
        assert read(VideoSequence("v", None, path, PIXELS)) == [(i, i) for i in range(12)]
        assert VideoSequence("v", None, path, PIXELS).expected == 12
    write_avi(path, pictures, 14)
    got, failure = read_damaged(VideoSequence("v", None, path, PIXELS))
    assert (len(got), "ends after 12 of 14 frames" in failure) == (12, True)
    write_avi(path, [b"" if i % 3 == 2 or i == 4 else picture for i, picture in enumerate(pictures)], 12)
    shown = [0, 1, 1, 3, 3, 3, 6, 7, 7, 9, 10, 10]
    for options in ({}, {"fps": 10.0}):
        sequence = VideoSequence("v", None, path, PIXELS, **options)
        assert read(sequence) == list(enumerate(shown))
        assert sequence.expected == 12
    sequence = VideoSequence("v", None, path, PIXELS, stride=2)
    assert read(sequence) == list(enumerate(shown[::2]))
    assert sequence.expected == 6


def test_frames_that_serve_as_references_only_do_not_count(whole: Path, tmp_path: Path) -> None:
    data, packet = (whole / "vp8.webm").read_bytes(), packets(whole / "vp8.webm")[5]
    hidden = bytes([packet[0] & ~0x10]) + packet[1:]
    (tmp_path / "v.webm").write_bytes(data.replace(packet, hidden))
    sequence = VideoSequence("v", None, tmp_path / "v.webm", PIXELS)
    assert [number for number, _ in read(sequence)] == list(range(19))
    assert sequence.expected == 19


def test_an_edit_list_that_leaves_out_the_end_is_no_damage(whole: Path, tmp_path: Path) -> None:
    data = bytearray((whole / "h264.mp4").read_bytes())
    at = data.index(b"elst") + 12
    data[at : at + 4] = struct.pack(">I", 1000)  # of 2000 milliseconds
    (tmp_path / "v.mp4").write_bytes(data)
    sequence = VideoSequence("v", None, tmp_path / "v.mp4", PIXELS)
    assert read(sequence) == [(i, i) for i in range(10)]
    assert sequence.expected == 10


def test_tags_need_not_be_utf8(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "v.avi"), "w") as container:
        container.metadata["title"] = "XXXXXXXX"
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 48, np.uint8), format="rgb24")))
        container.mux(stream.encode())
    overwrite(tmp_path / "v.avi", b"XXXXXXXX", "Žluťouč ".encode("cp1250"))
    assert read(VideoSequence("v", None, tmp_path / "v.avi", PIXELS)) == [(0, 0)]


def box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", 8 + len(body)) + kind + body


def with_cover(data: bytes) -> bytes:
    """The same MP4, whose index must come last, with a white cover."""
    file = BytesIO()
    Image.new("RGB", (64, 64), "white").save(file, "JPEG")
    cover = box(b"ilst", box(b"covr", box(b"data", struct.pack(">II", 13, 0) + file.getvalue())))
    handler = box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    extra = box(b"udta", box(b"meta", bytes(4) + handler + cover))
    at = data.index(b"moov") - 4
    header = 8 + int.from_bytes(data[at + 8 : at + 12], "big")  # first in it, and read before what follows
    index = data[at + 8 :]
    assert int.from_bytes(data[at : at + 4], "big") == len(index) + 8
    return data[:at] + box(b"moov", index[: header - 8] + extra + index[header - 8 :])


def test_a_cover_is_not_the_film(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(with_cover((whole / "h264.mp4").read_bytes()))
    with av.open(str(tmp_path / "v.mp4")) as container:
        assert container.streams.video[0].disposition & Disposition.attached_pic
    assert read(VideoSequence("v", None, tmp_path / "v.mp4", PIXELS)) == [(i, i) for i in range(20)]


def test_a_file_with_a_cover_alone_has_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "song.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        part = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        part.sample_rate = 48000
        container.mux(stream.encode(part))
        container.mux(stream.encode())
    sound = (tmp_path / "song.mp4").read_bytes()
    (tmp_path / "song.mp4").write_bytes(with_cover(sound))
    for data in (sound, with_cover(sound)):
        (tmp_path / "song.mp4").write_bytes(data)
        sequence = VideoSequence("v", None, tmp_path / "song.mp4", PIXELS)
        assert sequence.expected == 0
        with pytest.raises(SourceError, match=r"song.mp4: has no video stream"):
            list(sequence.frames())


CORNERS = np.zeros((32, 48, 3), np.uint8)
CORNERS[:16, :24], CORNERS[:16, 24:], CORNERS[16:, :24], CORNERS[16:, 24:] = (250, 0, 0), (0, 250, 0), (0, 0, 250), 250


def write_corners(path: Path, *, turned: float = 0, mirrored: bool = False, pixel: Fraction | None = None) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv444p"
        stream.set_display_rotation(turned, mirrored, False)
        if pixel is not None:
            stream.codec_context.sample_aspect_ratio = pixel
        container.mux(stream.encode(av.VideoFrame.from_ndarray(CORNERS, format="rgb24")))
        container.mux(stream.encode())


@pytest.mark.parametrize("turned", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [False, True])
def test_frames_are_turned_and_mirrored_as_players_show_them(tmp_path: Path, turned: int, mirrored: bool) -> None:
    write_corners(tmp_path / "v.mp4", turned=turned, mirrored=mirrored)
    with av.open(str(tmp_path / "v.mp4")) as container:
        frame = next(container.decode(video=0))
        said = frame.side_data.get("DISPLAYMATRIX")
        a, b, _, c, d = (1, 0, 0, 0, 1) if said is None else np.frombuffer(bytes(said), np.int32)[:5].tolist()
        decoded = frame.to_ndarray(format="rgb24")
    assert bool(a * d - b * c < 0) == mirrored
    # Each pixel by itself to where the matrix sends it: (x, y) to (ax + cy, bx + dy).
    height, width = decoded.shape[:2]
    places = {}
    for y, x in itertools.product(range(height), range(width)):
        places[int(np.sign(b) * x + np.sign(d) * y), int(np.sign(a) * x + np.sign(c) * y)] = decoded[y, x]
    rows, columns = sorted({row for row, _ in places}), sorted({column for _, column in places})
    shown = np.array([[places[row, column] for column in columns] for row in rows])
    pixels = PixelSpec(shown.shape[1], shown.shape[0])
    ((_, load),) = VideoSequence("v", None, tmp_path / "v.mp4", pixels).frames()
    assert np.array_equal(load(), shown)


@pytest.mark.parametrize(("pixel", "size"), [(Fraction(4, 3), (64, 32)), (Fraction(1, 2), (48, 64)), (None, (48, 32))])
@pytest.mark.parametrize("turned", [0, 90])
def test_pixels_are_made_square(tmp_path: Path, pixel: Fraction | None, size: tuple[int, int], turned: int) -> None:
    write_corners(tmp_path / "v.mp4", pixel=pixel, turned=turned)
    with av.open(str(tmp_path / "v.mp4")) as container:
        image = Image.fromarray(next(container.decode(video=0)).to_ndarray(format="rgb24"))
    if pixel is not None:
        image = image.resize(size, Image.Resampling.BICUBIC)
    expected = fit(Image.fromarray(np.rot90(np.asarray(image), turned // 90)), PIXELS)
    ((_, load),) = VideoSequence("v", None, tmp_path / "v.mp4", PIXELS).frames()
    assert np.array_equal(load(), expected)


def test_a_nonsense_shape_of_pixels_is_left_alone(tmp_path: Path) -> None:
    write_corners(tmp_path / "v.mp4", pixel=Fraction(1000, 1))
    ((_, load),) = VideoSequence("v", None, tmp_path / "v.mp4", PixelSpec(48, 32)).frames()
    with av.open(str(tmp_path / "v.mp4")) as container:
        assert np.array_equal(load(), next(container.decode(video=0)).to_ndarray(format="rgb24"))


def test_fingerprints_change_for_rates_alone(video: Path) -> None:
    """Stores made before frames were held keep what is not thinned to a rate."""
    content = file_digest(video)
    for stride in (1, 6):
        inspection = VideoSequence("v", None, video, PIXELS, stride=stride).inspect()
        assert inspection.content == digest(content, repr((stride, None)).encode())
    assert VideoSequence("v", None, video, PIXELS, fps=4.0).inspect().content != digest(content, b"(1, 4.0)")


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(WHOLE)),
    at=st.floats(0, 1),
    how=st.sampled_from(["zero", "cut", "repeat"]),
    data=st.data(),
)
def test_whatever_is_wrong_is_one_failure(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, name: str, at: float, how: str, data: st.DataObject
) -> None:
    content = bytearray((whole / name).read_bytes())
    start = int(at * len(content))
    part = slice(start, start + data.draw(st.sampled_from([1, 50, 400, 2000])))
    content[part] = {"zero": bytes(len(content[part])), "cut": b"", "repeat": 2 * content[part]}[how]
    path = tmp_path_factory.mktemp("damaged") / name
    path.write_bytes(content)
    sequence = VideoSequence("v", None, path, PIXELS)
    numbers = []
    failed = False
    try:
        for number, load in sequence.frames():
            numbers.append(number)
            assert load().shape == (32, 32, 3)
    except SourceError:
        failed = True
    assert all(a < b for a, b in itertools.pairwise(numbers))
    assert failed or numbers == list(range(len(numbers)))
    assert sequence.expected >= 0
