"""Findings as sentences."""

from __future__ import annotations

from halfstep.analyze.analysis import Analysis
from halfstep.analyze.stats import ALPHA, GroupTest, separates_at

METRIC_NAMES = {
    "path_length": "path length",
    "displacement": "displacement",
    "straightness": "straightness",
    "mean_speed": "mean speed",
    "mean_acceleration": "mean acceleration",
    "mean_turning_angle": "mean turning angle",
    "half_life": "half-life",
    "final_variance": "final variance",
    "effective_dimension": "effective dimension",
    "log_volume": "log volume",
    "hull_volume": "hull volume",
    "dispersion": "dispersion of the results",
}


def number(value: float | None) -> str:
    """Three significant digits."""
    return "unknown" if value is None or value != value else f"{value:#.3g}".removesuffix(".")


def p_value(value: float | None) -> str:
    """A p-value to two digits."""
    if value is None:
        return "no p"
    return f"p = {value:.2g}"


def effect(test: GroupTest) -> str:
    """Hedges' g and its interval."""
    if test.hedges_g is None:
        return ""
    low, high = test.interval or (None, None)
    interval = "" if low is None else f", 95% interval {number(low)} to {number(high)}"
    return f"Hedges g {number(test.hedges_g)}{interval}"


def sentence(test: GroupTest) -> str:
    """One test in words."""
    name = METRIC_NAMES.get(test.metric, test.metric)
    if test.mean_a is None or test.mean_b is None:
        return f"{name}: no values in one of the groups."
    means = f"{name}: {number(test.mean_a)} for {test.a}, {number(test.mean_b)} for {test.b}"
    if test.p_holm is None:
        return f"{means}; {test.not_enough}."
    how = "paired by seed, " if test.paired else ""
    tail = f" ({test.not_enough})" if test.not_enough else ""
    return f"{means}; {effect(test)}; {how}{p_value(test.p)}, {test.p_holm:.2g} corrected: {test.verdict}{tail}."


def separation_sentences(analysis: Analysis) -> list[str]:
    """When each pair of groups separates."""
    lines = []
    for a, b in dict.fromkeys((level.a, level.b) for level in analysis.separations):
        levels = [level for level in analysis.separations if (level.a, level.b) == (a, b)]
        if all(level.p_corrected is None for level in levels):
            lines.append(f"{a} and {b}: not enough runs to say when they separate.")
            continue
        sigma = separates_at(levels)
        if sigma is None:
            lines.append(f"{a} and {b}: no separation shown at the end of sampling.")
        else:
            lines.append(
                f"{a} and {b}: separated from sigma {number(sigma)} on, with an energy distance of "
                f"{number(next(level.energy for level in levels if level.sigma == sigma))} there and "
                f"{number(levels[-1].energy)} at the end (all later levels below {ALPHA:g} after correction)."
            )
    return lines


def clustering_sentence(analysis: Analysis) -> str:
    """Whether the results fall into the groups by themselves."""
    found = analysis.clustering
    if found is None:
        return "Clusters: not enough runs or groups."
    noise = f", with {found.hdbscan_noise} runs in no cluster" if found.hdbscan_noise else ""
    return (
        f"Clusters of the last states: k-means agrees with the groups to {found.kmeans_agreement:.2f} (1 the same, 0 "
        f"by chance), HDBSCAN finds {found.hdbscan_clusters} clusters{noise} (agreement {found.hdbscan_agreement:.2f});"
        f" the silhouette of the groups is {found.silhouette_of_groups:.2f}."
    )
