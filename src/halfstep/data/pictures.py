"""Pictures: any file Pillow opens, to RGB of the wanted size; folders of them as sequences of one frame."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Ordered
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from halfstep.data.base import Array, Inspection, SourceError, file_digest
from halfstep.spec import PixelSpec

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2"})


_LONGEST = 16  # times the target's shape; what lies beyond is far outside the part that is kept


def load_picture(path: Path) -> Image.Image:
    """Decode a picture to RGB, 8 bits: EXIF orientation applied, transparency laid on white, 16 bits scaled down.

    Of an animation, the first frame. Raises SourceError for anything that is not a whole picture of at most Pillow's
    safe size (178 million pixels).
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns from half of its limit on and raises beyond it; only the error concerns us.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        size = path.stat().st_size
        raise SourceError(f"{path}: {'an empty file' if size == 0 else 'not a picture that Pillow can read'}") from None
    except Image.DecompressionBombError as error:
        raise SourceError(f"{path}: too large to open safely ({error})") from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise SourceError(f"{path}: cannot be read ({' '.join(str(error).split()) or type(error).__name__})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels of unknown range; convert the picture to 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits, which convert("RGB") would clip to 255
        values = np.asarray(image, dtype=np.float32) / 257
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


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
    # Dhariwal and Nichol's (ADM) recipe: halve by boxes while twice too large, then bicubic, then cut the centre.
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
        return f"{self.prefix}/{self.name}" if self.prefix else self.name

    @property
    def label(self) -> str | None:
        return class_folder(self.name)

    @property
    def source(self) -> Path:
        return self.root / self.name

    @property
    def expected(self) -> int:
        return 1

    def inspect(self) -> Inspection:
        content = file_digest(self.source)
        return Inspection(content, (0,), (content,))

    def frames(self, numbers: Ordered[int]) -> Iterator[tuple[int, Callable[[], Array]]]:
        for number in numbers:
            yield number, partial(load_fitted, self.source, self.pixels)
