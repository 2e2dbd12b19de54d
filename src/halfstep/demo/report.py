"""The demonstration's report: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from halfstep.data.base import Array
from halfstep.demo.learn import Curve, Learned
from halfstep.demo.run import DemoResult
from halfstep.files import write_durably
from halfstep.page import page

_INK, _SOFT, _ACCENT, _MUTED = "#1d2430", "#5d6778", "#2f6fed", "#c3ccda"

_STYLE = f"""
body {{ font: 16px/1.55 system-ui, sans-serif; color: {_INK}; background: #fff; margin: 0 auto; max-width: 940px;
       padding: 2rem 1.25rem 4rem; }}
h1 {{ font-size: 1.9rem; margin: 0 0 .3rem; }} h2 {{ font-size: 1.2rem; margin: 2.4rem 0 .5rem; }}
p {{ margin: .4rem 0; max-width: 46rem; }} .soft {{ color: {_SOFT}; }}
.facts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: .8rem; margin: 1.4rem 0; }}
.fact {{ border: 1px solid #e3e8f0; border-radius: 10px; padding: .8rem 1rem; }}
.fact b {{ display: block; font-size: 1.45rem; }} .fact span {{ color: {_SOFT}; font-size: .88rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: .35rem .9rem; border-bottom: 1px solid #e3e8f0; }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; }} th {{ font-weight: 600; color: {_SOFT}; }}
.pairs {{ display: grid; grid-template-columns: repeat(4, 1fr); gap: .6rem; margin-top: 1rem; }}
.pairs img, .chart {{ width: 100%; }}
.wide {{ margin: .5rem 0; }} .wide img {{ max-width: 100%; }}
.hero {{ margin: 1.2rem 0 .6rem; }} .hero img {{ width: 100%; border-radius: 8px; margin-bottom: .6rem; }}
.clips {{ display: grid; grid-template-columns: 1fr 1fr; gap: .3rem 1rem; }}
.pairs img {{ border-radius: 6px; display: block; }} figure {{ margin: 0; }}
figcaption {{ font-size: .82rem; color: {_SOFT}; margin-top: .2rem; }} pre {{ white-space: pre-wrap; font-size: .85rem;
       background: #f5f7fb; border-radius: 8px; padding: .8rem 1rem; }}
"""


def write_report(result: DemoResult, path: Path) -> None:
    """Write `path`: pictures before and after, PSNR by storage type, sizes, speed by precision, and why `auto`
    chose."""
    stored = result.encoded.bytes
    fp32 = result.bytes_by_form["latents, fp32"]
    facts = [
        (f"{result.encoded.items}", "frames encoded"),
        (f"{result.encoded.items_per_second:.0f} / s", f"in {html.escape(result.encoded.policy)}"),
        (f"{100 * stored / fp32:.0f}%", "of the bytes of fp32 latents"),
        ("ok" if result.verified.ok else "damaged", f"store verified, {result.verified.shards} shard(s)"),
    ]
    learned = result.learned
    sections = [
        "<h1>halfstep: a small world, to latents, through training, and back</h1>",
        f"<p class='soft'>{html.escape(result.probed.device)}, torch {html.escape(result.probed.torch_version)}; "
        f"the whole demonstration took {result.seconds:.0f} seconds.</p>",
        *_hero(learned),
        "<div class='facts'>"
        + "".join(f"<div class='fact'><b>{a}</b><span>{b}</span></div>" for a, b in facts)
        + "</div>",
        *_walks(learned),
        *_clips(learned),
        "<h2>What half precision costs</h2>",
        _half_table(learned),
        _storage_table(result),
        "<h2>What it saves: bytes</h2>",
        _bar_chart({name: size / 1e6 for name, size in result.bytes_by_form.items()}, "MB for all frames", "{:.2f}"),
        "<h2>What went in and what came back</h2>",
        "<p>Above, what the autoencoder saw; below, the same frame decoded from the store. It keeps 4 numbers of the "
        "192 of each 8&times;8 block, so fine texture is lost; storing in half precision is not what loses it.</p>",
        _pictures(result),
        "<h2>Speed by precision</h2>",
        "<p>Frames a second through the encoder, in turn, of those precisions that this device does not emulate.</p>",
        _bar_chart(
            result.speed_by_precision, "frames a second", "{:.0f}", highlight=result.encoded.policy.split(",")[0]
        ),
        *_training(learned),
        "<h2>Why this precision</h2>",
        f"<pre>{html.escape(result.policy.explain())}</pre>",
        _probe_table(result),
    ]
    write_durably(path, page("halfstep demo", "\n".join(sections), _STYLE).encode())


def _hero(learned: Learned) -> list[str]:
    """What there is to see: walks as they were and as they were predicted."""
    return [
        "<figure class='hero'>"
        + "".join(f"<img alt='walk {k}' src='{_png(picture)}'>" for k, picture in enumerate(learned.cdit.pictures[:2]))
        + "<figcaption>Two walks that no network has seen. Above, the real frames; below, what a network of 3.7 "
        "million weights expected, frame after frame, from two pictures and the keys that were held.</figcaption>"
        "</figure>"
    ]


def _walks(learned: Learned) -> list[str]:
    ahead = "".join(f"<th>{k + 1}</th>" for k in range(len(learned.walk_psnr)))
    scores = "".join(
        f"<tr><td>{name}</td>" + "".join(f"<td>{value:.1f}</td>" for value in values) + "</tr>"
        for name, values in (("predicted", learned.walk_psnr), ("last frame kept", learned.copy_psnr))
    )
    return [
        "<h2>Walks: what happened, and what the CDiT expected</h2>",
        f"<p>{_against_a_copy(learned)} The network came with the package and was trained on here for "
        f"{_seconds(learned.cdit.shipped)}. <code>halfstep live</code> lets you walk through its world yourself.</p>",
        f"<table><tr><th>PSNR (dB), frames ahead</th>{ahead}</tr>{scores}</table>",
        *_rows(learned.cdit.pictures[2:], "walk"),
        f"<p class='soft'>The same network, begun anew and trained for {_seconds(learned.cdit.scratch)}:</p>",
        *_rows(learned.cdit.young, "walk of a new network"),
    ]


def _clips(learned: Learned) -> list[str]:
    stored, plain = learned.run_bytes
    return [
        "<h2>Clips from the EqM</h2>",
        f"<p>Four frames each, from noise in {learned.states - 1} updates. This network came with the package, too, "
        f"and was trained on here for {_seconds(learned.eqm.shipped)}.</p>",
        "<div class='clips'>" + "".join(_rows(learned.eqm.pictures, "clip")) + "</div>",
        f"<p class='soft'>The same network, begun anew and trained for {_seconds(learned.eqm.scratch)}:</p>",
        "<div class='clips'>" + "".join(_rows(learned.eqm.young, "clip of a new network")) + "</div>",
        "<h2>How the clips came about</h2>",
        f"<p>Every state of the sampling was recorded while it ran: {stored / 1e6:.2f} MB instead of "
        f"{plain / 1e6:.2f} MB in fp32 ({100 * stored / plain:.0f}%). The full analysis is in "
        "<code>analysis/report.html</code> beside this page.</p>",
        *(_file(path) for path in learned.plots[:2]),
    ]


def _half_table(learned: Learned) -> str:
    rows = "".join(
        f"<tr><td>{name}</td><td>{100 * error:.2f}%</td><td>{'simulated' if simulated else 'computed'} here</td></tr>"
        for name, (error, simulated) in learned.half_errors.items()
    )
    return (
        "<p>By how much a step of the CDiT differs from fp32's. Where this device has no such arithmetic, it is "
        "simulated, operation by operation.</p>"
        f"<table><tr><th>weights and arithmetic in</th><th>relative error</th><th></th></tr>{rows}</table>"
    )


def _training(learned: Learned) -> list[str]:
    fp32 = learned.curves["fp32"].seconds_per_step
    rows = "".join(
        f"<tr><td>{name}</td><td>{1e3 * curve.seconds_per_step:.0f} ms</td><td>{fp32 / curve.seconds_per_step:.2f}x"
        f"</td><td>{curve.losses[-1]:.3f}</td></tr>"
        for name, curve in learned.curves.items()
    )
    return [
        "<h2>Training, in each precision</h2>",
        "<p>The EqM, begun anew: the same weights, data and noise, so that curves differ by rounding alone; they ran "
        f"one after the other. <code>auto</code> chose {html.escape(learned.policy)} for it.</p>",
        _curves(learned.curves, "EqM, the first steps"),
        f"<table><tr><th></th><th>a step</th><th>against fp32</th><th>loss</th></tr>{rows}</table>",
        _curves({"from shipped weights": learned.eqm.shipped, "anew": learned.eqm.scratch}, "EqM on clips"),
        _curves({"from shipped weights": learned.cdit.shipped, "anew": learned.cdit.scratch}, "CDiT on walks"),
    ]


def _pictures(result: DemoResult) -> str:
    tops = "".join(
        f"<figure><img alt='original' src='{_png(s.original)}'><figcaption>{html.escape(s.name)}</figcaption></figure>"
        for s in result.frames
    )
    bottoms = "".join(
        f"<figure><img alt='decoded' src='{_png(s.decoded)}'><figcaption>decoded, {s.psnr:.1f} dB</figcaption></figure>"
        for s in result.frames
    )
    return f"<div class='pairs'>{tops}{bottoms}</div>"


def _seconds(curve: Curve) -> str:
    return f"{curve.steps[-1] * curve.seconds_per_step:.0f} seconds"


def _against_a_copy(learned: Learned) -> str:
    """Where the predictions are nearer to what happened than a world that stands still."""
    pairs = zip(learned.walk_psnr, learned.copy_psnr, strict=True)
    better = [str(ahead) for ahead, (ours, copied) in enumerate(pairs, start=1) if ours > copied]
    if not better:
        return "The last frame, kept as it is, is still nearer to what happened at every distance."
    return f"They are nearer to what happened than the last frame, kept as it is, {', '.join(better)} frames ahead."


def _rows(pictures: list[Array], what: str) -> list[str]:
    return [
        f"<figure class='wide'><img alt='{what} {number}' src='{_png(picture)}'></figure>"
        for number, picture in enumerate(pictures)
    ]


def _file(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f"<img class='chart' alt='{html.escape(path.stem)}' src='data:image/png;base64,{data}'>"


def _curves(curves: dict[str, Curve], title: str) -> str:
    figure = Figure(figsize=(9, 2.8))
    axes = figure.subplots()
    colors = [_INK, _ACCENT, "#e07a1f", "#3b9a5a"]
    for (name, curve), color in zip(curves.items(), colors, strict=False):
        axes.plot(curve.steps, curve.losses, "o-", markersize=3, linewidth=1.5, color=color, label=name)
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return _chart(figure, f"{title}: " + ", ".join(f"{n} {c.losses[-1]:.3f}" for n, c in curves.items()))


def _storage_table(result: DemoResult) -> str:
    reference = result.psnr_by_storage["fp32"]
    fp32_bytes = result.bytes_by_form["latents, fp32"]
    rows = "".join(
        f"<tr><td>{name}</td><td>{value:.3f} dB</td><td>{value - reference:+.4f} dB</td>"
        f"<td>{(fp32_bytes if name == 'fp32' else fp32_bytes // 2) / 1e6:.2f} MB</td></tr>"
        for name, value in result.psnr_by_storage.items()
    )
    return f"<table><tr><th>stored in</th><th>PSNR</th><th>against fp32</th><th>latents</th></tr>{rows}</table>"


def _probe_table(result: DemoResult) -> str:
    rows = "".join(
        f"<tr><td>{name}</td><td>{r.matmul_ms:.2f}</td><td>{r.conv_ms:.2f}</td><td>{r.conv_channels_last_ms:.2f}</td>"
        f"<td>{r.attention_ms:.2f}</td><td>{'yes' if r.sound else 'no'}</td></tr>"
        for name, r in result.probed.types.items()
    )
    heads = "".join(f"<th>{h}</th>" for h in ("ms", "matmul", "conv", "conv, channels last", "attention", "sound"))
    return f"<table><tr>{heads}</tr>{rows}</table>"


def _bar_chart(values: dict[str, float], unit: str, form: str, highlight: str | None = None) -> str:
    """Horizontal bars from zero, each with its value."""
    names, sizes = list(values), list(values.values())
    marked = highlight or next((name for name in names if "this store" in name), None)
    figure = Figure(figsize=(9, 0.5 * len(names) + 0.7))
    axes = figure.subplots()
    places = np.arange(len(names))[::-1]
    bars = axes.barh(places, sizes, color=[_ACCENT if name == marked else _MUTED for name in names], height=0.62)
    axes.bar_label(bars, [form.format(size) for size in sizes], padding=5, color=_INK, fontsize=10)
    axes.set_yticks(places, names, fontsize=10, color=_INK)
    axes.set_xlabel(unit, color=_SOFT)
    axes.margins(x=0.1)
    axes.tick_params(length=0, labelcolor=_INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    told = "; ".join(f"{name}: {form.format(size)}" for name, size in values.items())
    return _chart(figure, f"{told} ({unit})")


def _chart(figure: Figure, told: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<img class='chart' alt='{html.escape(told)}' src='data:image/png;base64,{data}'>"


def _png(picture: Array) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
