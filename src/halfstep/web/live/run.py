"""The ways a live world goes: to browsers, or to a film."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import islice, repeat
from pathlib import Path
from typing import Any

from halfstep.data.base import SourceError
from halfstep.data.outputs import write_video
from halfstep.data.videos import VideoSequence
from halfstep.engine import stop_request
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
            next(_pictures(video, spec))  # what is wrong with it is said before anything is served
            feeder = threading.Thread(target=_feed, args=(video, spec, stage, ended), name="video", daemon=True)
            feeder.start()
        serve(app.asgi, host=host, port=port, listening=listening, over=lambda: stage.failed)
    finally:
        ended.set()
        stage.end()
        if feeder is not None:
            feeder.join()
    return {**stage.facts(), "refused": app.refused}


def write_live(
    engine: LiveEngine, spec: FrameSpec, output: Path, *, frames: int, video: Path | None, progress: Progress = SILENT
) -> dict[str, Any]:
    """A film of `frames` frames, or of as many as the video has, or as there are when Ctrl-C or SIGTERM comes; returns
    the engine's facts. Raises InputError when the video cannot be read."""
    given: Iterator[Picture | None] = (
        repeat(None, frames - 1) if video is None else islice(_pictures(video, spec), frames)
    )
    progress.start(frames)
    written = 0

    def made() -> Iterator[Picture]:
        first = engine.reset().picture
        if video is None:  # else it is what there is before the first picture
            yield first
        for picture in given:
            frame = engine.step(picture)
            if frame.problem is not None:
                progress.note(frame.problem)
            yield frame.picture
            if stop:
                return

    def counted() -> Iterator[Picture]:
        nonlocal written
        for picture in made():
            written += 1
            progress.advance()
            yield picture

    with stop_request() as stop:
        write_video(output, counted(), RATE)
    engine.close()
    return {**engine.facts(), "frames": written}


def _pictures(video: Path, spec: FrameSpec) -> Iterator[Picture]:
    """Those that can be read; of damage there is a warning. Raises InputError when there are none."""
    if not video.is_file():
        raise InputError(f"--video: {video}: no such file")
    sequence = VideoSequence(video.name, None, video, PixelSpec(spec.width, spec.height), fps=RATE)
    count = 0
    try:
        for _, load in sequence.frames():
            yield load()
            count += 1
    except SourceError as error:
        if not count:
            raise
        warnings.warn(f"{error}; what could be read of it is shown", stacklevel=2)
    if not count:
        raise InputError(f"--video: {video}: has no pictures; expected a video")


def _feed(video: Path, spec: FrameSpec, stage: Stage, ended: threading.Event) -> None:
    """The video again and again, at its own pace."""
    try:
        while not ended.is_set():
            due = time.monotonic()
            for picture in _pictures(video, spec):
                stage.see(picture)
                due += 1 / RATE
                if ended.wait(max(0.0, due - time.monotonic())):
                    return
    except InputError as error:
        warnings.warn(f"{error}; nothing more of it is shown", stacklevel=1)
