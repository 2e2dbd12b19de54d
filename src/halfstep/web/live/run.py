"""The ways a live world goes: to browsers, or to a film."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from halfstep.data.outputs import write_video
from halfstep.data.videos import VideoSequence
from halfstep.errors import InputError
from halfstep.live import FrameSpec, LiveEngine
from halfstep.live.frames import Picture
from halfstep.progress import SILENT, Progress
from halfstep.spec import PixelSpec
from halfstep.web.live.app import LiveApp
from halfstep.web.live.stage import Stage
from halfstep.web.server import serve

RATE = 12  # frames a second of films, and of videos that come in


def serve_live(
    engine: LiveEngine,
    spec: FrameSpec,
    *,
    title: str,
    source: str,
    video: Path | None,
    host: str,
    port: int,
    listening: Callable[[str], None],
) -> dict[str, Any]:
    """Until Ctrl-C; returns the engine's facts. `source`: keys, camera, video or none. Raises InputError when the video
    cannot be read, or the address cannot be had."""
    stage = Stage(engine, always=source == "none")
    app = LiveApp(stage, spec, title=title, source=source)
    ended = threading.Event()
    stage.start()
    feeder = None
    try:
        if video is not None:
            feeder = threading.Thread(target=_feed, args=(video, spec, stage, ended), name="video", daemon=True)
            feeder.start()
        serve(app.asgi, host=host, port=port, listening=listening)
    finally:
        ended.set()
        stage.end()
        if feeder is not None:
            feeder.join()
    return {**stage.facts(), "refused": app.refused}


def write_live(
    engine: LiveEngine, spec: FrameSpec, output: Path, *, frames: int, video: Path | None, progress: Progress = SILENT
) -> dict[str, Any]:
    """A film of `frames` frames, or of as many as the video has; returns the engine's facts."""
    given: Iterator[Picture | None] = iter([None] * frames) if video is None else _pictures(video, spec)
    progress.start(frames)

    def made() -> Iterator[Picture]:
        yield engine.reset().picture
        for number, picture in enumerate(given):
            if number == frames:
                return
            frame = engine.step(picture)
            if frame.problem is not None:
                progress.note(frame.problem)
            progress.advance()
            yield frame.picture

    write_video(output, made(), RATE)
    engine.close()
    return engine.facts()


def _pictures(video: Path, spec: FrameSpec) -> Iterator[Picture]:
    if not video.is_file():
        raise InputError(f"--video: {video}: no such file")
    sequence = VideoSequence(video.name, None, video, PixelSpec(spec.width, spec.height), fps=RATE)
    return (load() for _, load in sequence.frames())


def _feed(video: Path, spec: FrameSpec, stage: Stage, ended: threading.Event) -> None:
    """The video again and again, at its own pace."""
    while not ended.is_set():
        due = time.monotonic()
        for picture in _pictures(video, spec):
            stage.see(picture)
            due += 1 / RATE
            if ended.wait(max(0.0, due - time.monotonic())):
                return
