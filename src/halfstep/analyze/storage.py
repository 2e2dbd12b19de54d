"""Does half precision keep the analysis valid? Every metric from latents as they are, and as each format has them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from halfstep.analyze.analysis import Analysis, analyze
from halfstep.errors import NumericsError
from halfstep.progress import SILENT, Progress
from halfstep.store.formats import to_float32, to_storage
from halfstep.store.predictive import Promise, decode_trajectory, encode_trajectory
from halfstep.store.run import Float32, Latents, Rounding, Run
from halfstep.store.trajectory_layout import STATES_A_CHUNK

_BOUNDS = (1e-3, 1e-2, 1e-1)  # of the root-mean-square of the latents

# What a chunk of steps becomes when it is stored and read again, and the bytes that it took.
RoundTrip = Callable[[Float32], tuple[Float32, int]]
_Format = tuple[RoundTrip, Rounding]


@dataclass(frozen=True)
class StorageComparison:
    """One way to keep the latents. share: of the bytes of fp32. differences: by metric, (median, largest) over the runs
    of |stored - exact| / |exact|. changed: tests whose verdict is another one, in words; tests: how many there were."""

    format: str
    share: float
    differences: dict[str, tuple[float, float]]
    changed: list[str]
    tests: int


def compare_storage(
    runs: Mapping[str, Run],
    groups: Mapping[str, str],
    exact: Analysis,
    *,
    progress: Progress = SILENT,
) -> list[StorageComparison]:
    """Repeat the analysis `exact` of `runs` with their latents rounded as each format keeps them: fp16, bf16, and the
    predictive codec at the errors of both and at bounds of 0.1%, 1% and 10% of the latents' root-mean-square. A format
    that cannot hold the values is left out, and `progress` hears why."""
    if any(not runs[run.key].attributes.get("latents_exact", True) for run in exact.runs):
        progress.note("the runs are rounded as they are; what follows is the difference that a second rounding makes")
    comparisons = []
    groups = {run.key: groups[run.key] for run in exact.runs}
    first = runs[exact.runs[0].key].latents
    rms = float(np.sqrt(np.mean(np.square(np.stack([first[0], first[-1]]), dtype=np.float64))))
    for name, form in _formats(rms).items():
        progress.show(f"as {name}")
        sizes: list[tuple[int, int]] = []
        held: dict[tuple[str, int], Float32] = {}
        stored = {key: _stored(runs[key], form, held, sizes) for key in groups}
        try:
            analysis = analyze(stored, groups, metrics=list(exact.runs[0].metrics))
        except NumericsError as error:
            progress.note(f"{name} is left out: {error}")
            continue
        comparisons.append(
            StorageComparison(
                name,
                sum(size for size, _ in sizes) / sum(plain for _, plain in sizes),
                _differences(exact, analysis),
                _changed_verdicts(exact, analysis),
                len(_verdicts(exact)),
            )
        )
    return comparisons


def _formats(rms: float) -> dict[str, _Format]:
    fp16, bf16 = Rounding.of({"fp32": 1.0, "fp16": 1.0}), Rounding.of({"fp32": 1.0, "bf16": 1.0})
    formats: dict[str, _Format] = {
        "fp16": (_cast("fp16", "F16"), fp16),
        "bf16": (_cast("bf16", "BF16"), bf16),
        "predictive at fp16's error": (_predictive(Promise(fidelity="fp16")), fp16),
        "predictive at bf16's error": (_predictive(Promise(fidelity="bf16")), bf16),
    }
    for bound in _BOUNDS:
        rounding = Rounding.of({"fp32": 1.0}, bound * rms)
        formats[f"predictive, error <= {bound:g} rms"] = (_predictive(Promise(bound * rms)), rounding)
    return formats


def _cast(storage: str, type_name: str) -> RoundTrip:
    def round_trip(latents: Float32) -> tuple[Float32, int]:
        stored = to_storage(latents, storage)
        return to_float32(stored, type_name), stored.nbytes

    return round_trip


def _predictive(promise: Promise) -> RoundTrip:
    def round_trip(latents: Float32) -> tuple[Float32, int]:
        blob = encode_trajectory(latents, promise)
        return decode_trajectory(blob), len(blob)

    return round_trip


def _stored(run: Run, form: _Format, held: dict[tuple[str, int], Float32], sizes: list[tuple[int, int]]) -> Run:
    """`run` as it would be read from a store, chunk by chunk. `held` has the one chunk that was read last, of all runs;
    the bytes of each chunk go to `sizes` once."""
    counted: set[int] = set()
    round_trip, rounding = form

    def read(k: int) -> Float32:
        chunk = k // STATES_A_CHUNK
        if (run.key, chunk) not in held:
            held.clear()
            plain = run.latents[chunk * STATES_A_CHUNK : (chunk + 1) * STATES_A_CHUNK]
            held[run.key, chunk], size = round_trip(plain)
            if chunk not in counted:
                counted.add(chunk)
                sizes.append((size, plain.nbytes))
        step: Float32 = held[run.key, chunk][k % STATES_A_CHUNK]
        return step

    return replace(run, latents=Latents(len(run), run.latents.shape[1:], read), rounding=rounding)


def _differences(exact: Analysis, stored: Analysis) -> dict[str, tuple[float, float]]:
    values = {run.key: run.metrics for run in stored.runs}
    differences = {}
    for name in exact.runs[0].metrics:
        relative = [
            abs(values[run.key][name] - run.metrics[name]) / abs(run.metrics[name])
            for run in exact.runs
            if math.isfinite(run.metrics[name]) and run.metrics[name] != 0
        ]
        differences[name] = (float(np.median(relative)), max(relative)) if relative else (math.nan, math.nan)
    return differences


def _changed_verdicts(exact: Analysis, stored: Analysis) -> list[str]:
    before, after = _verdicts(exact), _verdicts(stored)
    return [
        f"{who}: {before.get(who, 'not tested')} -> {after.get(who, 'not tested')}"
        for who in {**before, **after}
        if before.get(who) != after.get(who)
    ]


def _verdicts(analysis: Analysis) -> dict[str, str]:
    of_all = {f"{test.metric}, all groups": test.verdict for test in analysis.omnibus}
    return {**of_all, **{f"{test.metric}, {test.a} against {test.b}": test.verdict for test in analysis.tests}}
