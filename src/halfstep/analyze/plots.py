"""The plots of an analysis as PNG and SVG. What is drawn was measured: no smoothing, no points between."""

from __future__ import annotations

import colorsys
import itertools
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from halfstep.analyze.analysis import Analysis
from halfstep.analyze.energy import Separation
from halfstep.analyze.metrics import METRIC_NAMES
from halfstep.analyze.runs import AnalyzedRun
from halfstep.analyze.stats import ALPHA
from halfstep.analyze.words import by_pair, size
from halfstep.errors import printable
from halfstep.files import file_errors, replacing
from halfstep.store.run import Float64

# Okabe and Ito (2008): tells apart for all kinds of color vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#4D4D4D")
_MOST_TESTS = 30  # rows of the plot of effects
MOST_PAIRS = 7  # curves of pairs of groups


def colors(analysis: Analysis) -> dict[str, str]:
    """A color for each group, all different."""
    names = list(dict.fromkeys(run.group for run in analysis.runs))
    return dict(zip(names, palette(len(names)), strict=True))


def palette(count: int) -> list[str]:
    """So many colors that differ: those above, or hues as far apart as can be in three lightnesses."""
    if count <= len(COLORS):
        return list(COLORS[:count])
    found = (colorsys.hls_to_rgb(i / count, (0.32, 0.5, 0.66)[i % 3], 0.75) for i in range(count))
    return ["#" + "".join(f"{round(255 * part):02x}" for part in color) for color in found]


def names_of(analysis: Analysis, most: int = 40) -> dict[str, str]:
    """The groups' names as they are shown: cut where they are long, and still different."""
    return short_names(dict.fromkeys(run.group for run in analysis.runs), most)


def short_names(names: Iterable[str], most: int) -> dict[str, str]:
    """Each name in at most so many letters, and no two alike: cut at their ends, in their middles where that makes some
    alike, or numbered."""
    names = list(names)
    for kept in (most - 3, (most - 3) // 2):  # letters of the beginning
        end = most - 3 - kept
        short = [n if len(n) <= most else f"{n[:kept]}...{n[len(n) - end :]}" for n in names]
        if len(set(short)) == len(names):
            return dict(zip(names, short, strict=True))
    return {name: f"{name[: most - 8]}... {number}" for number, name in enumerate(names, start=1)}


def _plain(name: str) -> str:
    """A name for matplotlib, which takes what stands between dollars for mathematics."""
    return printable(name).replace("$", r"\$")


def write_plots(analysis: Analysis, folder: Path) -> list[Path]:
    """Write every plot that the analysis has data for, and remove those of an earlier analysis that it has not; the
    PNG files."""
    with file_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    plots: dict[str, tuple[tuple[float, float], Callable[[Analysis, Axes], bool]]] = {
        "trajectories": ((7.5, 5.5), _trajectories),
        "speed": ((7.5, 4.5), _speed),
        "variance": ((7.5, 4.5), _variance),
        "dispersion": ((7.5, 4.5), _dispersion),
        "separation": ((7.5, 4.5), _separation),
        "pairs": (_matrix_size(analysis), _pairs),
        "effects": ((8.5, max(3.0, 0.3 * min(_MOST_TESTS, len(analysis.tests)) + 1.2)), _effects),
    }
    written = []
    for name, (inches, draw) in plots.items():
        figure = Figure(figsize=inches, layout="constrained")
        axes = figure.subplots()
        drawn = draw(analysis, axes)
        axes.spines[["top", "right"]].set_visible(False)
        for suffix in ("png", "svg"):
            path = folder / f"{name}.{suffix}"
            if not drawn:
                path.unlink(missing_ok=True)
                continue
            with replacing(path) as unfinished, warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # of prompts in any language
                figure.savefig(unfinished, dpi=150, format=suffix)
        if drawn:
            written.append(folder / f"{name}.png")
    return written


def _trajectories(analysis: Analysis, axes: Axes) -> bool:
    if len(analysis.explained) < 2:
        return False
    color_of, names = colors(analysis), names_of(analysis)
    labeled: set[str] = set()
    for run in analysis.runs:
        x, y = run.path.axes[:, 0], run.path.axes[:, 1]
        color = color_of[run.group]
        axes.plot(x, y, "-", color=color, linewidth=1, alpha=0.7, label=_once(names[run.group], labeled))
        axes.plot(x[0], y[0], "o", color=color, markerfacecolor="white", markersize=5)
        axes.plot(x[-1], y[-1], "o", color=color, markersize=5)
    first, second = analysis.explained[:2]
    axes.set(
        xlabel=f"shared axis 1 ({first:.0%} of the variance)",
        ylabel=f"shared axis 2 ({second:.0%})",
        title="Trajectories, from the first state (open) to the last (filled)",
    )
    _legend(axes)
    return True


def _speed(analysis: Analysis, axes: Axes) -> bool:
    return _profile(analysis, axes, "speed", "speed, latent / sigma", "Speed against noise level")


def _variance(analysis: Analysis, axes: Axes) -> bool:
    return _profile(analysis, axes, "variance", "variance of the values, latent²", "Variance against noise level")


def _profile(analysis: Analysis, axes: Axes, name: str, label: str, title: str) -> bool:
    color_of, names = colors(analysis), names_of(analysis)
    for run in analysis.runs:
        sigmas, values = run.profiles[name]
        axes.plot(sigmas, values, "-", color=color_of[run.group], linewidth=0.7, alpha=0.35)
    for group, runs in _groups(analysis).items():
        sigmas = runs[0].profiles[name][0]
        mean = np.mean([run.profiles[name][1] for run in runs], axis=0)
        label_of = f"{_plain(names[group])} (mean of {len(runs)})"
        axes.plot(sigmas, mean, ".-", color=color_of[group], linewidth=2, label=label_of)
    axes.set(xlabel="sigma (sampling goes to the right)", ylabel=label, title=title)
    axes.invert_xaxis()
    _legend(axes)
    return True


def _dispersion(analysis: Analysis, axes: Axes) -> bool:
    color_of, names = colors(analysis), names_of(analysis)
    drawn = False
    for group in analysis.groups:
        if len(group.runs) < 2:
            continue
        drawn = True
        axes.plot(group.sigmas, group.dispersion, ".-", color=color_of[group.name], label=_plain(names[group.name]))
        known = [(s, *i) for s, i in zip(group.sigmas, group.dispersion_interval, strict=True) if i is not None]
        if known:
            sigmas, low, high = np.array(known).T
            axes.fill_between(sigmas, low, high, color=color_of[group.name], alpha=0.15, linewidth=0)
    axes.set(
        xlabel="sigma (sampling goes to the right)",
        ylabel="rms distance to the group's center, latent",
        title="Dispersion of each group, with 95% jackknife intervals where there are four runs",
    )
    axes.title.set_fontsize(11)
    axes.invert_xaxis()
    axes.set_ylim(bottom=0)
    _legend(axes)
    return drawn


def separation_curves(analysis: Analysis) -> list[tuple[str, list[Separation]]]:
    """The curves that are drawn: all groups at once, and the pairs that lie farthest apart at the end; with names."""
    curves = sorted(by_pair(analysis).items(), key=lambda item: (item[0][1] is not None, -item[1][-1].energy))
    of_all, names = bool(curves) and curves[0][0][1] is None, names_of(analysis, 24)
    return [
        (a if b is None else f"{names[a]} / {names[b]}", levels) for (a, b), levels in curves[: MOST_PAIRS + of_all]
    ]


def _separation(analysis: Analysis, axes: Axes) -> bool:
    curves = separation_curves(analysis)
    for i, (name, levels) in enumerate(curves):
        color = COLORS[i % len(COLORS)]
        sigmas = [level.sigma for level in levels]
        axes.plot(sigmas, [level.energy for level in levels], "-", color=color, linewidth=1.5)
        for significant, fill in ((False, "white"), (True, color)):
            chosen = [lv for lv in levels if (lv.p_corrected is not None and lv.p_corrected < ALPHA) == significant]
            label = _plain(name) if significant else None
            axes.plot(
                [level.sigma for level in chosen], [level.energy for level in chosen], "o", color=color,
                markerfacecolor=fill, markersize=5, label=label,
            )  # fmt: skip
    axes.set(
        xlabel="sigma (sampling goes to the right)",
        ylabel="energy distance in the shared axes, latent",
        title="How far groups lie apart; filled where significant after correction",
    )
    axes.title.set_fontsize(11)
    axes.invert_xaxis()
    _legend(axes)
    return bool(curves)


@dataclass(frozen=True)
class PairMatrix:
    """Groups against groups: `different` [k, k] metrics that tell the two apart, `strongest` [k, k] the largest effect
    among them; NaN on the diagonal."""

    names: list[str]
    different: Float64
    strongest: Float64


def pair_matrix(analysis: Analysis) -> PairMatrix | None:
    """None where there are two groups, or no pair was tested."""
    if not analysis.omnibus or not analysis.tests:
        return None
    names = [group.name for group in analysis.groups if any(group.name in (t.a, t.b) for t in analysis.tests)]
    different, strongest = np.zeros((2, len(names), len(names)))
    for test in analysis.tests:
        if test.verdict == "different":
            for i, j in itertools.permutations((names.index(test.a), names.index(test.b))):
                different[i, j] += 1
                strongest[i, j] = max(strongest[i, j], min(size(test), 1e3))
    for matrix in (different, strongest):
        np.fill_diagonal(matrix, np.nan)
    return PairMatrix(names, different, strongest)


def _matrix_size(analysis: Analysis) -> tuple[float, float]:
    side = 3.0 + 0.38 * len(analysis.groups)
    return side + 1.5, side


def _pairs(analysis: Analysis, axes: Axes) -> bool:
    matrix = pair_matrix(analysis)
    if matrix is None:
        return False
    image = axes.imshow(matrix.strongest, cmap="Oranges", vmin=0)
    for (i, j), count in np.ndenumerate(matrix.different):
        if count > 0:
            axes.text(j, i, f"{count:.0f}", ha="center", va="center", fontsize=8)
    places = range(len(matrix.names))
    names = [_plain(name) for name in short_names(matrix.names, 20).values()]
    axes.set_xticks(places, names, rotation=90, fontsize=8)
    axes.set_yticks(places, names, fontsize=8)
    axes.set_title("Metrics that tell two groups apart (number), strongest effect (color)", fontsize=10)
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.7)
    bar.set_label("largest |Hedges g|")
    return True


def _effects(analysis: Analysis, axes: Axes) -> bool:
    every = [test for test in analysis.tests if test.hedges_g is not None and test.interval is not None]
    tests = sorted(every, key=size, reverse=True)[:_MOST_TESTS]
    several = len({(test.a, test.b) for test in tests}) > 1
    names = names_of(analysis, 16 if several else 24)
    for row, test in enumerate(reversed(tests)):
        assert test.hedges_g is not None
        assert test.interval is not None
        color = COLORS[1] if test.verdict == "different" else COLORS[7]
        axes.plot(test.interval, [row, row], "-", color=color, linewidth=1.5)
        axes.plot(test.hedges_g, row, "o", color=color, markersize=5)
    axes.axvline(0, color="black", linewidth=0.8)
    labels = [
        METRIC_NAMES.get(test.metric, test.metric)
        + (f", {_plain(names[test.a])} / {_plain(names[test.b])}" if several else "")
        for test in reversed(tests)
    ]
    axes.set_yticks(range(len(tests)), labels, fontsize=9)
    pair = "second minus first"
    if tests and not several:
        pair = f"{_plain(names[tests[0].b])} minus {_plain(names[tests[0].a])}"
    some = "" if len(tests) == len(every) else f" (the {len(tests)} largest of {len(every)})"
    axes.set(
        xlabel=f"Hedges g with 95% bootstrap interval ({pair})", title=f"Effect sizes{some}; colored where different"
    )
    axes.title.set_fontsize(11)
    return bool(tests)


def _groups(analysis: Analysis) -> dict[str, list[AnalyzedRun]]:
    groups: dict[str, list[AnalyzedRun]] = {}
    for run in analysis.runs:
        if run.comparable:
            groups.setdefault(run.group, []).append(run)
    return groups


def _once(name: str, seen: set[str]) -> str | None:
    if name in seen:
        return None
    seen.add(name)
    return _plain(name)


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if 0 < len(labels) <= 8:
        axes.legend(handles, labels, fontsize=8, frameon=False)
    elif 8 < len(labels) <= 48:  # beside the plot, which they would cover
        columns = -(-len(labels) // 24)
        axes.legend(handles, labels, fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1), ncols=columns)
