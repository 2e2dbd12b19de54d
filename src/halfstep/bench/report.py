"""halfstep bench report: what benchmarks found as Markdown, or as one page that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from halfstep.bench.results import read_result
from halfstep.errors import InputError
from halfstep.files import write_durably
from halfstep.page import STYLE, page

KINDS = ("suite", "compare", "canary")

Result = Mapping[str, Any]
Table = tuple[list[str], list[list[str]]]

_STYLE = f"""{STYLE}
h3 {{ font-size: 1.05rem; margin: 1.6rem 0 .3rem; }} img {{ max-width: 100%; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
"""


def write_report(files: Sequence[Path], output: Path | None) -> str | None:
    """Write the report of `files` to `output`, `.html` or `.md`; without one, return the Markdown. Raises InputError
    for another ending, for a place that is taken, and for files that no benchmark wrote."""
    if output is not None and (output.suffix not in (".html", ".md") or output.is_dir() or not output.parent.is_dir()):
        raise InputError(f"--output: got {output}; expected a file .html or .md in a folder that is there")
    results = {path.name: read_result(path, KINDS) for path in files}
    if output is None:
        return as_markdown(results)
    text = as_html(results) if output.suffix == ".html" else as_markdown(results)
    write_durably(output, text.encode())
    return None


def as_markdown(results: Mapping[str, Result]) -> str:
    """All results by name: verdict, canary, tables."""
    parts = []
    for name, result in results.items():
        parts += [f"## {name}", *_lines(result)]
        for title, (head, rows) in _tables(result).items():
            parts += [f"### {title}", "\n".join([_row(head), _row(["---"] * len(head)), *map(_row, rows)])]
    return "\n\n".join(parts) + "\n"


def as_html(results: Mapping[str, Result]) -> str:
    """The same as a page, with plots."""
    parts = ["<h1>Benchmarks</h1>"]
    for name, result in results.items():
        parts.append(f"<h2>{html.escape(name)}</h2>")
        parts += [f"<p>{html.escape(line)}</p>" for line in _lines(result)]
        parts += _plots(result)
        for title, (head, rows) in _tables(result).items():
            cells = "".join(_tags("td", row) for row in rows)
            parts.append(
                f"<h3>{html.escape(title)}</h3><div class='wide'><table>{_tags('th', head)}{cells}</table></div>"
            )
    return page("Benchmarks", "".join(parts), _STYLE)


def _lines(result: Result) -> list[str]:
    """What a result comes to, in sentences."""
    machine = result["machine"]
    lines = [
        f"{result['command']}, on {machine['device']}, {machine['cores']} cores, torch {machine['torch']}, halfstep "
        f"{machine['halfstep']}."
    ]
    if result["benchmark"] == "canary":
        return [*lines, *_of_the_canary_alone(result)]
    if result["benchmark"] == "compare":
        of = result["against"]
        lines.append(f"The working tree against {of['revision']} ({of['commit'][:12]}), which is the baseline.")
    canary = result["canary"]
    if canary is not None:
        lines.append(
            f"Canary: {canary['case']} against itself is {_ratio(canary)}, {canary['verdict']} after {canary['pairs']} "
            "pairs."
        )
        if not canary["can_tell"]:
            lines.append("This machine cannot tell: it calls the baseline slower than itself. No verdict counts.")
    lines.append(f"Verdict: {result['verdict']}. Slower means by more than {result['tolerance']:.0%}, at 99%.")
    return lines


def _of_the_canary_alone(result: Result) -> list[str]:
    same, more = result["same"], result["ten_percent_more"]
    return [
        f"Beside {result['busy_processes']} busy processes, the same was called slower in {result['false_alarms']} of "
        f"{same['trials']} trials; 10% more work was found in {result['found']} of {more['trials']}, and called fine "
        f"in {result['called_fine']}."
    ]


def _tables(result: Result) -> dict[str, Table]:
    if result["benchmark"] == "canary":
        trials = {"the same": result["same"], "10% more work": result["ten_percent_more"]}
        rows = [
            [f"{name}, by {clock}", *(str(count) for count in facts[key].values())]
            for name, facts in trials.items()
            for clock, key in (("CPU time", "verdicts"), ("wall time", "verdicts_by_wall_seconds"))
        ]
        return {"Verdicts": (["", *result["same"]["verdicts"]], rows)}
    sides = _sides(result)
    tables = {}
    judged = [row for row in result["rows"] if row["against"] is not None]
    if judged:
        head = ["case", "ratio", "99% interval", "pairs", "p (slower)", "verdict"]
        tables["Against the baseline"] = head, [[row["case"], *_judged(row["against"])] for row in judged]
    head = ["case", "p50 ms", "p99 ms", "CPU ms", "wall ms", "peak MB", "energy J", "calls"]
    tables["A call"] = head, [[name, *_figures(figures)] for name, figures in sides]
    names = list(dict.fromkeys(name for _, figures in sides for name in figures["switches"]))
    values = [[name, *(_value(figures["switches"].get(key)) for key in names)] for name, figures in sides]
    tables["Switches"] = ["case", *names], values
    missing = {**result.get("absent", {}), **result["failed"]}
    if missing:
        tables["Not measured"] = ["case", "why"], [[name, why] for name, why in missing.items()]
    return tables


def _sides(result: Result) -> list[tuple[str, Result]]:
    """Every case that was measured, by name: in a comparison of revisions, each twice."""
    if result["benchmark"] == "suite":
        return [(row["case"], row) for row in result["rows"]]
    return [(f"{row['case']}, {side}", row[side]) for row in result["rows"] for side in ("before", "after")]


def _judged(against: Result) -> list[str]:
    low, high = against["low"], against["high"]
    return [
        f"{against['ratio']:.3f}",
        f"{low:.3f} to {high:.3f}",
        str(against["pairs"]),
        f"{against['p_slower']:.2g}",
        against["verdict"],
    ]


def _figures(figures: Result) -> list[str]:
    numbers = (figures[key] for key in ("p50_ms", "p99_ms", "cpu_ms", "wall_ms", "peak_memory_mb"))
    energy = figures["energy_j"]
    told = f"({figures['energy_missing']})" if energy is None else f"{energy:.4g}"
    return [*(f"{number:.4g}" for number in numbers), told, str(figures["calls"])]


def _ratio(against: Result) -> str:
    return f"{against['ratio']:.3f} times ({against['low']:.3f} to {against['high']:.3f})"


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in cells) + " |"


def _tags(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _plots(result: Result) -> list[str]:
    """Each ratio with its pairs, and what a call takes."""
    if result["benchmark"] == "canary":
        return []
    judged = {row["case"]: row["against"] for row in result["rows"] if row["against"] is not None}
    if result["canary"] is not None:
        judged[f"canary: {result['canary']['case']}"] = result["canary"]
    return [_ratios(judged, result["tolerance"]), _calls(dict(_sides(result)))]


def _ratios(judged: Mapping[str, Result], tolerance: float) -> str:
    from matplotlib.figure import Figure

    from halfstep.analyze.plots import COLORS

    colors = {"fine": COLORS[2], "slower": COLORS[1], "undecided": COLORS[7]}
    figure = Figure(figsize=(9, 0.42 * len(judged) + 1.1), layout="constrained")
    axes = figure.subplots()
    for place, against in enumerate(list(judged.values())[::-1]):
        color = colors[against["verdict"]]
        pairs = [math.exp(value) for value in against["log_ratios"]]
        axes.plot(pairs, [place] * len(pairs), "|", color=color, alpha=0.35)
        axes.plot([against["low"], against["high"]], [place, place], "-", color=color, linewidth=2)
        axes.plot(against["ratio"], place, "o", color=color, markersize=5)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.axvline(1 + tolerance, color=COLORS[1], linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(judged)), list(judged)[::-1], fontsize=9)
    axes.set(xlabel="cost as a multiple of the baseline's: pairs, their median, its 99% interval; dashed: tolerance")
    axes.xaxis.label.set_fontsize(9)
    return _svg(figure, "Cost against the baseline")


def _calls(sides: Mapping[str, Result]) -> str:
    from matplotlib.figure import Figure

    from halfstep.analyze.plots import COLORS

    figure = Figure(figsize=(9, 0.34 * len(sides) + 1.1), layout="constrained")
    axes = figure.subplots()
    for place, figures in enumerate(list(sides.values())[::-1]):
        axes.plot([figures["p50_ms"], figures["p99_ms"]], [place, place], "-", color=COLORS[0], linewidth=2)
        axes.plot(figures["p50_ms"], place, "o", color=COLORS[0], markersize=5)
        axes.plot(figures["cpu_ms"], place, "|", color=COLORS[1], markersize=10)
    axes.set_yticks(range(len(sides)), list(sides)[::-1], fontsize=9)
    axes.set_xscale("log")
    axes.set(xlabel="milliseconds of a call: half of them (dot) to 99% (line's end), CPU time (bar)")
    axes.xaxis.label.set_fontsize(9)
    return _svg(figure, "Time of a call")


def _svg(figure: Any, told: str) -> str:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(-0.6, len(axes.get_yticks()) - 0.4)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<img alt='{html.escape(told)}' src='data:image/svg+xml;base64,{data}'>"
