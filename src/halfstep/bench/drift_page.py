"""The page of `halfstep bench drift`: the verdict, plots, and frames beside each other."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from halfstep.analyze.plots import COLORS
from halfstep.bench.drift import as_markdown, percent, typical
from halfstep.live.drift import Drift
from halfstep.live.drift.equivalence import ALPHA
from halfstep.live.drift.free_running import FEATURES
from halfstep.page import STYLE, page

_GRAY = "#8a93a3"
_VERDICT_COLORS = {"non-inferior": COLORS[2], "inferior": COLORS[1], "inconclusive": _GRAY}

_THIN: dict[str, Any] = {"linewidth": 1.3}
_LINES: dict[str, dict[str, Any]] = {"fp32": {"linewidth": 5, "alpha": 0.25}}  # under the others, which lie on it

_STYLE = f"""{STYLE}
h1, p {{ overflow-wrap: anywhere; }}
.verdict {{ font-size: 1.15rem; padding: .7rem 1rem; border-left: 5px solid; background: #f5f7fa; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
.plot {{ width: 100%; height: auto; margin: .4rem 0; }}
.strip td, .strip th {{ border: 0; padding: .2rem .3rem; text-align: center; vertical-align: middle; }}
.strip td:first-child {{ text-align: left; padding-right: .8rem; white-space: nowrap; }}
.strip img {{ width: 210px; max-width: 100%; border-radius: 4px; display: block; }}
.bar {{ border-left: 4px solid; padding-left: .5rem; }}
"""

Result = Mapping[str, Any]


def render_page(result: Result, found: Drift) -> str:
    """The page's HTML, of the document of a benchmark and what it was made from, which has the pictures."""
    lines = as_markdown(result).split("\n\n")
    color = _VERDICT_COLORS[result["verdict"]]
    summary = [line.replace("**", "") for line in lines[1].splitlines()]
    parts = [
        f"<h1>Drift of {html.escape(result['subject'])}</h1>",
        f"<p class='verdict' style='border-color: {color}'>{html.escape(_headline(result))}</p>",
        *(f"<p class='soft'>{html.escape(line)}</p>" for line in summary[1:]),
        f"<p class='soft'>{html.escape(_setup(result))}</p>",
    ]
    if result["precisions"]:
        parts += _body(result, found)
    return page("Drift", "\n".join(parts), _STYLE)


def _headline(result: Result) -> str:
    each = ", ".join(f"{name} is {one['verdict']}" for name, one in result["precisions"].items())
    return f"{result['verdict'].capitalize()}{': ' if each else ''}{each}."


def _setup(result: Result) -> str:
    settings = result["settings"]
    return (
        f"{settings['walks']} walks: {settings['places']} single steps and {settings['frames']} frames of each, "
        f"{settings['sampling_steps']} sampling steps a frame, on {result['device']}, in "
        f"{result['seconds_in_all']:.0f} seconds. {result['command']}"
    )


def _body(result: Result, found: Drift) -> list[str]:
    settings = result["settings"]
    colors = _colors(result)
    return [
        "<h2>One step from true frames</h2>",
        f"<p>What a precision adds to the model's own error, with the bounds at 95%. The upper one must be below "
        f"{settings['one_step_limit']:.0%}. Noise like that of fp8 is the control: it must not be.</p>",
        _image(_added(result), "Added error by precision"),
        "<h2>Walks on the model's own frames</h2>",
        f"<p>Means over walks. What counts is how the first {settings['stretch']} frames (shaded) differ from the last "
        "ones, beside the same in fp32.</p>",
        _image(_over_time(result, colors), "Features over time"),
        _tests(result),
        "<h2>How long until apart</h2>",
        "<p>The frame of each walk that is farther from fp32's than one frame of fp32 is from the next; a triangle "
        "where none is, at the end of the walk. The gray rows are fp32 itself, begun from almost the same context: no "
        f"precision can be expected to stay together for longer. They are {settings['floor_frames']} frames long.</p>",
        _image(_apart(result), "Frames until apart"),
        "<h2>The same walk</h2>",
        _strip(found, colors),
    ]


def _colors(result: Result) -> dict[str, str]:
    return dict(zip(("fp32", *result["precisions"]), ("#1d2430", COLORS[0], COLORS[1]), strict=False))


def _added(result: Result) -> Figure:
    rows = {name: one["one_step"] for name, one in result["precisions"].items()}
    rows["fp8-like noise (control)"] = result["controls"]["fp8_like"]
    figure = Figure(figsize=(9.6, 0.45 * len(rows) + 0.9), layout="constrained")
    axes = figure.subplots()
    for place, one in enumerate(rows.values()):
        color = _VERDICT_COLORS[one["verdict"]]
        if one["added"] is None:
            axes.annotate("not finite", (0.99, place), xycoords=("axes fraction", "data"), ha="right", color=color)
            continue
        shares = [100 * one[key] for key in ("low", "added", "high")]
        axes.plot(shares[::2], [place, place], color=color, linewidth=3, solid_capstyle="round")
        axes.plot(shares[1], place, "o", color=color, markersize=8)
        axes.annotate(
            percent(one["added"]),
            (shares[1], place),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    axes.axvline(100 * result["settings"]["one_step_limit"], color=COLORS[1], linestyle="--", linewidth=1)
    axes.set_xscale("log")
    axes.margins(x=0.08)
    low, high = axes.get_xlim()
    ticks = [digit * 10.0**power for power in range(-4, 6) for digit in (1, 2, 5)]
    axes.set_xticks([tick for tick in ticks if low <= tick <= high])
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}%")
    axes.set_xlabel("added error, of the model's own; dashed: the limit", fontsize=9)
    _rows(axes, list(rows))
    return figure


def _over_time(result: Result, colors: Mapping[str, str]) -> Figure:
    numbers, settings = result["looked_at"], result["settings"]
    gain = result["controls"]["gain"]
    drawn = [(f"a gain of {gain['gain']:g} (control)", gain["features"], _GRAY, ":")]
    drawn.append(("fp32", result["features_in_fp32"], colors["fp32"], "-"))
    for line, (name, one) in zip(("-", "--"), result["precisions"].items(), strict=False):
        drawn.append((name, one["free_running"]["features"], colors[name], line))
    figure = Figure(figsize=(9.6, 5.2), layout="constrained")
    grid = figure.subplots(2, 3)
    for axes, feature in zip(grid.flat, FEATURES, strict=False):
        for start in (1, settings["frames"] - settings["stretch"] + 1):
            axes.axvspan(start, start + settings["stretch"] - 1, color="#eef1f6", linewidth=0)
        for name, values, color, line in drawn:
            series = [np.nan if value is None else value for value in values[feature]]
            axes.plot(numbers, series, line, color=color, **_LINES.get(name, _THIN))
        known = [value for _, values, _, line in drawn if line != ":" for value in values[feature] if value is not None]
        low, high = min(known), max(known)
        room = 0.25 * (high - low) or 0.1
        axes.set_ylim(low - room, high + room)  # the control may leave, or nothing else could be seen
        axes.set_title(feature, fontsize=10)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[1]:
        axes.set_xlabel("frame", fontsize=8)
    last = grid[1][2]
    last.axis("off")
    for name, _, color, line in drawn:
        last.plot([], [], line, color=color, label=name, **_LINES.get(name, _THIN))
    last.legend(loc="center left", fontsize=9, frameon=False)
    return figure


def _apart(result: Result) -> Figure:
    settings = result["settings"]
    rows = [(f"fp32, {name}", apart, settings["floor_frames"], _GRAY) for name, apart in result["floor"].items()]
    rows += [
        (name, one["free_running"]["apart"], settings["frames"], COLORS[0])
        for name, one in result["precisions"].items()
    ]
    figure = Figure(figsize=(9.6, 0.4 * len(rows) + 0.9), layout="constrained")
    axes = figure.subplots()
    for place, (_, apart, length, color) in enumerate(rows):
        met = [frame for frame in apart if frame is not None]
        axes.plot([1, length], [place, place], color="#e3e8f0", linewidth=6, solid_capstyle="butt", zorder=0)
        axes.plot(met, [place] * len(met), "o", color=color, alpha=0.7, markersize=7, markeredgewidth=0)
        together = len(apart) - len(met)
        if together:
            axes.plot(length, place, ">", color=color, markersize=9)
            axes.annotate(f"{together}", (length, place), xytext=(9, -4), textcoords="offset points", fontsize=9)
    axes.set_xlim(0, 1.06 * settings["frames"])
    axes.set_xlabel("frame", fontsize=9)
    _rows(axes, [f"{name}: {typical(apart)}" for name, apart, _, _ in rows])
    return figure


def _rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), list(names), fontsize=9)
    axes.set_ylim(len(names) - 0.4, -0.7)
    axes.tick_params(axis="x", labelsize=9)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _tests(result: Result) -> str:
    runs = {name: one["free_running"] for name, one in result["precisions"].items()}
    gain = result["controls"]["gain"]
    runs[f"a gain of {gain['gain']:g} (control)"] = gain
    rows = []
    for name, run in runs.items():
        if run["not_finite"] is None:
            rows.append((name, [_cell(test) for test in run["tests"]]))
        else:
            rows.append((name, [f"<td colspan='{len(FEATURES)}'>frame {run['not_finite']} is not finite</td>"]))
    rows.append(
        ("frozen frames (control)", ["<td></td>"] * (len(FEATURES) - 1) + [_cell(result["controls"]["frozen"])])
    )
    body = "".join(f"<tr><td>{html.escape(name)}</td>{''.join(cells)}</tr>" for name, cells in rows)
    return (
        "<p class='soft'>Change from the first to the last frames, minus that of fp32; how large it may be; and p, "
        f"which is below {ALPHA:g} where the change is shown to be smaller. Orange: it is shown to be larger.</p>"
        f"<div class='wide'><table>{_tags('th', ['', *FEATURES])}{body}</table></div>"
    )


def _cell(test: Result) -> str:
    style = f" style='color: {COLORS[1]}'" if test["p_beyond"] < ALPHA else ""
    return (
        f"<td{style}>{test['change']:+.2g}<br><span class='soft'>±{test['margin']:.2g}, p {_chance(test['p_within'])}"
        "</span></td>"
    )


def _chance(p: float) -> str:
    return "&lt; 0.001" if p < 0.001 else f"{p:.2g}"


def _strip(found: Drift, colors: Mapping[str, str]) -> str:
    numbers = found.settings.shown
    strips = {"fp32": found.pictures, **{name: one.free_run.pictures for name, one in found.precisions.items()}}
    rows = []
    for name, strip in strips.items():
        assert strip is not None
        pictures = "".join(
            f"<td><img alt='{name}, frame {n}' src='{_png(p)}'></td>" for n, p in zip(numbers, strip, strict=True)
        )
        rows.append(f"<tr><td><span class='bar' style='border-color: {colors[name]}'>{name}</span></td>{pictures}</tr>")
    head = _tags("th", ["", *(f"frame {number}" for number in numbers)])
    return f"<div class='wide'><table class='strip'>{head}{''.join(rows)}</table></div>"


def _png(picture: Any) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _tags(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _image(figure: Figure, told: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<img class='plot' alt='{html.escape(told)}' src='data:image/svg+xml;base64,{data}'>"
