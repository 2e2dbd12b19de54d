"""report.html: the analysis as one page that needs nothing else, with charts that answer to the mouse."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from halfstep.analyze.analysis import Analysis
from halfstep.analyze.facts import listed, table
from halfstep.analyze.metrics import METRIC_NAMES, METRICS, PROFILES
from halfstep.analyze.plots import COLORS, colors, names_of, pair_matrix, separation_curves, short_names
from halfstep.analyze.runs import AnalyzedRun
from halfstep.analyze.stats import ALPHA, GroupTest, OmnibusTest
from halfstep.analyze.storage import StorageComparison
from halfstep.analyze.words import by_pair, findings, number, p_value, size, two_numbers
from halfstep.page import STYLE, page

_MOST_TESTS = 60  # rows of the table of pairs
_MANY_COLUMNS = 9  # of a table; more are set smaller
_MOST_CURVES = 60  # of single runs in one chart

_DEFINITIONS = {
    **{name: profile.formula for name, profile in PROFILES.items()},
    **{name: metric.formula for name, metric in METRICS.items()},
    "dispersion": "Distance of the last states to their group's center in all of latent space, latent.",
    "dispersion_on_axes": "Distance of the states to their group's center on the shared principal axes, latent.",
    "energy": "2 E|X-Y| - E|X-X'| - E|Y-Y'| of two groups X and Y, latent; 0 where they are alike.",
    "group_volume": "log det of the covariance of the last states on the first three shared axes, log latent^6; from "
    "five runs on, where it is more than rounding.",
}

_STYLE = f"""{STYLE}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
td {{ white-space: nowrap; }} td.left {{ white-space: normal; min-width: 8rem; }}
abbr {{ text-decoration: underline dotted; cursor: help; }}
small {{ color: #5d6778; }} table.many {{ font-size: .78rem; }}
table.many th, table.many td {{ padding: .25rem .3rem; }}
table.many td.left {{ min-width: 6rem; }} tr.found td {{ background: #fdf3ec; }}
"""


def render_report(analysis: Analysis, title: str, storage: Sequence[StorageComparison] = ()) -> str:
    """The page's HTML."""
    groups = dict.fromkeys(run.group for run in analysis.runs)
    states = sorted({len(run.path.sigmas) for run in analysis.runs})
    of_states = str(states[0]) if len(states) == 1 else f"{states[0]} to {states[-1]}"
    several = any(len(group.runs) > 1 for group in analysis.groups)
    counted = f"{len(analysis.runs)} runs" if len(analysis.runs) > 1 else "1 run"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p class='soft'>{counted} of {of_states} states in "
        f"{f'{len(groups)} groups' if len(groups) > 1 else 'one group'}.</p>",
        "<h2>Findings</h2>",
        f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in findings(analysis))}</ul>",
        *_pair_matrix(analysis),
        "<h2>Trajectories on shared principal axes</h2>",
        f"<p>One basis for all runs; {analysis.explained.sum():.0%} of the variance of the states lies in its "
        f"{_axes(len(analysis.explained))}. Open markers are the first states, filled ones the last.</p>",
        _chart(_trajectories(analysis)),
        _facts_table(analysis),
        f"<h2>{_defined('speed', 'Speed')}</h2>",
        f"<p>Distance per unit of sigma, so that it is the model's and not the schedule's.{_means(analysis)}</p>",
        _chart(_profile(analysis, "speed", "latent / sigma")),
        f"<h2>{_defined('variance', 'Variance of the values')}</h2>",
        _chart(_profile(analysis, "variance", "latent²")),
    ]
    if several:
        parts += [
            "<h2>Distance to the group's center</h2>",
            _chart(_to_center(analysis)),
            f"<h2>{_defined('dispersion_on_axes', 'Dispersion of each group')}</h2>",
            "<p>Root-mean-square distance to the center on the shared axes, unbiased; 95% jackknife intervals where "
            "there are four runs.</p>",
            _chart(_dispersion(analysis)),
        ]
    if analysis.separations:
        parts += [
            "<h2>When groups separate</h2>",
            f"<p>{_defined('energy', 'Energy distance')} in the shared axes at each noise level; filled where "
            f"significant after correction over the levels{_left_out_pairs(analysis)}.</p>",
            _chart(_separation(analysis)),
        ]
    if analysis.pairs:
        parts += ["<h2>Run against run</h2>", "<p>Distance in all of latent space.</p>", _chart(_pairs(analysis))]
    parts += [_omnibus_table(analysis), _tests_table(analysis), _groups_table(analysis), _runs_table(analysis)]
    if storage:
        parts.append(_storage_table(storage))
    if analysis.problems:
        items = "".join(f"<li>{html.escape(line)}</li>" for line in analysis.problems)
        parts.append(f"<h2>Problems</h2><ul>{items}</ul>")
    return page(title, "".join(parts), _STYLE, head=f"<script>{get_plotlyjs()}</script>")


def _means(analysis: Analysis) -> str:
    return " Lines are means of the groups." if len(analysis.runs) > _MOST_CURVES else ""


def _axes(count: int) -> str:
    return "one axis" if count == 1 else f"{count} axes"


def _defined(name: str, words: str) -> str:
    """`words`, with what the quantity is shown on hover."""
    definition = _DEFINITIONS.get(name)
    return html.escape(words) if definition is None else f"<abbr title='{html.escape(definition)}'>{words}</abbr>"


def _group(name: str, names: dict[str, str]) -> str:
    """A group's short name, with the whole one on hover."""
    short = html.escape(names[name])
    return short if names[name] == name else f"<span title='{html.escape(name)}'>{short}</span>"


def _metric(name: str) -> str:
    return _defined(name, METRIC_NAMES.get(name, name))


def _left_out_pairs(analysis: Analysis) -> str:
    drawn, there = len(separation_curves(analysis)), len(by_pair(analysis))
    return (
        f"; the {drawn - 1} pairs of {there - 1} that lie farthest apart at the end are shown" if drawn < there else ""
    )


def _pair_matrix(analysis: Analysis) -> list[str]:
    matrix = pair_matrix(analysis)
    if matrix is None:
        return []
    names = [html.escape(name) for name in short_names(matrix.names, 28).values()]
    figure = go.Figure()
    figure.add_heatmap(
        z=matrix.strongest,
        x=names,
        y=names,
        text=[["" if not n > 0 else f"{n:.0f}" for n in row] for row in matrix.different],
        texttemplate="%{text}",
        colorscale="Oranges",
        zmin=0,
        colorbar={"title": "largest<br>|g|"},
        hovertemplate="%{y} / %{x}: %{text} metrics, largest |Hedges g| %{z:.3g}<extra></extra>",
        hoverongaps=False,
    )
    figure.update_yaxes(autorange="reversed", automargin=True, tickmode="linear")
    figure.update_xaxes(automargin=True, tickmode="linear", tickangle=-60)
    side = 260 + 26 * len(names)
    return [
        "<h2>Which pairs of groups differ</h2>",
        "<p>How many metrics tell two groups apart, after correction; the darker, the larger the strongest effect.</p>",
        _chart(figure, height=side, legend=False),
    ]


def _trajectories(analysis: Analysis) -> Any:
    figure, palette, names = go.Figure(), colors(analysis), names_of(analysis)
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
            name=html.escape(names[run.group]),
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
    """A curve a run, or where there are many the mean of each group."""
    palette, names, seen = colors(analysis), names_of(analysis), set()
    if len(curves) > _MOST_CURVES:
        for group in analysis.groups:
            of_group = [curves[key] for key in group.runs if key in curves]
            if of_group:
                figure.add_scatter(
                    x=of_group[0][0],
                    y=np.mean([values for _, values in of_group], axis=0),
                    mode="lines+markers",
                    name=html.escape(names[group.name]),
                    line={"color": palette[group.name], "width": 1.6},
                    marker={"size": 4},
                    hovertemplate=f"{html.escape(names[group.name])}, mean of {len(of_group)} runs<br>"
                    "sigma %{x:.3g}: %{y:.4g}<extra></extra>",
                )
        return
    for run in analysis.runs:
        if run.key not in curves:
            continue
        sigmas, values = curves[run.key]
        figure.add_scatter(
            x=sigmas,
            y=values,
            mode="lines+markers",
            name=html.escape(names[run.group]),
            legendgroup=run.group,
            showlegend=run.group not in seen,
            line={"color": palette[run.group], "width": 1.2},
            marker={"size": 3},
            hovertemplate=f"{html.escape(run.key)}<br>sigma %{{x:.3g}}: %{{y:.4g}}<extra></extra>",
        )
        seen.add(run.group)


def _dispersion(analysis: Analysis) -> Any:
    figure, palette, names = go.Figure(), colors(analysis), names_of(analysis)
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
            name=html.escape(names[group.name]),
            line={"color": palette[group.name]},
            error_y=error,
        )
    return _over_sigma(figure, "latent").update_yaxes(rangemode="tozero")


def _separation(analysis: Analysis) -> Any:
    figure = go.Figure()
    for i, (name, levels) in enumerate(separation_curves(analysis)):
        color = COLORS[i % len(COLORS)]
        found = [level.p_corrected is not None and level.p_corrected < ALPHA for level in levels]
        figure.add_scatter(
            x=[level.sigma for level in levels],
            y=[level.energy for level in levels],
            mode="lines+markers",
            name=html.escape(name),
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


def _chart(figure: Any, *, height: int = 430, legend: bool = True) -> str:
    names = {trace.name for trace in figure.data if trace.name}
    if legend:  # below the plot, with room for all of it
        longest = max((len(name) for name in names), default=0)
        rows = -(-len(names) // max(1, 150 // (longest + 5)))
        below = 60 + 19 * rows
        height += below - 80
        figure.update_layout(legend={"orientation": "h", "yref": "container", "y": 0.0, "yanchor": "bottom"})
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 60, "r": 20, "t": 20, "b": below if legend else 50},
        showlegend=legend,
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
    head = f"<tr>{cells('th', heads)}</tr>" if any(heads) else ""
    many = " class=many" if len(heads) > _MANY_COLUMNS else ""
    return f"<div class='wide'><table{many}>{head}{body}</table></div>"


def _facts_table(analysis: Analysis) -> str:
    rows = []
    for name, values in table(analysis.runs).items():
        if name == "date" and len(values) > 1:
            rows.append([name, html.escape(f"{min(values)} to {max(values)}")])
            continue
        unknown = len(analysis.runs) - values.total()
        rows.append([name, html.escape(listed(values)) + (f" ({unknown} runs do not say)" if unknown else "")])
    return "<h2>How the runs were made</h2>" + _table(["", ""], rows, left=(1,))


def _omnibus_table(analysis: Analysis) -> str:
    if not analysis.omnibus:
        return ""
    rows = [
        [
            _metric(test.metric),
            html.escape(_verdict(test)),
            "-" if test.explained is None else f"{test.explained:.1%}",
            _p(test),
            *_corrected(test),
        ]
        for test in sorted(analysis.omnibus, key=lambda test: -(test.explained or 0.0))
    ]
    by_seed = " Runs change places within a seed, which all groups share." if analysis.omnibus[0].paired else ""
    words = (
        "<h2>Tests of all groups</h2><p>Does any group differ? The verdict goes by the larger of the permutation test's"
        f" and Welch's p, corrected over the metrics (Holm), at 0.05.{by_seed}</p>"
    )
    heads = ["metric", "verdict", "variance between groups", "p", "Holm", "BH"]
    return words + _table(heads, rows, left=(1,), marked=[t.verdict == "different" for t in analysis.omnibus])


def _tests_table(analysis: Analysis) -> str:
    if not analysis.tests:
        return ""
    tests, names = sorted(analysis.tests, key=size, reverse=True), names_of(analysis, 24)
    rows = [
        [
            _metric(test.metric),
            html.escape(_verdict(test)),
            f"{_group(test.a, names)} / {_group(test.b, names)}",
            " / ".join(two_numbers(test.mean_a, test.mean_b)),
            _effect(test),
            _p(test),
            *_corrected(test),
        ]
        for test in tests[:_MOST_TESTS]
    ]
    heads = ["metric", "verdict", "groups", "means", "Hedges g", "p", "Holm", "BH"]
    paired = " Groups with the same seeds are compared pair by pair." if any(t.paired for t in analysis.tests) else ""
    over = "over all tests"
    if analysis.omnibus:
        over = "over the pairs, and for the choice of the metrics that differ among all groups"
    most = f" The {_MOST_TESTS} largest effects of {len(tests)} tests are shown." if len(tests) > _MOST_TESTS else ""
    words = (
        f"<h2>Tests{' of pairs' if analysis.omnibus else ''}</h2><p>Two-sided, the largest effects first. The verdict "
        f"goes by the larger of the permutation test's and Welch's p, corrected {over} (Holm), at 0.05; BH controls "
        f"the share of false findings instead.{paired} Intervals are 95% bootstrap intervals.{most}</p>"
    )
    found = [test.verdict == "different" for test in tests]
    return words + _table(heads, rows, left=(1, 2), marked=found)


def _verdict(test: GroupTest | OmnibusTest) -> str:
    return test.verdict + (f": {test.not_enough.partition(': ')[2]}" if test.not_enough else "")


def _p(test: GroupTest | OmnibusTest) -> str:
    """The p-value that counts; on hover, both that it is the larger of."""
    if test.p is None:
        return "-"
    welch = "" if test.p_welch is None else f", Welch's {test.p_welch:.2g}"
    return f"<abbr title='by permutation {test.p_permutation:.2g}{welch}'>{test.p:.2g}</abbr>"


def _corrected(test: GroupTest | OmnibusTest) -> tuple[str, str]:
    holm, lenient = ("-" if p is None else f"{p:.2g}" for p in (test.p_holm, test.p_bh))
    return holm, lenient


def _spread(mean: float, deviation: float) -> str:
    if np.isnan(mean):
        return "-"
    return number(mean) if np.isnan(deviation) else f"{number(mean)}<br><small>± {number(deviation, 2)}</small>"


def _effect(test: GroupTest) -> str:
    if test.hedges_g is None or test.interval is None:
        return "-"
    return f"{number(test.hedges_g)} ({number(test.interval[0])} to {number(test.interval[1])})"


def _percent(value: float) -> str:
    """A relative difference; below a hundredth of a percent as a power of ten."""
    return f"{value:.1e}" if value < 1e-4 else f"{100 * value:.2g}%" if value < 1 else f"{100 * value:.0f}%"


def _groups_table(analysis: Analysis) -> str:
    metrics, names = list(analysis.runs[0].metrics), names_of(analysis)
    rows = [
        [
            f"{_group(group.name, names)} ({len(group.runs)})",
            *(_spread(group.means[name], group.deviations[name]) for name in metrics),
            "-" if np.isnan(group.end_dispersion) else number(group.end_dispersion),
            "-" if group.log_volume is None else number(group.log_volume),
        ]
        for group in analysis.groups
    ]
    heads = [
        "group (runs)",
        *map(_metric, metrics),
        _metric("dispersion"),
        _defined("group_volume", "log volume of the results"),
    ]
    return "<h2>Groups</h2><p>Mean and standard deviation over the runs.</p>" + _table(heads, rows, left=(0,))


def _runs_table(analysis: Analysis) -> str:
    metrics, names = list(analysis.runs[0].metrics), names_of(analysis, 24)
    rows = [
        [
            html.escape(run.key),
            _group(run.group, names),
            "-" if run.seed is None else str(run.seed),
            *(_value(run, name) for name in metrics),
        ]
        for run in analysis.runs
    ]
    rounded = any("~" in value for row in rows for value in row[3:])
    words = "<p>~ marks values of which half and more may be the rounding of the states.</p>" if rounded else ""
    return "<h2>Runs</h2>" + words + _table(["run", "group", "seed", *map(_metric, metrics)], rows, left=(1,))


def _value(run: AnalyzedRun, name: str) -> str:
    value = run.metrics[name]
    if np.isnan(value):
        return "-"
    return ("~" if run.resolution[name] > abs(value) / 2 else "") + number(value)


def _storage_table(storage: Sequence[StorageComparison]) -> str:
    rows = [
        ["bytes of fp32", *(f"{item.share:.3f}" for item in storage)],
        ["verdicts changed", *(f"{len(item.changed)} of {item.tests}" for item in storage)],
    ]
    for name in storage[0].differences:
        largest = [item.differences[name][1] for item in storage]
        rows.append([_metric(name), *("-" if np.isnan(value) else _percent(value) for value in largest)])
    heads = ["kept as", *(html.escape(item.format) for item in storage)]
    return (
        "<h2>Does the format keep the analysis valid?</h2><p>The largest relative difference of each metric over all "
        "runs when the latents are kept in each format.</p>" + _table(heads, rows)
    )
