"""An audit as one HTML page that needs nothing else."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterable, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from halfstep.page import STYLE, page
from halfstep.precision.audits.audit import AuditReport, Finding
from halfstep.precision.audits.cure import is_inside
from halfstep.precision.audits.gradients import GradientReport
from halfstep.precision.audits.spread import Range
from halfstep.precision.audits.trace import Event
from halfstep.precision.policy import torch_dtype

# Okabe and Ito (2008): tells apart for all kinds of color vision.
_HALF, _FP32, _LIMIT, _REACHES = "#0072B2", "#D55E00", "#4D4D4D", "#009E73"
_MOST_ROWS = 40
_TINY = 1e-30  # what is smaller is drawn there

WORDS = {
    "overflow": "overflows",
    "not finite": "is not finite",
    "lost": "is lost",
    "weights": "weights do not fit",
    "reads": "reads what does not fit",
    "two types": "multiplies two types",
    "fails": "fails in half",
}

_STYLE = f"""{STYLE}
.verdict {{ font-size: 1.15rem; padding: .7rem 1rem; border-left: 5px solid #009E73; background: #f2faf6; }}
.verdict.not {{ border-color: #D55E00; background: #fdf3ec; }}
pre {{ background: #f5f7fa; padding: .8rem 1rem; font-size: .85rem; white-space: pre-wrap; overflow-wrap: anywhere; }}
td {{ white-space: nowrap; }} td.left {{ white-space: normal; }} svg {{ width: 100%; height: auto; }}
"""


def render_page(report: AuditReport, name: str, gradients: GradientReport | None = None) -> str:
    """The page of an audit of a model by that name."""
    kind = report.target.type
    parts = [
        f"<h1>Which numbers of {_text(name)} may be {kind}</h1>",
        f"<p class='verdict{'' if report.met else ' not'}'>{_text(report.verdict)}.</p>",
        f"<p class='soft'>The arithmetic was simulated ({_text(str(report.target))}), in {report.forwards} passes; it "
        "is verified only once it ran on the device.</p>",
        "<h2>Use it</h2>",
        f"<pre>{_text(usage(report))}</pre>",
        "<h2>What the type has no room for</h2>",
        *_findings(report),
        "<h2>Range of every operation</h2>",
        f"<p>In fp32, in the order of the pass. Above the upper line {kind} overflows; between the lower lines it has "
        "fewer and fewer digits, below them none.</p>",
        _svg(_ranges(report)),
    ]
    if any(r.reaches for r in report.ranges):
        parts += [
            "<h2>Where error is born, and what reaches the output</h2>",
            "<p>Relative error of rounding the result of each operation, and to first order what of it arrives.</p>",
            _svg(_errors(report.ranges)),
        ]
    if report.risks:
        parts += [
            "<h2>Less than two bits to spare</h2>",
            "<p>These stay half and fit here; another input may be four times as large.</p>",
            _table(("module", "operation", "line", "largest"), [_risk(r) for r in report.risks[:_MOST_ROWS]]),
            _more(len(report.risks)),
        ]
    if report.opaque:
        names = ", ".join(f"<code>{_text(name)}</code>" for name in report.opaque)
        parts += [
            "<h2>What could not be seen</h2>",
            f"<p>These computed in fp32, only their results were rounded: {names}.</p>",
        ]
    if gradients is not None:
        parts += _gradients(gradients, kind)
    return page(f"{name}: {kind}", "\n".join(parts), _STYLE)


def usage(report: AuditReport) -> str:
    """The lines of Python that apply the policy."""
    lines = ["from halfstep.precision import PrecisionPolicy, prepare"]
    if report.rescaling:
        lines = ["from halfstep.precision import PrecisionPolicy, Rescaling, prepare, rescale", ""]
        parts = ", ".join(f"{part}={dict(getattr(report.rescaling, part))}" for part in ("weights", "biases", "eps"))
        lines.append(f"rescale(module, Rescaling({parts}))")
    lines.append(f'prepare(module, PrecisionPolicy.parse("{report.policy}"))')
    return "\n".join(lines)


def _findings(report: AuditReport) -> Iterable[str]:
    if not report.findings:
        yield f"<p>Nothing: no value overflows {report.target.type} or is lost in it.</p>"
        return
    yield (
        "<p>Each where it is born, the most harmful first. Harm is the error of the output when all else is cured and "
        "this is not; none where it does no harm.</p>"
    )
    rows = [_finding(finding) for finding in report.findings[:_MOST_ROWS]]
    yield _table(("module", "what", "operation", "line", "largest", "made by", "kept in fp32", "harm"), rows)
    yield _more(len(report.findings))


def _finding(finding: Finding) -> tuple[str, ...]:
    event = finding.event
    return (
        event.module or "(the module itself)",
        WORDS[event.kind],
        event.operation,
        event.line,
        f"{event.largest:.3g}",
        ", ".join(event.producers[:2]),
        finding.cure,
        harm(finding),
    )


def harm(finding: Finding) -> str:
    """In words."""
    if finding.harm is None:
        return "not tried"
    if finding.harm == float("inf"):
        return "not finite"
    return f"{finding.harm:.2g}" if finding.harm else "none"


def _risk(entry: Event) -> tuple[str, ...]:
    return entry.module or "(the module itself)", entry.operation, entry.line, f"{entry.largest:.3g}"


def _gradients(report: GradientReport, kind: str) -> Iterable[str]:
    yield "<h2>Training</h2>"
    yield (
        f"<p>The largest gradient is {report.largest:.3g}. Start from a loss scale of {report.scale:g}: the shares of "
        f"the backward pass that {kind} loses are</p>"
    )
    rows = [
        (f"{scale:g}", f"{share:.2%}", "overflows" if scale in report.overflows else "")
        for scale, share in report.lost.items()
        if scale <= max(4 * report.scale, 2.0**16)
    ]
    yield _table(("scale", "lost", ""), rows)


def _ranges(report: AuditReport) -> Figure:
    info = torch.finfo(torch_dtype(report.target.type))
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    axes = figure.subplots()
    numbered = [(number, entry) for number, entry in enumerate(report.ranges) if entry.largest > 0]
    islands = set(report.islands)
    # What is beyond the type was verified to do no harm, so it is fp32 in a sum with what an island handed on.
    in_fp32 = [number for number, entry in numbered if is_inside(entry.module, islands) or entry.largest > info.max]
    for label, color, chosen in (
        ("half", _HALF, [pair for pair in numbered if pair[0] not in in_fp32]),
        ("fp32", _FP32, [pair for pair in numbered if pair[0] in in_fp32]),
    ):
        places = [number for number, _ in chosen]
        if places:
            axes.scatter(places, [r.largest for _, r in chosen], s=12, color=color, label=f"largest, in {label}")
            typical = [max(r.typical, _TINY) for _, r in chosen]
            axes.scatter(places, typical, s=4, color=color, alpha=0.4, label=f"typical, in {label}")
    for value, label in (
        (info.max, f"largest {report.target.type}"),
        (info.smallest_normal, "smallest with all its digits"),
        (info.smallest_normal * info.eps, "smallest"),
    ):
        if value > _TINY:
            axes.axhline(value, color=_LIMIT, linewidth=1, linestyle="--")
            axes.annotate(
                label,
                (1.0, value),
                xycoords=("axes fraction", "data"),
                xytext=(4, -3),
                textcoords="offset points",
                fontsize=8,
                color=_LIMIT,
            )
    axes.set_yscale("log")
    axes.set_ylabel("absolute value")
    _by_module(axes, report.ranges)
    figure.legend(fontsize=8, loc="outside upper left", ncols=4, frameon=False)
    return figure


def _errors(ranges: Sequence[Range]) -> Figure:
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    axes = figure.subplots()
    for label, color, values in (
        ("born", _HALF, [(n, r.born) for n, r in enumerate(ranges) if 0 < r.born < float("inf")]),
        ("reaches the output", _REACHES, [(n, r.reaches) for n, r in enumerate(ranges) if r.reaches]),
    ):
        axes.scatter([n for n, _ in values], [value for _, value in values], s=8, color=color, label=label)
    axes.set_yscale("log")
    axes.set_ylabel("relative error")
    _by_module(axes, ranges)
    figure.legend(fontsize=8, loc="outside upper left", ncols=2, frameon=False)
    return figure


def _by_module(axes: Axes, ranges: Sequence[Range]) -> None:
    """Names on the axis where another part of the module begins, as many as have room."""
    places: list[tuple[int, str]] = []
    for number, entry in enumerate(ranges):
        part = ".".join(entry.module.split(".")[:3])
        if not places or (places[-1][1] != part and number - places[-1][0] >= max(1, len(ranges) // 24)):
            places.append((number, part))
    axes.set_xticks(
        [number for number, _ in places], [part[-34:] for _, part in places], rotation=60, ha="right", fontsize=7
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)


def _svg(figure: Figure) -> str:
    target = io.StringIO()
    figure.savefig(target, format="svg")
    text = target.getvalue()
    return f"<div class='wide'>{text[text.index('<svg') :]}</div>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    left = {"module", "what", "operation", "line", "made by", "kept in fp32"}
    kinds = ["left" if head in left else "" for head in heads]
    top = "".join(f"<th class='{kind}'>{_text(head)}</th>" for head, kind in zip(heads, kinds, strict=True))
    body = "".join(
        "<tr>"
        + "".join(
            f"<td class='{kind}'>{_breakable(cell) if kind else _text(cell)}</td>"
            for cell, kind in zip(row, kinds, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f"<div class='wide'><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def _more(count: int) -> str:
    return f"<p class='soft'>And {count - _MOST_ROWS} more.</p>" if count > _MOST_ROWS else ""


def _text(value: str) -> str:
    return html.escape(value)


def _breakable(value: str) -> str:
    """A dotted name that may be broken where its parts end."""
    return re.sub(r"([._])", r"\1<wbr>", _text(value))
