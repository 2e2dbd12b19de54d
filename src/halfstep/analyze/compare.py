"""Groups of runs against one another: what is tested, paired or not, and what it takes to say it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from halfstep.analyze import stats
from halfstep.analyze.ends import Ends
from halfstep.analyze.energy import ALL, Separation, correct_over_pairs, energy_tests
from halfstep.analyze.permutation import smallest_p
from halfstep.analyze.resolution import of_means, spread_resolution
from halfstep.analyze.runs import AnalyzedRun
from halfstep.analyze.stats import Columns, GroupTest, OmnibusTest
from halfstep.store.run import Float64

SPREADS = ("dispersion", "dispersion_on_axes")
MOST_GROUPS = 24  # of which all pairs are looked at

Members = dict[str, list[AnalyzedRun]]


@dataclass(frozen=True)
class Comparison:
    """Tests of all groups, where there are more than two; tests of pairs of groups; when pairs separate."""

    omnibus: list[OmnibusTest]
    tests: list[GroupTest]
    separations: list[Separation]


def compare_groups(members: Members, ends: Ends, metrics: Sequence[str], problems: list[str]) -> Comparison:
    """Compare groups of comparable runs. What keeps some of them out is added to `problems`."""
    # At the same noise levels, speed is length times a constant: one test, not two, counts in the correction.
    tested = [name for name in metrics if name != "mean_speed" or "path_length" not in metrics]
    single = [name for name, runs in members.items() if len(runs) < 2]
    if single and len(members) > 2:
        problems.append(f"{len(single)} groups have one run and are not compared: {', '.join(single[:8])}"
                        + (", ..." if len(single) > 8 else ""))  # fmt: skip
        members = {name: runs for name, runs in members.items() if name not in single}
    if len(members) <= 2:
        return _compare_two(members, ends, tested, problems)
    separations: list[Separation] = []
    if len(members) > MOST_GROUPS:
        problems.append(
            f"{len(members)} groups are compared all together, and pairs of them only up to {MOST_GROUPS} groups; "
            "choose some with --groups FILE"
        )
    else:
        separations = correct_over_pairs(
            [_separations(*_aligned({a: members[a], b: members[b]}, [])) for a, b in itertools.combinations(members, 2)]
        )
    aligned, paired = _aligned(members, problems)
    separations = [*_separations(aligned, paired), *separations]
    omnibus = stats.correct(
        [test for columns in _columns(aligned, paired, ends, tested) for test in stats.compare_all(columns)]
    )
    differing = [test.metric for test in omnibus if test.verdict == "different"]
    if not differing or len(members) > MOST_GROUPS:
        return Comparison(omnibus, [], separations)
    pairs = len(members) * (len(members) - 1) / 2
    resamples = stats.resamples_for(pairs * sum(test.p is not None for test in omnibus) / len(differing))
    by_metric: dict[str, list[GroupTest]] = {name: [] for name in differing}
    for columns in _columns(aligned, paired, ends, tested, differing):
        for test in stats.compare_pairs(list(members), columns, resamples=resamples):
            by_metric[test.metric].append(test)
    return Comparison(omnibus, stats.correct_within(by_metric, omnibus), separations)


def _compare_two(members: Members, ends: Ends, metrics: Sequence[str], problems: list[str]) -> Comparison:
    """Two groups; nothing where there is one."""
    if len(members) < 2:
        return Comparison([], [], [])
    a, b = members
    aligned, paired = _aligned(members, problems)
    resamples = stats.resamples_for(len(metrics) + len(SPREADS))
    tests = [
        test
        for columns in _columns(aligned, paired, ends, metrics)
        for test in stats.compare_two(a, b, columns, resamples=resamples)
    ]
    return Comparison([], stats.correct(tests), correct_over_pairs([_separations(aligned, paired)]))


def _aligned(members: Members, problems: list[str]) -> tuple[Members, bool]:
    """The runs of the groups that can be compared, and whether by seed: when the groups share enough seeds, each of
    them once in every group."""
    by_seed = [{run.seed: run for run in runs if run.seed is not None} for runs in members.values()]
    unique = all(len(seeds) == len(runs) for seeds, runs in zip(by_seed, members.values(), strict=True))
    shared = sorted(set(by_seed[0]).intersection(*by_seed[1:])) if unique else []
    same = all(len(shared) == len(runs) for runs in members.values())
    if not shared or not (same or stats.too_few([len(shared)] * len(members), paired=True) is None):
        return members, False
    alone = sum(map(len, members.values())) - len(shared) * len(members)
    if alone:
        who = " / ".join(members) if len(members) == 2 else f"{len(members)} groups"
        problems.append(f"{who}: compared on {len(shared)} common seeds; {alone} runs have no partner")
    return {name: [seeds[seed] for seed in shared] for name, seeds in zip(members, by_seed, strict=True)}, True


def _columns(
    members: Members, paired: bool, ends: Ends, metrics: Sequence[str], only: Sequence[str] | None = None
) -> list[Columns]:
    """The metrics and spreads of the groups, those that are finite in the same runs together. A paired run without a
    value takes its partners with it."""
    groups = list(members.values())
    values = {name: [np.array([run.metrics[name] for run in runs]) for runs in groups] for name in metrics}
    found = {name: of_means([[run.resolution[name] for run in runs] for runs in groups]) for name in metrics}
    spread = _Spreads.of(groups, ends)
    for name, all_products in spread.products.items():
        of_groups = [stats.distances_to_center(all_products[rows, rows]) for rows in spread.rows]
        values[name] = of_groups
        found[name] = max(map(spread_resolution, of_groups, spread.errors[name]))
    together: dict[bytes, list[str]] = {}
    for name in only or values:
        together.setdefault(b"".join(np.isfinite(column).tobytes() for column in values[name]), []).append(name)
    columns = []
    for names in together.values():
        kept = [np.isfinite(column) for column in values[names[0]]]
        if paired:
            kept = [np.logical_and.reduce(kept)] * len(groups)
        rows = [np.stack([values[name][g][kept[g]] for name in names], axis=1) for g in range(len(groups))]
        sizes = tuple(map(len, rows))
        resolutions = np.array([found[name] for name in names])
        whole = all(map(np.all, kept))
        products = {name: spread.products[name] for name in names if name in SPREADS and whole}
        columns.append(Columns(tuple(names), np.concatenate(rows), sizes, paired, resolutions, products))
    return columns


@dataclass(frozen=True)
class _Spreads:
    """The last states of all groups. products: [n, n] their inner products, in all of latent space and on the shared
    axes; errors: by the same name, lengths of their errors, group by group; rows: where each group is."""

    products: dict[str, Float64]
    errors: dict[str, list[Float64]]
    rows: list[slice]

    @classmethod
    def of(cls, groups: Sequence[Sequence[AnalyzedRun]], ends: Ends) -> _Spreads:
        runs = [run for group in groups for run in group]
        stops = np.cumsum([len(group) for group in groups])
        rows = [slice(stop - len(group), stop) for group, stop in zip(groups, stops, strict=True)]
        points = np.array([run.path.axes[-1] for run in runs])
        points = points - points.mean(axis=0)
        on_axes = np.array([run.path.rms_errors[-1] for run in runs]) * math.sqrt(points.shape[1])
        keys = [run.key for run in runs]
        errors = dict(zip(SPREADS, (ends.errors_of(keys), on_axes), strict=True))
        return cls(
            dict(zip(SPREADS, (ends.of(keys), points @ points.T), strict=True)),
            {name: [lengths[group] for group in rows] for name, lengths in errors.items()},
            rows,
        )


def _separations(members: Members, paired: bool) -> list[Separation]:
    """How far groups lie apart at each noise level; nothing where one has one run, which has no spread to hold that
    against."""
    groups = list(members.values())
    sizes = [len(runs) for runs in groups]
    if min(sizes) < 2:
        return []
    a, b = members if len(members) == 2 else (ALL, None)
    points = np.array([run.path.axes for runs in groups for run in runs]).transpose(1, 0, 2)
    energy, p, corrected = energy_tests(_distances(points), sizes, paired=paired)
    return [
        Separation(
            a,
            b,
            float(sigma),
            float(energy[k]),
            None if p is None else float(p[k]),
            None if corrected is None else float(corrected[k]),
            smallest_p(sizes, paired=paired),
        )
        for k, sigma in enumerate(groups[0][0].path.sigmas)
    ]


def _distances(points: Float64) -> Float64:
    """Between all points of each level: [k, n, n] of [k, n, p]."""
    return np.array([np.sqrt(np.square(level[:, None] - level[None]).sum(axis=-1)) for level in points])
