"""Pictures and videos as files, uint8 [H, W, 3] and [T, H, W, 3], each written whole or not at all."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from halfstep.files import replacing, write_durably

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

_FRAME_GAP, _SHEET_GAP = 1, 4  # pixels between the frames of a strip, and between samples


def write_picture(path: Path, pixels: Pixels) -> None:
    """PNG of a picture [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    write_durably(path, buffer.getvalue())


def write_gif(path: Path, frames: Pixels, fps: int) -> None:
    """Animation without end."""
    pictures = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0)
    write_durably(path, buffer.getvalue())


def write_video(path: Path, frames: Iterable[Pixels], fps: int) -> None:
    """H.264 in an MP4."""
    write_durably(path, encode_video(frames, fps))


def encode_video(frames: Iterable[Pixels], fps: int) -> bytes:
    """The bytes of an MP4 with H.264 of frames [H, W, 3], which are all of one size."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "16"})
        stream.pix_fmt = "yuv420p"
        for number, frame in enumerate(frames):
            if number == 0:
                stream.height, stream.width = (side - side % 2 for side in frame.shape[:2])  # yuv420p halves them
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[: stream.height, : stream.width]), "rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return buffer.getvalue()


def write_npy(path: Path, values: np.ndarray[Any, Any]) -> None:
    """An array as it is."""
    buffer = io.BytesIO()
    np.save(buffer, values)
    write_durably(path, buffer.getvalue())


def write_npz(path: Path, arrays: Iterable[Pixels], shape: tuple[int, ...]) -> None:
    """An uncompressed `.npz` with one array `arr_0` of `shape`, uint8, whose rows come one after the other: what tools
    for FID read. Rows are not held in memory."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with (
        replacing(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as file,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        for array in arrays:
            file.write(np.ascontiguousarray(array).tobytes())


def strip(frames: Pixels) -> Pixels:
    """Frames [T, H, W, 3] side by side on white."""
    return grid(list(frames), len(frames), _FRAME_GAP)


def contact_sheet(samples: list[Pixels]) -> Pixels:
    """Pictures in a square; strips one below the other."""
    wide = samples[0].shape[1] > 3 * samples[0].shape[0]
    return grid(samples, 1 if wide else int(np.ceil(np.sqrt(len(samples)))), _SHEET_GAP)


def grid(pictures: list[Pixels], columns: int, gap: int) -> Pixels:
    """Pictures of one size in rows of `columns`, on white."""
    height, width = (size + gap for size in pictures[0].shape[:2])
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * height - gap, columns * width - gap, 3), 255, np.uint8)
    for number, picture in enumerate(pictures):
        top, left = number // columns * height, number % columns * width
        sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return sheet
