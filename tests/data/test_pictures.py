from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

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


def test_grey_palette_and_cmyk_become_rgb(tmp_path: Path) -> None:
    grey = gradient()[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(np.asarray(load_picture(tmp_path / "grey.png")), np.repeat(grey[..., None], 3, axis=2))
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


def test_4_3_crop_is_centred_and_pads_with_black() -> None:
    wide = np.zeros((60, 120, 3), np.uint8)
    wide[:, 20:100] = 200  # the centre 4:3 is exactly the bright part
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


def test_a_huge_picture_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    Image.new("1", (20000, 20000)).save(tmp_path / "p.png")
    with pytest.raises(SourceError, match="too large to open safely"):
        load_fitted(tmp_path / "p.png", PixelSpec(8, 8))
