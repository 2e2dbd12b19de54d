"""Findings as sentences."""

from __future__ import annotations

from collections.abc import Sequence

from halfstep.analyze.analysis import Analysis
from halfstep.analyze.energy import Separation, separates_at
from halfstep.analyze.metrics import METRIC_NAMES
from halfstep.analyze.stats import ALPHA, GroupTest, OmnibusTest

_MOST_TESTS = 5  # that get a sentence of their own


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits."""
    return "unknown" if value is None or value != value else f"{value:#.{digits}g}".removesuffix(".")


def two_numbers(a: float | None, b: float | None) -> tuple[str, str]:
    """Two numbers with as many digits as tell them apart, at least three."""
    texts = ("", "")
    for digits in range(3, 9):
        texts = number(a, digits), number(b, digits)
        if texts[0] != texts[1] or a == b:
            break
    return texts


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


def size(test: GroupTest) -> float:
    """How large an effect is, whatever its sign; groups without spread that differ are as far apart as can be."""
    if test.hedges_g is not None:
        return abs(test.hedges_g)
    return float("inf") if test.difference else 0.0


def sentence(test: GroupTest) -> str:
    """One test of two groups in words."""
    name = METRIC_NAMES.get(test.metric, test.metric)
    if test.mean_a is None or test.mean_b is None:
        return f"{name}: no values in one of the groups."
    a, b = two_numbers(test.mean_a, test.mean_b)
    means = f"{name}: {a} for {test.a}, {b} for {test.b}"
    if test.p_holm is None:
        return f"{means}; {test.not_enough}."
    how = "paired by seed, " if test.paired else ""
    tail = f" ({test.not_enough})" if test.not_enough else ""
    if test.verdict == "not resolved":
        tail = f" (rounding alone could make a difference of {number(test.resolution)})"
    return f"{means}; {effect(test)}; {how}{p_value(test.p)}, {test.p_holm:.2g} corrected: {test.verdict}{tail}."


def omnibus_sentence(test: OmnibusTest, pairs: Sequence[GroupTest]) -> str:
    """One test of all groups in words, with the pair that lies farthest apart."""
    name = METRIC_NAMES.get(test.metric, test.metric)
    if test.p_holm is None:
        return f"{name}: {test.not_enough}."
    share = "" if test.explained is None else f"{test.explained:.0%} of the variance lies between them; "
    how = "by seed, " if test.paired else ""
    words = f"{name}: {test.verdict} among {len(test.sizes)} groups ({share}{how}{test.p_holm:.2g} corrected)"
    apart = [pair for pair in pairs if pair.metric == test.metric and pair.verdict == "different"]
    if not apart:
        return f"{words}; which pairs differ is not shown."
    most = max(apart, key=size)
    a, b = two_numbers(most.mean_a, most.mean_b)
    return f"{words}; most {most.a} ({a}) and {most.b} ({b}), {effect(most)}."


def findings(analysis: Analysis) -> list[str]:
    """What was found, strongest effects first: at most ten sentences."""
    if len({run.group for run in analysis.runs if run.comparable}) < 2:
        return ["One group only: nothing to compare."]
    lines = _of_all_groups(analysis) if analysis.omnibus else _of_two_groups(analysis)
    lines += _separation(analysis)
    return [*lines, clustering_sentence(analysis)]


def _of_two_groups(analysis: Analysis) -> list[str]:
    different = sorted((t for t in analysis.tests if t.verdict == "different"), key=size, reverse=True)
    lines = [sentence(test) for test in different[:_MOST_TESTS]]
    return lines + _summary(different, analysis.tests)


def _of_all_groups(analysis: Analysis) -> list[str]:
    different = [test for test in analysis.omnibus if test.verdict == "different"]
    different.sort(key=lambda test: test.explained or 0.0, reverse=True)
    lines = [omnibus_sentence(test, analysis.tests) for test in different[:_MOST_TESTS]]
    lines += _summary(different, analysis.omnibus)
    pairs = {(test.a, test.b) for test in analysis.tests}
    if pairs:
        apart = {(test.a, test.b) for test in analysis.tests if test.verdict == "different"}
        lines.append(f"{len(apart)} of {len(pairs)} pairs of groups are told apart by at least one of them.")
    return lines


def _summary(different: Sequence[GroupTest | OmnibusTest], tests: Sequence[GroupTest | OmnibusTest]) -> list[str]:
    """What the sentences of single tests leave out."""
    lines = []
    if more := different[_MOST_TESTS:]:
        lines.append(f"Different too: {_names(more)}.")
    if not any(test.verdict != "not enough runs" for test in tests):
        return ["There are not enough runs for a verdict of any test; the figures below describe these runs alone."]
    if not different:
        lines.append(f"No difference between groups is shown by {len(tests)} tests.")
    if unresolved := [test for test in tests if test.verdict == "not resolved"]:
        lines.append(
            f"Not resolved, differences that the rounding of the states could have made: {_names(unresolved)}."
        )
    return lines


def _names(tests: Sequence[GroupTest | OmnibusTest]) -> str:
    return ", ".join(METRIC_NAMES.get(test.metric, test.metric) for test in tests)


def by_pair(analysis: Analysis) -> dict[tuple[str, str | None], list[Separation]]:
    """The levels of each pair of groups, and of all groups at once."""
    pairs: dict[tuple[str, str | None], list[Separation]] = {}
    for level in analysis.separations:
        pairs.setdefault((level.a, level.b), []).append(level)
    return pairs


def _separation(analysis: Analysis) -> list[str]:
    """When all groups at once separate, or the two."""
    pairs = by_pair(analysis)
    chosen = [pair for pair in pairs if pair[1] is None] or list(pairs)[:1]
    return [separation_sentence(pairs[pair]) for pair in chosen]


def separation_sentence(levels: Sequence[Separation]) -> str:
    """When groups separate."""
    who = levels[0].a if levels[0].b is None else f"{levels[0].a} and {levels[0].b}"
    if all(level.p_corrected is None for level in levels):
        return f"{who}: not enough runs to say when they separate."
    sigma = separates_at(levels)
    if sigma is None:
        return f"{who}: no separation shown at the end of sampling."
    return (
        f"{who}: separated from sigma {number(sigma)} on, with an energy distance of "
        f"{number(next(level.energy for level in levels if level.sigma == sigma))} there and "
        f"{number(levels[-1].energy)} at the end (all later levels below {ALPHA:g} after correction)."
    )


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
