"""analyze(): metrics of every run, then what differs between groups of runs. Steps are read a few at a time."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from sklearn.cluster import HDBSCAN, KMeans
from sklearn.metrics import adjusted_rand_score, silhouette_score

from halfstep.analyze import stats
from halfstep.analyze.axes import SharedAxes, fit_axes
from halfstep.analyze.compare import compare_groups
from halfstep.analyze.ends import Ends, last_states
from halfstep.analyze.energy import Separation
from halfstep.analyze.facts import differences, facts_of, mark_comparable
from halfstep.analyze.metrics import (
    METRIC_NAMES,
    METRICS,
    PROFILES,
    VOLUME_AXES,
    Path,
    Summary,
    profile_sigmas,
    spectrum,
    summarize,
)
from halfstep.analyze.resolution import resolutions
from halfstep.analyze.runs import AnalyzedRun
from halfstep.analyze.stats import GroupTest, OmnibusTest
from halfstep.errors import InputError, StoreError, printable
from halfstep.progress import SILENT, Progress
from halfstep.store.run import Float64, Latents, Run

_SPECTRUM = 10  # eigenvalues of a run that are reported
_LARGEST = 1e15  # magnitude of a value whose squares can be summed in float32


@dataclass(frozen=True)
class Group:
    """Runs of one group that can be compared. dispersion: root-mean-square distance to the group's center at each noise
    level on the shared axes, latent, with its interval; end_dispersion: that of the last states in all of latent space;
    log_volume: log det of the covariance of the last states on the first three shared axes, None for fewer than five
    runs or where it is that of rounding."""

    name: str
    runs: list[str]
    means: dict[str, float]
    deviations: dict[str, float]
    sigmas: Float64
    dispersion: list[float]
    dispersion_interval: list[tuple[float, float] | None]
    end_dispersion: float
    end_dispersion_interval: tuple[float, float] | None
    log_volume: float | None


@dataclass(frozen=True)
class Clustering:
    """Whether the last states fall into the groups by themselves, in the shared axes. Agreement is the adjusted Rand
    index (Hubert and Arabie 1985): 1 the same, 0 as by chance; silhouettes from -1 to 1 (Rousseeuw 1987)."""

    silhouette_of_groups: float
    kmeans_agreement: float
    kmeans_silhouette: float
    hdbscan_clusters: int
    hdbscan_noise: int
    hdbscan_agreement: float


@dataclass(frozen=True)
class PairOfRuns:
    """Two runs in all of latent space, at each noise level that both have: distance, latent, and the correlation of
    their values."""

    a: str
    b: str
    sigmas: list[float]
    distance: list[float]
    correlation: list[float]


@dataclass(frozen=True)
class Analysis:
    """Everything that was found. `explained` [p]: share of the variance of the states on each shared axis."""

    runs: list[AnalyzedRun]
    groups: list[Group]
    omnibus: list[OmnibusTest]
    tests: list[GroupTest]
    separations: list[Separation]
    clustering: Clustering | None
    explained: Float64
    pairs: list[PairOfRuns] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def analyze(
    runs: Mapping[str, Run],
    groups: Mapping[str, str],
    *,
    metrics: Sequence[str] | None = None,
    pairwise: bool = False,
    problems: Sequence[str] = (),
    progress: Progress = SILENT,
) -> Analysis:
    """Analyze `runs`; `groups` gives the group of each key that is to be looked at. The order of runs changes nothing:
    they are taken by their keys, and so are groups, by that of their first run.

    `metrics` names some of METRICS (all by default); `pairwise` compares all runs two by two. Runs that cannot be
    used, and what is wrong with the others, are among the problems, after those given. Raises InputError for an unknown
    metric or when no run can be used.
    """
    chosen = list(METRICS) if metrics is None else list(metrics)
    for name in chosen:
        if name not in METRICS:
            raise InputError(f"--metrics: got {name!r}; expected some of {', '.join(METRICS)}")
    found = list(problems)
    usable = _usable_runs({key: runs[key] for key in sorted(groups)}, found)  # so that their order changes nothing
    summaries: dict[str, Summary] = {}
    progress.start(len(usable))
    for key, run in list(usable.items()):
        progress.advance()
        try:
            progress.show(f"{key}: {len(run)} steps")
            with np.errstate(all="ignore"):  # what overflows is looked for
                summaries[key] = summarize(run)
            if not np.isfinite(summaries[key].gram).all():
                found.append(f"{key}: has values that are not finite; left out")
                del usable[key]
            elif summaries[key].largest > _LARGEST:
                found.append(f"{key}: has values of up to {summaries[key].largest:.2g}, beyond {_LARGEST:g}; left out")
                del usable[key]
        except StoreError as error:
            found.append(f"{error}; left out")
            del usable[key]
    if not usable:
        raise InputError(f"no run can be analyzed: {'; '.join(found) or 'there is none'}")
    shared = fit_axes(usable)
    progress.show(f"shared axes: {len(shared.components)}, {shared.explained.sum():.0%} of the variance")
    analyzed = [_analyze_run(run, groups[key], summaries[key], shared, chosen) for key, run in usable.items()]
    analyzed = mark_comparable(analyzed, found)
    comparable = [run for run in analyzed if run.comparable]
    found += [*differences(comparable), *_mostly_rounding(analyzed, chosen)]
    members: dict[str, list[AnalyzedRun]] = {}
    for one in comparable:
        members.setdefault(one.group, []).append(one)
    ends = last_states(
        {run.key: usable[run.key] for run in comparable},
        shared.center,
        {run.key: float(run.path.rms_errors[-1]) for run in comparable},
    )
    progress.show(f"comparing {len(members)} groups")
    comparison = compare_groups(members, ends, chosen, found)
    return Analysis(
        analyzed,
        [_group(name, members[name], ends, chosen) for name in members],
        comparison.omnibus,
        comparison.tests,
        comparison.separations,
        _clustering(comparable, list(members)),
        shared.explained,
        [_compare_runs(usable[a], usable[b]) for a, b in itertools.combinations(usable, 2)] if pairwise else [],
        found,
    )


def _usable_runs(runs: Mapping[str, Run], problems: list[str]) -> dict[str, Run]:
    """The runs of the usual shape with two states or more, with one state for each noise level that is known."""
    usable: dict[str, Run] = {}
    for key, run in runs.items():
        problems += [f"{key}: {line}" for line in run.problems]
        # Of states at one noise level (the predictor and the corrector of Heun's method) the last counts.
        known = np.flatnonzero(np.isfinite(run.sigmas) & np.append(np.diff(run.sigmas) != 0, True))
        if len(known) < 2:
            problems.append(f"{key}: has {len(known)} states of known noise level; at least 2 are needed; left out")
            continue
        usable[key] = run if len(known) == len(run) else _only(run, known)
    shapes = Counter(run.latents.shape[1:] for run in usable.values())
    for key, run in list(usable.items()):
        usual = shapes.most_common(1)[0][0]
        if run.latents.shape[1:] != usual:
            problems.append(f"{key}: has the shape {list(run.latents.shape[1:])}, most runs {list(usual)}; left out")
            del usable[key]
    return usable


def _only(run: Run, places: Any) -> Run:
    latents = Latents(len(places), run.latents.shape[1:], lambda k: run.latents[int(places[k])])
    return replace(
        run,
        steps=run.steps[places],
        sigmas=run.sigmas[places],
        timesteps=run.timesteps[places],
        latents=latents,
    )


def _analyze_run(run: Run, group: str, summary: Summary, shared: SharedAxes, metrics: Sequence[str]) -> AnalyzedRun:
    axes = shared.project(run.latents)
    path = Path(summary.gram, summary.mean, summary.variance, run.sigmas, axes, summary.rms_errors)
    with np.errstate(all="ignore"):  # what is not finite is no value
        values = {name: METRICS[name].compute(path) for name in metrics}
        profiles = {name: profile.compute(path) for name, profile in PROFILES.items()}
    return AnalyzedRun(
        run.key,
        run.prompt,
        run.seed,
        group,
        path,
        values,
        resolutions(path, values, summary.size),
        {name: (profile_sigmas(len(values), run.sigmas), values) for name, values in profiles.items()},
        spectrum(path)[:_SPECTRUM],
        run.problems,
        facts_of(run),
    )


def _mostly_rounding(runs: Sequence[AnalyzedRun], metrics: Sequence[str]) -> list[str]:
    """A line for the metrics of which half and more may be rounding."""
    counts = {
        name: sum(run.resolution[name] > abs(run.metrics[name]) / 2 for run in runs if math.isfinite(run.metrics[name]))
        for name in metrics
    }
    found = ", ".join(f"{METRIC_NAMES[name]} ({count})" for name, count in counts.items() if count)
    if not found:
        return []
    return [
        f"more than half of some values may be the rounding of the stored states: {found} of {len(runs)} runs; record "
        "with storage fp32, from a sampler in fp32, to see less"
    ]


def _group(name: str, runs: list[AnalyzedRun], ends: Ends, metrics: Sequence[str]) -> Group:
    values = {metric: np.array([run.metrics[metric] for run in runs]) for metric in metrics}
    finite = {metric: column[np.isfinite(column)] for metric, column in values.items()}
    spreads = [stats.dispersion(np.array([run.path.axes[k] for run in runs])) for k in range(len(runs[0].path.sigmas))]
    last = _last_states(runs)[:, :VOLUME_AXES]
    volume = None
    if len(last) > VOLUME_AXES + 1 and last.shape[1] == VOLUME_AXES:
        eigenvalues = np.linalg.eigvalsh(np.cov(last.T))
        rounding = 4 * float(np.mean([run.path.rms_errors[-1] ** 2 for run in runs]))
        volume = float(np.log(eigenvalues).sum()) if eigenvalues[0] > rounding else None
    end, end_interval = stats.dispersion_of(ends.of([run.key for run in runs]))
    return Group(
        name,
        [run.key for run in runs],
        {metric: float(column.mean()) if column.size else math.nan for metric, column in finite.items()},
        {metric: float(column.std(ddof=1)) if column.size > 1 else math.nan for metric, column in finite.items()},
        runs[0].path.sigmas,
        [value for value, _ in spreads],
        [interval for _, interval in spreads],
        end,
        end_interval,
        volume,
    )


def _last_states(runs: list[AnalyzedRun]) -> Float64:
    return np.array([run.path.axes[-1] for run in runs])


def _clustering(runs: list[AnalyzedRun], names: list[str]) -> Clustering | None:
    """None when there is one group, fewer than two runs a group, or fewer results that differ than groups."""
    labels = np.array([names.index(run.group) for run in runs])
    if len(names) < 2 or len(runs) < 2 * len(names):
        return None
    points = _last_states(runs)
    if len(np.unique(points, axis=0)) < len(names):
        return None
    kmeans = KMeans(len(names), n_init=10, random_state=0).fit_predict(points)
    dense = HDBSCAN(min_cluster_size=max(2, len(runs) // (2 * len(names))), copy=True).fit_predict(points)
    found = len(set(kmeans.tolist()))
    return Clustering(
        float(silhouette_score(points, labels)),
        float(adjusted_rand_score(labels, kmeans)),
        float(silhouette_score(points, kmeans)) if found > 1 else math.nan,
        len(set(dense.tolist()) - {-1}),
        int((dense == -1).sum()),
        float(adjusted_rand_score(labels, dense)),
    )


def _compare_runs(a: Run, b: Run) -> PairOfRuns:
    place = {float(f"{sigma:.4g}"): k for k, sigma in enumerate(b.sigmas)}
    sigmas, distances, correlations = [], [], []
    for k, sigma in enumerate(a.sigmas):
        other = place.get(float(f"{sigma:.4g}"))
        if other is None:
            continue
        x, y = a.latents[k].reshape(-1).astype(np.float64), b.latents[other].reshape(-1).astype(np.float64)
        sigmas.append(float(sigma))
        distances.append(float(np.linalg.norm(x - y)))
        x, y = x - x.mean(), y - y.mean()
        scale = float(np.linalg.norm(x) * np.linalg.norm(y))
        correlations.append(float(x @ y) / scale if scale else math.nan)
    return PairOfRuns(a.key, b.key, sigmas, distances, correlations)


def document(analysis: Analysis) -> dict[str, Any]:
    """The analysis as one JSON document; what is not a number is null."""
    groups = {}
    for group in analysis.groups:
        content = asdict(group)
        groups[content.pop("name")] = content
    definitions = {name: (metric.unit, metric.formula) for name, metric in METRICS.items()}
    names = list(analysis.runs[0].metrics)
    content = {
        "runs": {
            run.key: {
                "prompt": run.prompt,
                "seed": run.seed,
                "group": run.group,
                "states": len(run.path.sigmas),
                "sigmas": run.path.sigmas,
                "compared": run.comparable,
                "spectrum": run.spectrum,
                "facts": run.facts,
                "problems": run.problems,
            }
            for run in analysis.runs
        },
        "metrics": {
            name: {
                "unit": definitions[name][0],
                "formula": definitions[name][1],
                "values": {run.key: run.metrics[name] for run in analysis.runs},
                "resolution": {run.key: run.resolution[name] for run in analysis.runs},
            }
            for name in names
        },
        "groups": groups,
        "omnibus": [{**asdict(test), "verdict": test.verdict} for test in analysis.omnibus],
        "tests": [{**asdict(test), "verdict": test.verdict} for test in analysis.tests],
        "separation": [asdict(level) for level in analysis.separations],
        "clustering": None if analysis.clustering is None else asdict(analysis.clustering),
        "pairs": [asdict(pair) for pair in analysis.pairs],
        "shared_axes": {"explained": analysis.explained},
        "problems": analysis.problems,
    }
    result: dict[str, Any] = plain(content)
    return result


def plain(value: Any) -> Any:
    """`value` in the types of JSON; what is not finite becomes None."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value


def tidy(analysis: Analysis) -> list[dict[str, Any]]:
    """One row a value: run, group, prompt, seed, quantity, unit, sigma (of quantities along the path), value."""
    rows = []
    for run in analysis.runs:
        seed = None if run.seed is None else str(run.seed)
        prompt = None if run.prompt is None else printable(run.prompt)
        who = {"run": run.key, "group": printable(run.group), "prompt": prompt, "seed": seed}
        for name, value in run.metrics.items():
            rows.append({**who, "quantity": name, "unit": METRICS[name].unit, "sigma": None, "value": value})
        for name, (sigmas, values) in run.profiles.items():
            unit = PROFILES[name].unit
            for sigma, value in zip(sigmas, values, strict=True):
                rows.append({**who, "quantity": name, "unit": unit, "sigma": float(sigma), "value": float(value)})
    return rows
