"""A video through a network, frame by frame, into another video that shows what was marked.

python video_through_network.py marked.mp4 [--video FILE]    (without a file, a moving disc)

Any network goes in the place of `edges`.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import av
import numpy as np
import torch

from halfstep.stream import ModelSpec, Preparation, Result, StreamEngine, StreamOptions
from halfstep.stream.sources.files import FilesSource

SIZE = (96, 128)  # height, width of what the network sees


def edges() -> torch.nn.Module:
    """Marks where brightness changes: the larger of two Sobel filters over all colors, less a threshold."""

    class Edges(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
            filters = torch.stack([across, -across, across.T, -across.T])
            self.weight = torch.nn.Parameter(filters[:, None].expand(-1, 3, -1, -1).contiguous() / 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            bordered = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="replicate")
            return torch.nn.functional.conv2d(bordered, self.weight).amax(dim=1, keepdim=True) - 0.5

    return Edges()


def write_disc(path: Path, frames: int = 24) -> None:
    """A video of a disc that crosses the picture."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    write_video(
        path,
        (
            np.where((np.hypot(y - 48, x - 5 * number) < 20)[..., None], [230, 120, 40], [30, 40, 60]).astype(np.uint8)
            for number in range(frames)
        ),
    )


def write_video(path: Path, frames: Iterable[np.ndarray]) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=12)
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = *SIZE, "yuv420p", 2_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())


def main(output: Path, video: Path | None) -> None:
    if video is None:
        video = output.with_name("disc.mp4")
        write_disc(video)
    marked: list[np.ndarray] = []

    def mark(result: Result) -> None:
        picture = result.event.data.transpose(1, 2, 0).copy()
        picture[result.mask[0]] = (255, 0, 0)
        marked.append(picture)

    options = StreamOptions(
        ModelSpec("video_through_network:edges"), preparation=Preparation(channels=3, size=SIZE, scale=255.0)
    )
    with FilesSource([video], channels=3, size=SIZE) as source:
        report = StreamEngine(source, options, consumers=[mark]).run()
    write_video(output, marked)
    print(f"{report.balance['out']} frames in {report.policy}, {report.events_per_second:.0f} a second: {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--video", type=Path)
    main(**vars(parser.parse_args()))
