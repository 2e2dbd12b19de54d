"""halfstep bench drift: does a lower precision make a world model drift? See `halfstep.live.drift`."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from halfstep.autoencoders import load_autoencoder
from halfstep.bench.compare import document
from halfstep.data.frames import open_latents
from halfstep.errors import InputError
from halfstep.files import write_durably
from halfstep.live import WalkModel
from halfstep.live.drift import Course, Drift, Settings, Truth, measure_drift, opened, store_truth, toy_truth
from halfstep.live.drift.admission import LEAST_ACTION, LEAST_CONTEXT, LEAST_GAIN_DB
from halfstep.live.drift.equivalence import ALPHA
from halfstep.live.drift.free_running import FEATURES, FeatureTest, Float
from halfstep.live.drift.measure import FreeRun
from halfstep.live.drift.one_step import LIMIT, OneStep
from halfstep.live.opening import open_walk
from halfstep.live.variants import POLICIES, Variants
from halfstep.machine import device_name, open_device
from halfstep.models import read_checkpoint
from halfstep.progress import SILENT, Progress

EXIT_CODES: dict[str, int] = {"non-inferior": 0, "inferior": 1, "inconclusive": 3}
PRECISIONS = tuple(name for name in POLICIES if name != "fp32")


def bench_drift(
    *,
    ckpt: Path | None = None,
    data_path: Path | None = None,
    precisions: Sequence[str] = PRECISIONS,
    seeds: int = 12,
    frames: int = 512,
    output: Path | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Hold `precisions` of the shipped world, or of a model of walks in `ckpt` with true walks of the store
    `data_path`, against fp32: `seeds` walks of `frames` frames. `output`: a page, .html. Raises InputError for a
    precision that is not known, a place that is taken, and what does not fit together."""
    for name in precisions:
        if name not in PRECISIONS:
            raise InputError(f"--precisions: got {name!r}; expected {' or '.join(PRECISIONS)}, held against fp32")
    if output is not None and (output.suffix != ".html" or output.is_dir() or not output.parent.is_dir()):
        raise InputError(f"--output: got {output}; expected a file .html in a folder that is there")
    start = time.perf_counter()
    device, settings = open_device("auto"), Settings(frames)
    model = open_walk(ckpt, device, data_path=data_path)
    truth = _truth(model, ckpt, data_path, seeds, frames)
    variants = Variants(model.network, device)
    openers = {name: partial(opened, variants, name) for name in precisions}
    with variants.stream():
        found = measure_drift(Course(model, truth, settings.steps, progress), variants.exact, openers, settings)
    title = "the shipped toy world" if ckpt is None else str(ckpt)
    result = document(
        "drift",
        {},
        subject=title,
        device=device_name(device),
        **as_json(found),
        seconds_in_all=round(time.perf_counter() - start, 1),
    )
    if output is not None:
        from halfstep.bench.drift_page import render_page

        write_durably(output, render_page(result, found).encode())
    return result


def _truth(model: WalkModel, ckpt: Path | None, data_path: Path | None, seeds: int, frames: int) -> Truth:
    device, context_size = next(model.network.parameters()).device, model.network.context_size
    if ckpt is None:
        return toy_truth(load_autoencoder("toy"), context_size, walks=seeds, frames=frames, device=device)
    assert data_path is not None  # open_walk refused a checkpoint without it
    reader, _ = open_latents(data_path, model.network.in_channels, read_checkpoint(ckpt).about.latents)
    return store_truth(reader, model.pixels, context_size, walks=seeds, frames=frames, device=device)


def as_json(found: Drift) -> dict[str, Any]:
    """All numbers. What is not finite is None."""
    settings = found.settings
    document: dict[str, Any] = {
        "settings": {
            "walks": found.walks,
            "places": found.places,
            "frames": settings.frames,
            "sampling_steps": settings.steps,
            "stretch": found.looked.stretch,
            "floor_frames": settings.short,
            "alpha": ALPHA,
            "one_step_limit": LIMIT,
        },
        "verdict": found.verdict,
        "reasons": list(found.reasons),
        "admission": {
            "gain_over_copy_db": _number(found.admission.gain_db),
            "answer_to_context": _number(found.admission.context),
            "answer_to_action": _number(found.admission.action),
            "least": [LEAST_GAIN_DB, LEAST_CONTEXT, LEAST_ACTION],
        },
        "precisions": {
            name: {
                "verdict": found.verdict_of(name),
                "simulated": one.simulated,
                "one_step": _one_step(one.one_step),
                "free_running": _free_run(one.free_run),
            }
            for name, one in found.precisions.items()
        },
    }
    if found.controls is None or found.features is None:
        return document
    controls = found.controls
    return document | {
        "controls": {
            "passed": list(controls.passed),
            "fp8_like": _one_step(controls.fp8),
            "frozen": _test(controls.frozen),
            "gain": {"gain": controls.gain, **_free_run(controls.gained)},
        },
        "floor": {name: list(apart) for name, apart in found.floor.items()},
        "looked_at": list(found.looked.numbers),
        "features_in_fp32": _features(found.features),
    }


def as_markdown(result: Mapping[str, Any]) -> str:
    """What was found, as it is read."""
    settings, admission = result["settings"], result["admission"]
    lines = [
        f"# Drift of {result['subject']}",
        "",
        f"**{result['verdict']}**"
        + "".join(f"; {name}: {one['verdict']}" for name, one in result["precisions"].items())
        + f". On {result['device']}; {settings['walks']} walks of {settings['frames']} frames, "
        f"{settings['sampling_steps']} sampling steps a frame.",
        *(f"Nothing can be concluded: {reason}." for reason in result["reasons"]),
        f"Admission: one step in fp32 beats copying the last frame by {_told(admission['gain_over_copy_db'])} dB; "
        f"{_told(admission['answer_to_context'])} of a moved context comes back; the opposite action moves the frame "
        f"by {_told(admission['answer_to_action'])} of the motion.",
    ]
    simulated = [name for name, one in result["precisions"].items() if one["simulated"]]
    if simulated:
        lines.append(
            f"{' and '.join(simulated)}: simulated, operation by operation, because this device has no fast arithmetic "
            "of that type."
        )
    if not result["precisions"]:
        return "\n".join(lines)
    rows = [("precision", "one step: added error", "95% bounds", "free running", "frames until apart")]
    rows += [(name, *_row(one["one_step"], one["free_running"])) for name, one in result["precisions"].items()]
    controls = result["controls"]
    gained = controls["gain"]
    rows += [
        ("fp8-like noise (control)", *_row(controls["fp8_like"], None)),
        ("frozen frames (control)", "", "", _rejected(controls["frozen"]["p_within"] >= ALPHA), ""),
        (f"a gain of {gained['gain']:g} (control)", *_row(None, gained)),
    ]
    rows += [(f"fp32, {name} (floor)", "", "", "", typical(apart)) for name, apart in result["floor"].items()]
    lines += ["", *map(_line, [rows[0], ("---",) * len(rows[0]), *rows[1:]]), ""]
    for name, one in result["precisions"].items():
        lines += [
            f"{name}, {test['feature']}: changes by {test['change']:+.2g} more than in fp32, margin "
            f"{test['margin']:.2g} (p within {test['p_within']:.2g}, beyond {test['p_beyond']:.2g})"
            for test in one["free_running"]["tests"]
            if test["p_within"] >= ALPHA
        ]
    return "\n".join(lines).rstrip()


def typical(apart: Sequence[int | None]) -> str:
    """The median walk's frames until apart."""
    value = float(np.median([math.inf if one is None else one for one in apart]))
    return "not apart" if math.isinf(value) else f"{value:g}"


def _row(one_step: Mapping[str, Any] | None, free_run: Mapping[str, Any] | None) -> tuple[str, str, str, str]:
    cells = ["", "", "", ""]
    if one_step is not None:
        low, high = one_step["low"], one_step["high"]
        cells[0] = f"{percent(one_step['added'])}, {one_step['verdict']}"
        cells[1] = f"{percent(low)} to {percent(high)}"
    if free_run is not None:
        broken = free_run["not_finite"]
        cells[2] = free_run["verdict"] + ("" if broken is None else f" (frame {broken} is not finite)")
        cells[3] = typical(free_run["apart"])
    return cells[0], cells[1], cells[2], cells[3]


def percent(share: float | None) -> str:
    return "not finite" if share is None else f"{100 * share:.3g}%"


def _rejected(yes: bool) -> str:
    return "rejected" if yes else "passed"


def _told(value: float | None) -> str:
    return "no number" if value is None else f"{value:.2f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _one_step(one: OneStep) -> dict[str, Any]:
    return {"verdict": one.verdict, "added": _number(one.added), "low": _number(one.low), "high": _number(one.high)}


def _free_run(one: FreeRun) -> dict[str, Any]:
    return {
        "verdict": one.verdict,
        "not_finite": one.not_finite,
        "tests": [_test(test) for test in one.tests],
        "apart": list(one.apart),
        "features": _features(one.features),
    }


def _test(test: FeatureTest) -> dict[str, Any]:
    return {
        "feature": test.feature,
        "change": _number(test.change),
        "margin": _number(test.margin),
        "p_within": _number(test.p_within),
        "p_beyond": _number(test.p_beyond),
    }


def _features(values: Float) -> dict[str, list[float | None]]:
    """By name, of each frame that was looked at."""
    return {name: [_number(value) for value in column] for name, column in zip(FEATURES, values.T, strict=True)}


def _number(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None
