import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from halfstep.data.base import SourceError
from halfstep.data.pictures import fit, load_fitted, load_picture
from halfstep.spec import PixelSpec


def gradient(width: int = 12, height: int = 8) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 20, y * 30, (x + y) * 10], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = Image.fromarray(gradient())
    # How a camera would have stored the upright picture; by the EXIF standard, 6 is shown turned 90 degrees clockwise.
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "p.png", exif=exif)
    assert np.array_equal(np.asarray(load_picture(tmp_path / "p.png")), gradient())


def test_gray_palette_and_cmyk_become_rgb(tmp_path: Path) -> None:
    gray = gradient()[..., 0]
    Image.fromarray(gray).save(tmp_path / "gray.png")
    assert np.array_equal(np.asarray(load_picture(tmp_path / "gray.png")), np.repeat(gray[..., None], 3, axis=2))
    palette = Image.fromarray(gradient()).convert("P")
    palette.save(tmp_path / "palette.png")
    assert np.array_equal(np.asarray(load_picture(tmp_path / "palette.png")), np.asarray(palette.convert("RGB")))
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    assert np.abs(np.asarray(load_picture(tmp_path / "cmyk.jpg")).astype(int) - (0, 255, 255)).max() <= 2


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    rgba = np.dstack([gradient(), np.zeros((8, 12), np.uint8)])
    rgba[:, :6, 3] = 255
    Image.fromarray(rgba).save(tmp_path / "alpha.png")
    loaded = np.asarray(load_picture(tmp_path / "alpha.png"))
    assert np.array_equal(loaded[:, :6], gradient()[:, :6])
    assert (loaded[:, 6:] == 255).all()


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    deep = (gradient()[..., 0].astype(np.uint16)) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(deep).save(tmp_path / "deep.tif")
    for name in ("deep.png", "deep.tif"):
        assert np.array_equal(np.asarray(load_picture(tmp_path / name))[..., 0], gradient()[..., 0])


def test_4_3_crop_is_centered_and_pads_with_black() -> None:
    wide = np.zeros((60, 120, 3), np.uint8)
    wide[:, 20:100] = 200  # the center 4:3 is exactly the bright part
    assert (fit(Image.fromarray(wide), PixelSpec(32, 32, "4:3")) == 200).all()
    tall = np.full((90, 60, 3), 200, np.uint8)
    assert (fit(Image.fromarray(tall), PixelSpec(32, 32, "4:3")) == 200).all()
    narrow = np.full((60, 70, 3), 200, np.uint8)  # wider than high, but narrower than 4:3
    fitted = fit(Image.fromarray(narrow), PixelSpec(80, 60, "4:3"))
    assert (fitted[:, :5] == 0).all()
    assert (fitted[:, -5:] == 0).all()
    assert (fitted[:, 6:74] == 200).all()


def test_4_3_resize_is_pillows_bilinear_on_each_axis() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    expected = picture.resize((28, 28), Image.Resampling.BILINEAR)
    assert np.array_equal(fit(picture, PixelSpec(28, 28, "4:3")), np.asarray(expected))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 8), st.integers(1, 8), st.sampled_from(["fill", "4:3"]))
def test_any_picture_fits_any_size(width: int, height: int, columns: int, rows: int, crop) -> None:
    picture = Image.new("RGB", (width, height), (10, 20, 30))
    fitted = fit(picture, PixelSpec(8 * columns, 8 * rows, crop))
    assert fitted.shape == (8 * rows, 8 * columns, 3)
    if crop == "fill":
        assert (fitted == (10, 20, 30)).all()


@pytest.mark.parametrize(
    ("data", "named"),
    [(b"", "an empty file"), (b"hello, I am not a picture", "not a picture that Pillow can read")],
)
def test_what_is_no_picture(tmp_path: Path, data: bytes, named: str) -> None:
    (tmp_path / "p.jpg").write_bytes(data)
    with pytest.raises(SourceError, match=named):
        load_fitted(tmp_path / "p.jpg", PixelSpec(8, 8))


def test_a_truncated_picture(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "p.jpg")
    data = (tmp_path / "p.jpg").read_bytes()
    (tmp_path / "p.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(SourceError, match=r"p.jpg: cannot be read \(.*truncated"):
        load_fitted(tmp_path / "p.jpg", PixelSpec(8, 8))


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).random((8, 8), np.float32)).save(tmp_path / "p.tif")
    with pytest.raises(SourceError, match="floating-point pixels of unknown range"):
        load_fitted(tmp_path / "p.tif", PixelSpec(8, 8))


@pytest.mark.parametrize("kind", [np.int8, np.int16, np.int32, np.uint32])
@pytest.mark.parametrize("order", ["<", ">"])
def test_integers_of_unknown_range_are_refused(tmp_path: Path, kind: type, order: str) -> None:
    tifffile = pytest.importorskip("tifffile")
    values = np.arange(64).reshape(8, 8).astype(np.dtype(kind).newbyteorder(order))
    tifffile.imwrite(tmp_path / "p.tif", values, byteorder=order)
    with pytest.raises(SourceError, match=r"integers of unknown range; convert .* to unsigned 8 or 16|not a picture"):
        load_fitted(tmp_path / "p.tif", PixelSpec(8, 8))


def test_inverted_and_twelve_bits_are_scaled(tmp_path: Path) -> None:
    gray = gradient()[..., 0]
    options = {"compression": None, "tiffinfo": {262: 0}}
    Image.fromarray((255 - gray).astype(np.uint16) * 257).save(tmp_path / "white_is_zero.tif", **options)
    assert np.array_equal(np.asarray(load_picture(tmp_path / "white_is_zero.tif"))[..., 0], gray)
    deep = gray.astype(np.uint16) * 16  # two samples of 12 bits in three bytes
    first, second = deep.reshape(8, 6, 2).transpose(2, 0, 1)
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=-1).astype(np.uint8)
    tags = {256: 12, 257: 8, 258: 12, 259: 1, 262: 1, 273: 122, 277: 1, 278: 8, 279: packed.nbytes}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4)
    (tmp_path / "12.tif").write_bytes(head + packed.tobytes())
    loaded = np.asarray(load_picture(tmp_path / "12.tif"))[..., 0]
    assert np.array_equal(loaded, np.round(deep * (255 / 4095)).astype(np.uint8))


def wrong_exif(orientation: int) -> bytes:
    """EXIF in which the width is text, so that Pillow cannot write it again."""
    entries = struct.pack("<HHI4s", 0x100, 2, 3, b"60\0\0") + struct.pack("<HHIHH", 0x112, 3, 1, orientation, 0)
    return b"Exif\0\0II*\0\x08\0\0\0\x02\0" + entries + bytes(4)


def test_exif_that_cannot_be_rewritten_turns_the_picture_all_the_same(tmp_path: Path) -> None:
    stored = Image.fromarray(gradient()).transpose(Image.Transpose.ROTATE_90)
    for name in ("p.png", "p.webp"):
        stored.save(tmp_path / name, exif=wrong_exif(6), lossless=True)
        assert np.array_equal(np.asarray(load_picture(tmp_path / name)), gradient())
        stored.save(tmp_path / name, exif=b"Exif\0\0garbage", lossless=True)
        with pytest.raises(SourceError, match=rf"{name}: cannot be read"):
            load_picture(tmp_path / name)


def test_texts_and_profiles_of_a_png_may_be_large(tmp_path: Path) -> None:
    picture = Image.fromarray(gradient())
    texts = PngImagePlugin.PngInfo()
    texts.add_text("workflow", "{}" * (1 << 20), zip=True)
    texts.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="3"/>')
    picture.save(tmp_path / "text.png", pnginfo=texts)
    picture.save(tmp_path / "profile.png", icc_profile=bytes(2 << 20))
    many = PngImagePlugin.PngInfo()
    for _ in range(70):
        many.add_text("note", "a" * (1 << 20), zip=True)
    picture.save(tmp_path / "many.png", pnginfo=many)
    turned = picture.transpose(Image.Transpose.ROTATE_180)
    with ThreadPoolExecutor(4) as pool:  # no limit of the process is changed meanwhile
        for name, expected in (("text.png", turned), ("profile.png", picture), ("many.png", picture)):
            for loaded in pool.map(load_picture, [tmp_path / name] * 8):
                assert np.array_equal(np.asarray(loaded), np.asarray(expected))
    assert PngImagePlugin.MAX_TEXT_CHUNK == 1 << 20


def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    Image.new("1", (20000, 20000)).save(tmp_path / "p.png")
    with pytest.raises(SourceError, match="too large to open safely"):
        load_fitted(tmp_path / "p.png", PixelSpec(8, 8))
