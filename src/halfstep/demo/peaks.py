"""The streaming demo: simulated diffraction sent to the engine, a small trained network, and a picture of what it found
and missed."""

from __future__ import annotations

import threading
from dataclasses import asdict
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from halfstep.data.diffraction import Frame, diffraction_frame
from halfstep.files import replacing
from halfstep.progress import SILENT, Progress
from halfstep.stream import (
    Event,
    Identity,
    ModelSpec,
    Outputs,
    Preparation,
    Result,
    StreamEngine,
    StreamOptions,
)
from halfstep.stream.peaks import match_peaks
from halfstep.stream.send import send
from halfstep.stream.sinks.cxi import CxiSettings
from halfstep.stream.sources.acknowledged import AcknowledgedSource

PICTURE = "peaks.png"
WEIGHTS = "peaknet_small.safetensors"
_SIZE = (256, 256)
_SHOWN = 6
_RADIUS = 2.0  # pixels within which a found peak is a true one
_SEED = 90_000  # of no frame that the network was trained on


def stream_demo(output: Path, frames: int = 100, progress: Progress = SILENT) -> dict[str, Any]:
    """Send `frames` simulated frames to an engine on this machine, into the run's folder `output`, and draw some of
    them there. Returns the run's report with `found`: how many peaks there were, were found, and were found where none
    is."""
    simulated = [diffraction_frame(np.random.default_rng(_SEED + number), _SIZE) for number in range(frames)]
    results: dict[int, Result] = {}

    def keep(result: Result) -> None:
        results[result.event.identity.sequence] = result

    with (
        as_file(files("halfstep.demo") / WEIGHTS) as weights,
        AcknowledgedSource(["tcp://127.0.0.1:*"], bind=True, window=200) as source,
    ):
        options = StreamOptions(ModelSpec(str(weights)), batch_size=4, preparation=Preparation(size=_SIZE, no_data=0))
        engine = StreamEngine(
            source, options, Outputs(output, CxiSettings(min_peaks=5)), consumers=[keep], progress=progress
        )
        events = (
            Event(Identity("", "", str(number)), frame.values[None], {"timestamp": number / 120})
            for number, frame in enumerate(simulated)
        )
        producer = threading.Thread(target=send, args=(events, source.urls[0]), kwargs={"source": "simulation"})
        producer.start()
        report = engine.run()
    producer.join()
    counts = {"peaks": 0, "found": 0, "found_wrongly": 0}
    for number, result in results.items():
        places = result.peaks[:, 1:]
        true = match_peaks(places, simulated[number].peaks, _RADIUS)
        counts["peaks"] += len(simulated[number].peaks)
        counts["found"] += true
        counts["found_wrongly"] += len(places) - true
    _draw(output / PICTURE, [(simulated[number], results[number]) for number in sorted(results)][:_SHOWN])
    return {**asdict(report), "found": counts}


def _draw(path: Path, shown: list[tuple[Frame, Result]]) -> None:
    """Frames with their true peaks as squares, and what was found as circles: red where the two do not go together."""
    figure = Figure(figsize=(13.5, 9.2), layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    for axis, (frame, result) in zip(axes, shown, strict=False):
        values = np.where(frame.mask, frame.values, np.nan).astype(np.float32)
        axis.imshow(values, cmap="gray_r", vmax=float(np.nanpercentile(values, 99.7)), interpolation="nearest")
        axis.set_facecolor("#cfd8e3")  # no data
        places = result.peaks[:, 1:]
        for points, others, size, marker in ((frame.peaks, places, 130, "s"), (places, frame.peaks, 60, "o")):
            alone = np.array([not match_peaks(point[None], others, _RADIUS) for point in points], bool)
            for chosen, color in ((~alone, "#1f6fb4"), (alone, "#d1242f")):
                axis.scatter(*points[chosen].T[::-1], size, marker=marker, facecolors="none", edgecolors=color)
        axis.set_title(f"{len(frame.peaks)} peaks, {len(places)} found", fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    figure.suptitle(
        "squares: where peaks are; circles: where peaks were found; red: one without the other", fontsize=11
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)
