"""Pictures: any file Pillow opens, to RGB of the wanted size; folders of them as sequences of one frame."""

from __future__ import annotations

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


def load_picture(path: Path) -> Image.Image:
    """Decode a picture to RGB, 8 bits: EXIF orientation applied, transparency laid on white, 16 bits scaled down.

    Raises SourceError for anything that is not a whole picture of at most Pillow's safe size (178 million pixels).
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
        raise SourceError(f"{path}: damaged ({str(error).splitlines()[0] or type(error).__name__})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        # convert("RGB") would clip these to 255. Integers from files are 16 bits; floats are taken as they are.
        values = np.asarray(image, dtype=np.float32)
        if image.mode != "F":
            values = values / 257.0
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
    scale = max(target[0] / image.width, target[1] / image.height)
    size = (max(target[0], round(image.width * scale)), max(target[1], round(image.height * scale)))
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - target[0]) // 2, (size[1] - target[1]) // 2
    return image.crop((left, top, left + target[0], top + target[1]))


def load_fitted(path: Path, pixels: PixelSpec) -> Array:
    """The picture at `path` as uint8 [height, width, 3]."""
    return fit(load_picture(path), pixels)


@dataclass(frozen=True, slots=True)
class PictureSequence:
    """One picture as a sequence of one frame."""

    key: str
    label: str | None
    source: Path
    pixels: PixelSpec
    expected: int = 1

    def inspect(self) -> Inspection:
        content = file_digest(self.source)
        return Inspection(content, (0,), (content,))

    def frames(self, numbers: Ordered[int]) -> Iterator[tuple[int, Callable[[], Array]]]:
        for number in numbers:
            yield number, partial(load_fitted, self.source, self.pixels)
