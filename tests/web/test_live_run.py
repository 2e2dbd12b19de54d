"""`halfstep live` as a server and as a film: what ends it, and what it is given."""

from __future__ import annotations

import io
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from halfstep.data.base import SourceError
from halfstep.data.outputs import encode_video
from halfstep.data.videos import VideoSequence
from halfstep.errors import InputError
from halfstep.live import LiveEngine
from halfstep.shipped import shipped
from halfstep.web.live.run import RATE, serve_live, write_live
from tests.live.worlds import CPU, HEIGHT, WIDTH, Corridor, Mirror
from tests.support.cli import run_cli
from tests.support.networks import tiny_autoencoder, tiny_stable_diffusion


class Failing(Corridor):
    def predict(self, network: Any, state: Any, given: Any, steps: int) -> Any:
        raise RuntimeError("out of memory")


def serve(model: Any, source: str, video: Path | None = None) -> None:
    engine = LiveEngine(model, CPU, steps=1)
    options: dict[str, Any] = {"title": "it", "host": "127.0.0.1", "port": 0, "listening": lambda url: None}
    serve_live(engine, model.spec, source=source, video=video, **options)


def film(model: Any, output: Path, frames: int, video: Path | None = None) -> tuple[list[np.ndarray], dict[str, Any]]:
    facts = write_live(LiveEngine(model, CPU, steps=1), model.spec, output, frames=frames, video=video)
    with av.open(io.BytesIO(output.read_bytes())) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)], facts


class Interrupted(Corridor):
    """Ctrl-C comes while the fifth frame is made."""

    def predict(self, network: Any, state: Any, given: Any, steps: int) -> Any:
        if state.made == 4:
            signal.raise_signal(signal.SIGINT)
        return super().predict(network, state, given, steps)


def test_a_film_that_is_interrupted_has_the_frames_so_far(tmp_path: Path) -> None:
    frames, facts = film(Interrupted(), tmp_path / "film.mp4", 50)
    assert len(frames) == facts["frames"] == 1 + 5


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    path.write_bytes(encode_video((np.full((HEIGHT, WIDTH, 3), 220, np.uint8) for _ in range(6)), RATE))
    return path


def test_what_ends_the_frames_ends_the_server() -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        serve(Failing(), "none")


def test_a_video_that_is_none_is_not_served(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    for name, line in (("text.mp4", "damaged after 0 frames"), ("lost.mp4", "no such file")):
        with pytest.raises(InputError, match=line):
            serve(Mirror(), "video", tmp_path / name)


def test_a_film_has_the_frames_that_were_asked_for(tmp_path: Path) -> None:
    shown, facts = film(Corridor(), tmp_path / "film.mp4", 5)
    assert len(shown) == facts["frames"] == 5


@pytest.mark.parametrize(("frames", "expected"), [(4, 4), (100, 6)])
def test_a_film_of_a_video_has_its_pictures_alone(tmp_path: Path, clip: Path, frames: int, expected: int) -> None:
    shown, facts = film(Mirror(), tmp_path / "film.mp4", frames, clip)
    assert len(shown) == facts["frames"] == expected
    assert shown[0].mean() > 200  # not the grey from before the first picture


def test_of_a_damaged_video_what_can_be_read_is_a_film(
    tmp_path: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = VideoSequence.frames

    def damaged(self: VideoSequence) -> Iterator[tuple[int, Callable[[], Any]]]:
        for number, load in whole(self):
            if number == 3:
                raise SourceError("clip.mp4: damaged after 3 frames")
            yield number, load

    monkeypatch.setattr(VideoSequence, "frames", damaged)
    with pytest.warns(UserWarning, match="damaged after 3 frames; what could be read"):
        shown, _ = film(Mirror(), tmp_path / "film.mp4", 100, clip)
    assert len(shown) == 3


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--prompt", "a cat"), "--prompt: got a cat; it is for --pipeline"),
        (("--strength", "0.3"), "--strength: got 0.3; it is for --pipeline"),
        (("--size", "64x64"), "--size: got 64x64; it is for --pipeline"),
        (("--data-path", "store"), "--data-path: got store; it is for --ckpt"),
        (("--input", "none", "--output", "file", "-o", "lost/film.mp4"), "-o: lost/film.mp4: its folder is not there"),
        (("--input", "none", "--output", "file", "-o", "."), "-o: .: is a folder"),
    ],
)
def test_options_that_cannot_be_are_refused_at_once(options: tuple[str, ...], line: str, tmp_path: Path) -> None:
    found = run_cli("live", "--no-open", "--port", 0, *options, check=2, cwd=tmp_path)
    assert line in found.stderr and found.stderr.count("\n") == 1


def test_a_network_without_actions_is_not_walked_through() -> None:
    line = run_cli("live", "--ckpt", shipped("eqm"), "--input", "none", "--output", "mjpeg", check=2).stderr
    assert line.endswith("which takes no actions; expected a model of walks\n")


def test_a_pipeline_needs_pictures(tmp_path: Path) -> None:
    from diffusers import DDIMScheduler

    tiny_stable_diffusion(tiny_autoencoder((4, 8)), DDIMScheduler(clip_sample=False)).save_pretrained(tmp_path / "sd")
    options = ("--pipeline", tmp_path / "sd", "--size", "32x16", "--input", "none", "--output", "mjpeg", "--port", 0)
    assert "--input: got none" in run_cli("live", *options, check=2).stderr
