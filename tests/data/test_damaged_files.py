"""Files with bytes changed or cut off, of every format that can be written here: a reader gives an array or an error
that names the file."""

import io
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from halfstep.data.animations import AnimationSequence
from halfstep.data.base import SourceError, reading
from halfstep.data.guarded import Guarded
from halfstep.data.pictures import PictureSequence, frames_in, load_fitted
from halfstep.data.pt_tree import PtSequence, load_latent
from halfstep.data.walks import WalkSequence
from halfstep.errors import InputError
from halfstep.spec import PixelSpec

PIXELS = PixelSpec(16, 16)
RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8))
DEEP = Image.fromarray((np.arange(480).reshape(24, 20) * 130).astype(np.uint16))


def exif() -> Image.Exif:
    made = Image.Exif()
    made[0x112], made[0x10F], made[0x11A] = 6, "maker", 72.0
    made.get_ifd(0x8769)[0x829A] = 0.01
    return made


def saved(image: Image.Image, name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def animated(name: str) -> bytes:
    frames = [Image.new("RGB", (12, 10), (40 * n, 0, 0)) for n in range(4)]
    return saved(frames[0], name, save_all=True, append_images=frames[1:], duration=50)


PICTURES = {
    "exif.jpg": saved(RGB, "JPEG", exif=exif()),
    "progressive.jfif": saved(RGB, "JPEG", progressive=True),
    "exif.png": saved(RGB, "PNG", exif=exif(), icc_profile=b"profile"),
    "deep.png": saved(DEEP, "PNG"),
    "palette.png": saved(RGB.convert("P"), "PNG", transparency=3),
    "moving.png": animated("PNG"),
    "exif.webp": saved(RGB, "WEBP", exif=exif()),
    "moving.webp": animated("WEBP"),
    "moving.gif": animated("GIF"),
    "exif.tif": saved(RGB, "TIFF", exif=exif()),
    "lzw.tiff": saved(RGB, "TIFF", compression="tiff_lzw"),
    "deep.tif": saved(DEEP, "TIFF"),
    "pages.tif": saved(RGB, "TIFF", save_all=True, append_images=[RGB]),
    "a.avif": saved(RGB, "AVIF"),
    "a.bmp": saved(RGB, "BMP"),
    "a.dib": saved(RGB, "DIB"),
    "a.ppm": saved(RGB, "PPM"),
    "deep.pgm": saved(DEEP, "PPM"),
    "a.jp2": saved(RGB, "JPEG2000"),
    "a.tga": saved(RGB, "TGA", compression="tga_rle"),
    "a.ico": saved(RGB, "ICO"),
    "a.icns": saved(RGB.resize((16, 16)), "ICNS"),
    "a.dds": saved(RGB, "DDS"),
    "a.pcx": saved(RGB, "PCX"),
    "a.qoi": saved(RGB, "QOI"),
    "a.sgi": saved(RGB, "SGI"),
    "a.msp": saved(RGB.convert("1"), "MSP"),
    "a.xbm": saved(RGB.convert("1"), "XBM"),
    "a.blp": saved(RGB.convert("P"), "BLP"),
}


def mutations(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """`data` with a few bytes changed, mostly near its head, and sometimes cut off."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        changed = bytearray(data)
        reach = min(len(data), 200) if rng.random() < 0.7 else len(data)
        for place in rng.integers(reach, size=rng.choice((1, 1, 2, 4))):
            changed[place] = rng.choice((0, 1, 2, 127, 128, 255, rng.integers(256)))
        yield bytes(changed[: rng.integers(1, len(data))] if rng.random() < 0.15 else changed)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PICTURES)
def test_damaged_pictures(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(PICTURES[name])
    assert load_fitted(path, PIXELS).shape == (16, 16, 3)
    refused = 0
    for data in mutations(PICTURES[name], 120 if len(PICTURES[name]) < 20_000 else 10, seed=len(name)):
        path.write_bytes(data)
        assert frames_in(path) >= 1
        try:
            assert load_fitted(path, PIXELS).shape == (16, 16, 3)
            for _, load in AnimationSequence("k", None, path, PIXELS).frames():
                assert load().shape == (16, 16, 3)
        except SourceError as error:
            assert str(path) in str(error)
            assert "\n" not in str(error)
            refused += 1
    assert refused


LATENT = torch.arange(24.0).reshape(4, 3, 2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("old", [False, True])
def test_damaged_latents(tmp_path: Path, old: bool) -> None:
    path = tmp_path / "0.pt"
    content = {"mean": LATENT, "std": LATENT.numpy() + 1, "note": [1, "a"]}
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    whole, refused = path.read_bytes(), 0
    for data in mutations(whole, 600, seed=1):
        path.write_bytes(data)
        try:
            latent, logvar = load_latent(path)
            assert (latent.ndim, latent.dtype) == (3, np.float32)
            assert logvar is None or logvar.dtype == np.float32
        except SourceError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "content",
    [
        LATENT.to_sparse(),
        LATENT.to(torch.complex64),
        LATENT.to(torch.int8),
        LATENT.numpy().astype(np.int32),
        torch.empty(4, 3, 2, device="meta"),
        torch.empty(0),
        {"latent": {"latent": LATENT}},
        {"mean": LATENT, "std": None},
        {1: LATENT, "a": LATENT},
        [],
        None,
        b"bytes",
    ],
)
def test_foreign_contents_of_a_pt_file(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "0.pt")
    with pytest.raises(SourceError, match=r"0\.pt"):
        load_latent(tmp_path / "0.pt")


@pytest.mark.filterwarnings("ignore")
def test_damaged_poses_and_their_walk(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.jpg")
    whole = pickle.dumps({"position": np.zeros((4, 2)), "yaw": np.zeros(4)})
    walk = Guarded(WalkSequence("t", None, tmp_path, PIXELS))
    refused = 0
    for data in mutations(whole, 800, seed=2):
        (tmp_path / "traj_data.pkl").write_bytes(data)
        try:
            assert walk.inspect().numbers in ((0,), ())
        except SourceError as error:
            assert str(tmp_path) in str(error)
            refused += 1
    assert refused


@pytest.mark.parametrize(
    "error", [KeyError("x"), ZeroDivisionError(), MemoryError(), RecursionError(), InputError("y: bad")]
)
def test_whatever_is_raised_names_its_source(error: Exception) -> None:
    with pytest.raises(SourceError) as caught, reading(Path("a/b.png")):
        raise error
    expected = "y: bad" if isinstance(error, InputError) else f"a/b.png: cannot be read ({type(error).__name__}"
    assert str(caught.value).startswith(expected)
    with pytest.raises(KeyboardInterrupt), reading(Path("a/b.png")):
        raise KeyboardInterrupt


def test_debug_shows_where_it_came_from(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def decode() -> None:
        raise IndexError("of a decoder")

    for debug in (False, True):
        monkeypatch.setenv("HALFSTEP_DEBUG", "1" if debug else "")
        with pytest.raises(SourceError), reading(Path("a.png")):
            decode()
        assert ("in decode" in capsys.readouterr().err) == debug


def test_a_folder_that_goes_away_is_named(tmp_path: Path) -> None:
    sequences = (
        WalkSequence("t", None, tmp_path / "away", PIXELS),
        PtSequence("t", None, tmp_path / "away", (1, 1, 1)),
        PictureSequence(tmp_path, "away", "", PIXELS),
    )
    for sequence in map(Guarded, sequences):
        assert sequence.expected in (0, 1)
        with pytest.raises(SourceError, match="away"):
            sequence.inspect()
        with pytest.raises(SourceError, match="away"):
            [load() for _, load in sequence.frames((0,))]
