"""report.html: the analysis as one page that needs nothing else, with charts that answer to the mouse."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from halfstep.analyze.analysis import Analysis
from halfstep.analyze.metrics import METRICS
from halfstep.analyze.plots import COLORS, colors, shown
from halfstep.analyze.stats import ALPHA, GroupTest
from halfstep.analyze.storage import StorageComparison
from halfstep.analyze.words import (
    METRIC_NAMES,
    clustering_sentence,
    number,
    p_value,
    sentence,
    separation_sentences,
)

_STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1d2430; background: #fff; margin: 0 auto; max-width: 1100px;
       padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.8rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .4rem; }
p, li { max-width: 50rem; } .soft { color: #5d6778; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; margin: .6rem 0; }
th, td { text-align: right; padding: .3rem .7rem; border-bottom: 1px solid #e3e8f0; vertical-align: top; }
th:first-child, td:first-child { text-align: left; padding-left: 0; } th { font-weight: 600; color: #5d6778; }
td { white-space: nowrap; } td.left { white-space: normal; min-width: 8rem; }
td.left, th.left { text-align: left; } tr.found td { background: #fdf3ec; }
"""


def render_report(analysis: Analysis, title: str, storage: Sequence[StorageComparison] = ()) -> str:
    """The page's HTML."""
    groups = dict.fromkeys(run.group for run in analysis.runs)
    states = sorted({len(run.path.sigmas) for run in analysis.runs})
    of_states = str(states[0]) if len(states) == 1 else f"{states[0]} to {states[-1]}"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p class='soft'>{len(analysis.runs)} runs of {of_states} states in {len(groups)} groups.</p>",
        _findings(analysis),
        "<h2>Trajectories on shared principal axes</h2>",
        f"<p>One basis for all runs; {analysis.explained.sum():.0%} of the variance of the states lies in its "
        f"{len(analysis.explained)} axes. Open markers are the first states, filled ones the last.</p>",
        _chart(_trajectories(analysis)),
        "<h2>Speed</h2><p>Distance per unit of sigma, so that it is the model's and not the schedule's.</p>",
        _chart(_profile(analysis, "speed", "latent / sigma")),
        "<h2>Variance of the values</h2>",
        _chart(_profile(analysis, "variance", "latent²")),
        "<h2>Distance to the group's center</h2>",
        _chart(_to_center(analysis)),
        "<h2>Dispersion of each group</h2>",
        "<p>Root-mean-square distance to the center, unbiased; 95% jackknife intervals where there are four runs.</p>",
        _chart(_dispersion(analysis)),
    ]
    if analysis.separations:
        parts += [
            "<h2>When groups separate</h2>",
            "<p>Energy distance in the shared axes at each noise level; filled where significant after correction over "
            "the levels.</p>",
            _chart(_separation(analysis)),
        ]
    if analysis.pairs:
        parts += ["<h2>Run against run</h2>", "<p>Distance in all of latent space.</p>", _chart(_pairs(analysis))]
    parts += [_tests_table(analysis), _groups_table(analysis), _runs_table(analysis)]
    if storage:
        parts.append(_storage_table(storage))
    if analysis.problems:
        items = "".join(f"<li>{html.escape(line)}</li>" for line in analysis.problems)
        parts.append(f"<h2>Problems</h2><ul>{items}</ul>")
    head = f"<meta charset='utf-8'><title>{html.escape(title)}</title><style>{_STYLE}</style>"
    head += "<meta name='viewport' content='width=device-width, initial-scale=1'>"
    script = f"<script>{get_plotlyjs()}</script>"
    return f"<!doctype html><html lang='en'><head>{head}{script}</head><body>{''.join(parts)}</body></html>\n"


def _findings(analysis: Analysis) -> str:
    lines = [sentence(test) for test in analysis.tests if test.verdict == "different"]
    enough = [test for test in analysis.tests if test.verdict != "not enough runs"]
    if not analysis.tests:
        lines.append("One group only: nothing to compare.")
    elif not lines:
        lines.append(
            f"No difference between groups is shown by {len(enough)} tests."
            if enough
            else "There are not enough runs for a verdict of any test; the figures below describe these runs alone."
        )
    lines += separation_sentences(analysis)
    if len({run.group for run in analysis.runs}) > 1:
        lines.append(clustering_sentence(analysis))
    return "<h2>Findings</h2><ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def _trajectories(analysis: Analysis) -> Any:
    figure, palette = go.Figure(), colors(analysis)
    seen: set[str] = set()
    for run in analysis.runs:
        x = run.path.axes[:, 0]
        y = run.path.axes[:, 1] if run.path.axes.shape[1] > 1 else np.zeros(len(x))
        fill = [palette[run.group]] * len(x)
        fill[0] = "#ffffff"
        figure.add_scatter(
            x=x,
            y=y,
            mode="lines+markers",
            name=html.escape(shown(run.group)),
            legendgroup=run.group,
            showlegend=run.group not in seen,
            line={"color": palette[run.group], "width": 1.2},
            marker={"size": [8, *[3] * (len(x) - 2), 8], "color": fill,
                    "line": {"color": palette[run.group], "width": 1.2}},
            text=[f"{html.escape(run.key)}, sigma {sigma:.3g}" for sigma in run.path.sigmas],
            hoverinfo="text",
        )  # fmt: skip
        seen.add(run.group)
    shares = [*analysis.explained, 0.0]
    figure.update_layout(xaxis_title=f"axis 1 ({shares[0]:.0%})", yaxis_title=f"axis 2 ({shares[1]:.0%})")
    return figure


def _profile(analysis: Analysis, name: str, unit: str) -> Any:
    figure = go.Figure()
    _add_runs(figure, analysis, {run.key: run.profiles[name] for run in analysis.runs})
    return _over_sigma(figure, unit)


def _to_center(analysis: Analysis) -> Any:
    figure = go.Figure()
    curves = {}
    for group in analysis.groups:
        runs = [run for run in analysis.runs if run.key in group.runs]
        if len(runs) < 2:
            continue
        center = np.mean([run.path.axes for run in runs], axis=0)
        for run in runs:
            curves[run.key] = (run.path.sigmas, np.linalg.norm(run.path.axes - center, axis=1))
    _add_runs(figure, analysis, curves)
    return _over_sigma(figure, "latent")


def _add_runs(figure: Any, analysis: Analysis, curves: dict[str, tuple[Any, Any]]) -> None:
    palette, seen = colors(analysis), set()
    for run in analysis.runs:
        if run.key not in curves:
            continue
        sigmas, values = curves[run.key]
        figure.add_scatter(
            x=sigmas,
            y=values,
            mode="lines+markers",
            name=html.escape(shown(run.group)),
            legendgroup=run.group,
            showlegend=run.group not in seen,
            line={"color": palette[run.group], "width": 1.2},
            marker={"size": 3},
            hovertemplate=f"{html.escape(run.key)}<br>sigma %{{x:.3g}}: %{{y:.4g}}<extra></extra>",
        )
        seen.add(run.group)


def _dispersion(analysis: Analysis) -> Any:
    figure, palette = go.Figure(), colors(analysis)
    for group in analysis.groups:
        if len(group.runs) < 2:
            continue
        intervals = group.dispersion_interval
        known = all(interval is not None for interval in intervals)
        error = None
        if known:
            low, high = np.array(intervals, float).T
            error = {"array": high - group.dispersion, "arrayminus": group.dispersion - low, "width": 3, "thickness": 1}
        figure.add_scatter(
            x=group.sigmas,
            y=group.dispersion,
            mode="lines+markers",
            name=html.escape(shown(group.name)),
            line={"color": palette[group.name]},
            error_y=error,
        )
    return _over_sigma(figure, "latent").update_yaxes(rangemode="tozero")


def _separation(analysis: Analysis) -> Any:
    figure = go.Figure()
    for i, pair in enumerate(dict.fromkeys((level.a, level.b) for level in analysis.separations)):
        levels = [level for level in analysis.separations if (level.a, level.b) == pair]
        color = COLORS[i % len(COLORS)]
        found = [level.p_corrected is not None and level.p_corrected < ALPHA for level in levels]
        figure.add_scatter(
            x=[level.sigma for level in levels],
            y=[level.energy for level in levels],
            mode="lines+markers",
            name=html.escape(f"{shown(pair[0], 24)} / {shown(pair[1], 24)}"),
            line={"color": color},
            marker={
                "size": 8,
                "color": [color if f else "#ffffff" for f in found],
                "line": {"color": color, "width": 1},
            },
            text=[p_value(level.p_corrected) for level in levels],
            hovertemplate="sigma %{x:.3g}: %{y:.4g}, %{text} corrected<extra></extra>",
        )
    return _over_sigma(figure, "energy distance, latent")


def _pairs(analysis: Analysis) -> Any:
    figure = go.Figure()
    for pair in analysis.pairs:
        figure.add_scatter(x=pair.sigmas, y=pair.distance, mode="lines+markers", name=f"{pair.a} / {pair.b}")
    return _over_sigma(figure, "distance, latent")


def _over_sigma(figure: Any, unit: str) -> Any:
    figure.update_xaxes(title="sigma (sampling goes to the right)", autorange="reversed")
    figure.update_yaxes(title=unit)
    return figure


def _chart(figure: Any) -> str:
    figure.update_layout(
        template="plotly_white",
        height=430,
        margin={"l": 60, "r": 20, "t": 20, "b": 50},
        legend={"orientation": "h", "y": -0.2},
        showlegend=True,
    )
    page: str = figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False})
    return page


def _table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = (), marked: Sequence[bool] = ()
) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(f"<{tag}{' class=left' if i in left else ''}>{value}</{tag}>" for i, value in enumerate(values))

    body = "".join(
        f"<tr{' class=found' if marked and marked[i] else ''}>{cells('td', row)}</tr>" for i, row in enumerate(rows)
    )
    return f"<div class='wide'><table><tr>{cells('th', heads)}</tr>{body}</table></div>"


def _tests_table(analysis: Analysis) -> str:
    if not analysis.tests:
        return ""
    rows = [
        [
            html.escape(METRIC_NAMES.get(test.metric, test.metric)),
            html.escape(f"{test.verdict}" + (f": {test.not_enough.partition(': ')[2]}" if test.not_enough else "")),
            html.escape(f"{shown(test.a, 24)} / {shown(test.b, 24)}"),
            f"{number(test.mean_a)} / {number(test.mean_b)}",
            _effect(test),
            "-" if test.p_welch is None else f"{test.p_welch:.2g}",
            "-" if test.p_permutation is None else f"{test.p_permutation:.2g}",
            "-" if test.p_holm is None else f"{test.p_holm:.2g}",
            "-" if test.p_bh is None else f"{test.p_bh:.2g}",
        ]
        for test in analysis.tests
    ]
    heads = ["metric", "verdict", "groups", "means", "Hedges g", "Welch p", "permutation p", "Holm", "BH"]
    paired = " Groups with the same seeds are compared pair by pair." if any(t.paired for t in analysis.tests) else ""
    words = (
        "<h2>Tests</h2><p>Two-sided. The verdict goes by the larger of the permutation test's and Welch's p, corrected "
        f"over all tests (Holm), at 0.05; BH controls the share of false findings instead.{paired} Intervals are 95% "
        "bootstrap intervals.</p>"
    )
    found = [test.verdict == "different" for test in analysis.tests]
    return words + _table(heads, rows, left=(1, 2), marked=found)


def _spread(mean: float, deviation: float) -> str:
    if np.isnan(mean):
        return "-"
    return number(mean) if np.isnan(deviation) else f"{number(mean)} ± {number(deviation)}"


def _effect(test: GroupTest) -> str:
    if test.hedges_g is None or test.interval is None:
        return "-"
    return f"{number(test.hedges_g)} ({number(test.interval[0])} to {number(test.interval[1])})"


def _percent(value: float) -> str:
    """A relative difference; below a hundredth of a percent as a power of ten."""
    return f"{value:.1e}" if value < 1e-4 else f"{100 * value:.2g}%" if value < 1 else f"{100 * value:.0f}%"


def _groups_table(analysis: Analysis) -> str:
    names = list(analysis.runs[0].metrics)
    heads = ["mean ± standard deviation", *(f"{html.escape(shown(g.name))} ({len(g.runs)})" for g in analysis.groups)]
    rows = [
        [
            f"{METRIC_NAMES[name]}{f', {METRICS[name].unit}' if METRICS[name].unit else ''}",
            *(_spread(group.means[name], group.deviations[name]) for group in analysis.groups),
        ]
        for name in names
    ]
    rows.append(
        [
            "log volume of the results, log latent^6",
            *("too few runs" if g.log_volume is None else number(g.log_volume) for g in analysis.groups),
        ]
    )
    return "<h2>Groups</h2>" + _table(heads, rows)


def _runs_table(analysis: Analysis) -> str:
    names = list(analysis.runs[0].metrics)
    rows = [
        [
            html.escape(run.key),
            html.escape(shown(run.group, 24)),
            str(run.seed),
            *(number(run.metrics[name]) for name in names),
        ]
        for run in analysis.runs
    ]
    return "<h2>Runs</h2>" + _table(["run", "group", "seed", *(METRIC_NAMES[n] for n in names)], rows, left=(1,))


def _storage_table(storage: Sequence[StorageComparison]) -> str:
    rows = [
        ["bytes of fp32", *(f"{item.share:.3f}" for item in storage)],
        ["verdicts changed", *(f"{len(item.changed)} of {item.tests}" for item in storage)],
    ]
    for name in storage[0].differences:
        largest = [item.differences[name][1] for item in storage]
        rows.append([METRIC_NAMES[name], *("-" if np.isnan(value) else _percent(value) for value in largest)])
    heads = ["kept as", *(html.escape(item.format) for item in storage)]
    return (
        "<h2>Does the format keep the analysis valid?</h2><p>The largest relative difference of each metric over all "
        "runs when the latents are kept in each format.</p>" + _table(heads, rows)
    )
