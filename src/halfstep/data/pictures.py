"""Pictures: any file Pillow opens, to RGB of the wanted size; folders of them as sequences of one frame."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Ordered
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from halfstep.data.base import Array, Inspection, SourceError, file_digest, one_line, reading
from halfstep.data.keys import name_to_key
from halfstep.spec import PixelSpec

# Pillow knows these by name, but does not decode them itself.
_NOT_DECODED = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"})

# More than one frame or page in a file. Not those whose further pictures are previews, layers or other sizes.
_ANIMATED = frozenset({"AVIF", "DCX", "FLI", "GIF", "PNG", "TIFF", "WEBP"})


def _extensions(formats: frozenset[str]) -> frozenset[str]:
    Image.preinit()  # the common formats first, as Image.open does: Pillow tries them in this order
    return frozenset(extension for extension, name in Image.registered_extensions().items() if name in formats)


ANIMATED_EXTENSIONS = _extensions(_ANIMATED)
EXTENSIONS = _extensions(frozenset(Image.OPEN) - _NOT_DECODED | {"MPO"})  # which is a JPEG with more behind it

# How to set a picture upright, by the number that EXIF gives its orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_TEXTS = frozenset({b"tEXt", b"zTXt", b"iTXt", b"iCCP"})
_PNG_ORIENTATIONS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # texts that may say how to turn it

_LONGEST = 16  # times the target's shape; what lies beyond is far outside the part that is kept


def load_picture(path: Path) -> Image.Image:
    """Decode a picture to RGB, 8 bits: EXIF orientation applied, transparency laid on white, 12 and 16 bits scaled
    down.

    Of an animation, the first frame. Raises SourceError for anything that is not a whole picture of at most Pillow's
    safe size (178 million pixels).
    """
    with opened(path) as image:
        return to_rgb(image)


@contextmanager
def opened(path: Path, *, load: bool = True) -> Iterator[Image.Image]:
    """The picture at `path`, by default with its pixels loaded. What fails, also while it is open, is a SourceError."""
    with reading(path):
        try:
            with _open(path, load) as image:
                yield image
        except SourceError:
            raise
        except UnidentifiedImageError:
            what = "an empty file" if path.stat().st_size == 0 else "not a picture that Pillow can read"
            raise SourceError(f"{path}: {what}") from None
        except Image.DecompressionBombError as error:
            raise SourceError(f"{path}: too large to open safely ({error})") from None
        except (OSError, ValueError, SyntaxError, EOFError) as error:
            raise SourceError(f"{path}: cannot be read ({one_line(error)})") from error


def _open(path: Path, load: bool) -> Image.Image:
    """Pillow refuses a PNG with more text or a larger color profile than a limit that it has for the whole process.
    They say nothing about the pixels: such a PNG is read without them."""
    try:
        return _open_file(path, load)
    except ValueError:
        data = path.read_bytes()
        if not data.startswith(_PNG_SIGNATURE):
            raise
    return _open_file(io.BytesIO(_without_texts(data)), load)


def _open_file(file: Path | io.BytesIO, load: bool) -> Image.Image:
    with warnings.catch_warnings():
        # Pillow warns from half of its limit on and raises beyond it; only the error concerns us.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(file)
    if load:
        try:
            image.load()
        except BaseException:
            image.close()
            raise
    return image


def _without_texts(data: bytes) -> bytes:
    kept, start = [_PNG_SIGNATURE], len(_PNG_SIGNATURE)
    while start < len(data):
        stop = start + 12 + int.from_bytes(data[start : start + 4])
        text = data[start + 4 : start + 8] in _PNG_TEXTS
        if not text or data.startswith(_PNG_ORIENTATIONS, start + 8):
            kept.append(data[start:stop])
        start = stop
    return b"".join(kept)


def frames_in(path: Path) -> int:
    """The frames of an animation or the pages of a document; 1 for every other picture, and for what cannot be read,
    which reading it tells."""
    if path.suffix.lower() not in ANIMATED_EXTENSIONS:
        return 1
    try:
        with opened(path, load=False) as image:
            return getattr(image, "n_frames", 1) if image.format in _ANIMATED else 1
    except SourceError:
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """A loaded picture upright, in RGB. Raises ValueError where the range of its numbers is not known."""
    if image.mode == "F":
        raise ValueError("floating-point pixels of unknown range; convert the picture to 8 or 16 bits")
    tags = getattr(image, "tag_v2", {})
    white = _white(image, tags)
    inverted = white > 255 and tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    if turn is not None:
        image = image.transpose(turn)
    if white > 255:  # which convert("RGB") would clip to 255
        values = np.asarray(image, dtype=np.float32) / (white / 255)
        values = values.round().clip(0, 255).astype(np.uint8)
        return Image.fromarray(255 - values if inverted else values).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _white(image: Image.Image, tags: Mapping[int, Any]) -> int:
    """The number that stands for white. Pillow gives 12 and 16 bits as they are, but not what is signed or longer."""
    signed = 2 in tags.get(TiffImagePlugin.SAMPLEFORMAT, ())
    if not image.mode.startswith("I") and not signed:
        return 255
    deep = image.format in ("PNG", "PPM") or (image.format in ("TIFF", "JPEG2000") and image.mode != "I")
    if signed or not deep:
        raise ValueError("signed or 32-bit integers of unknown range; convert the picture to unsigned 8 or 16 bits")
    bits: int = tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
    return (1 << bits) - 1


def fit(image: Image.Image, pixels: PixelSpec) -> Array:
    """Crop and resize to uint8 [height, width, 3] as `pixels.crop` says. See PixelSpec."""
    return np.asarray(_fit_4_3(image, pixels) if pixels.crop == "4:3" else _fit_fill(image, pixels))


def _fit_4_3(image: Image.Image, pixels: PixelSpec) -> Image.Image:
    width, height = image.size
    cut = (int(height * 4 / 3), height) if width > height else (width, int(width / (4 / 3)))
    # Centred as torchvision does it: black on both sides where the picture is too small, then a rounded offset.
    left, top = (
        round((have - want) / 2) if have >= want else -((want - have) // 2)
        for have, want in zip((width, height), cut, strict=True)
    )
    cropped = image.crop((left, top, left + cut[0], top + cut[1]))
    return cropped.resize((pixels.width, pixels.height), Image.Resampling.BILINEAR)


def _fit_fill(image: Image.Image, pixels: PixelSpec) -> Image.Image:
    target = (pixels.width, pixels.height)
    # Dhariwal and Nichol's (ADM) recipe: halve by boxes while twice too large, then bicubic, then cut the center.
    while image.width >= 2 * target[0] and image.height >= 2 * target[1]:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    image = _cut_extremes(image, target)
    scale = max(target[0] / image.width, target[1] / image.height)
    size = (max(target[0], round(image.width * scale)), max(target[1], round(image.height * scale)))
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - target[0]) // 2, (size[1] - target[1]) // 2
    return image.crop((left, top, left + target[0], top + target[1]))


def _cut_extremes(image: Image.Image, target: tuple[int, int]) -> Image.Image:
    """The middle of a picture that is far longer than the target's shape: scaled as a whole, a strip of one pixel by
    ten thousand would take gigabytes of which nearly all is cut off again."""
    longest = (
        math.ceil(_LONGEST * image.height * target[0] / target[1]),
        math.ceil(_LONGEST * image.width * target[1] / target[0]),
    )
    if image.width <= longest[0] and image.height <= longest[1]:
        return image
    width, height = min(image.width, longest[0]), min(image.height, longest[1])
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def load_fitted(path: Path, pixels: PixelSpec) -> Array:
    """The picture at `path` as uint8 [height, width, 3]. Raises SourceError when it cannot be read or fitted."""
    picture = load_picture(path)
    try:
        return fit(picture, pixels)
    except (MemoryError, ValueError) as error:
        size = f"{picture.width}x{picture.height}"
        raise SourceError(f"{path}: {size} pixels cannot be fitted to {pixels} ({error})") from error


def class_folder(name: str) -> str | None:
    """The folder that a file lies in, below the source's root: its class."""
    folder = name.rpartition("/")[0]
    return folder.rpartition("/")[2] or None


@dataclass(frozen=True, slots=True)
class PictureSequence:
    """One picture, `name` below `root`, as a sequence of one frame. Small, because there may be millions."""

    root: Path
    name: str
    prefix: str
    pixels: PixelSpec

    @property
    def key(self) -> str:
        name = name_to_key(self.name)
        return f"{self.prefix}/{name}" if self.prefix else name

    @property
    def label(self) -> str | None:
        return class_folder(name_to_key(self.name))

    @property
    def source(self) -> Path:
        return self.root / self.name

    @property
    def expected(self) -> int:
        return 1

    def files(self) -> list[Path]:
        return [self.source]

    def inspect(self) -> Inspection:
        content = file_digest(self.source)
        return Inspection(content, (0,), (content,), unused=frames_in(self.source) - 1)

    def frames(self, numbers: Ordered[int]) -> Iterator[tuple[int, Callable[[], Array]]]:
        for number in numbers:
            yield number, partial(load_fitted, self.source, self.pixels)
