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
    sections = [
        "<h1>halfstep: a toy world, to latents, through training, and back</h1>",
        f"<p class='soft'>{html.escape(result.probed.device)}, torch {html.escape(result.probed.torch_version)}; "
        f"the whole demonstration took {result.seconds:.0f} seconds.</p>",
        "<div class='facts'>"
        + "".join(f"<div class='fact'><b>{a}</b><span>{b}</span></div>" for a, b in facts)
        + "</div>",
        "<h2>What went in and what came back</h2>",
        "<p>Above, what the codec saw; below, the same frame decoded from the store. The built-in codec keeps 16 of "
        "the 192 numbers of each 8&times;8 block, so fine texture is lost; "
        "storing in half precision is not what loses it.</p>",
        _pictures(result),
        "<h2>What half precision costs: PSNR by storage type</h2>",
        _storage_table(result),
        "<h2>What it saves: bytes</h2>",
        _bar_chart({name: size / 1e6 for name, size in result.bytes_by_form.items()}, "MB for all frames", "{:.2f}"),
        "<h2>Speed by precision</h2>",
        "<p>Frames a second through the encoder, all precisions in turn. A half type is only worth having where the "
        "device really has it. The built-in codec is one small convolution, which conversions slow down as much as "
        "half products speed it up; <code>auto</code> goes by the mix of operations of a real autoencoder, below.</p>",
        _bar_chart(result.speed_by_precision, "frames a second", "{:.0f}", highlight=str(result.policy).split(",")[0]),
        *_learned(result.learned),
        "<h2>Why this precision</h2>",
        f"<pre>{html.escape(result.policy.explain())}</pre>",
        _probe_table(result),
    ]
    write_durably(path, page("halfstep demo", "\n".join(sections), _STYLE).encode())


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


def _learned(learned: Learned) -> list[str]:
    """Training, samples, predictions and trajectories."""
    fp32 = learned.curves["fp32"].seconds_per_step
    rows = "".join(
        f"<tr><td>{name}</td><td>{1e3 * curve.seconds_per_step:.0f} ms</td><td>{fp32 / curve.seconds_per_step:.2f}x"
        f"</td><td>{curve.losses[-1]:.3f}</td></tr>"
        for name, curve in learned.curves.items()
    )
    stored, plain = learned.run_bytes
    ahead = "".join(f"<th>{k + 1}</th>" for k in range(len(learned.walk_psnr)))
    scores = "".join(
        f"<tr><td>{name}</td>" + "".join(f"<td>{value:.1f}</td>" for value in values) + "</tr>"
        for name, values in (("predicted", learned.walk_psnr), ("last frame kept", learned.copy_psnr))
    )
    half = learned.policy.split(",")[0]
    saved = learned.eqm.steps[-1] * (fp32 - learned.curves[half].seconds_per_step) if half in learned.curves else 0.0
    return [
        "<h2>Training, in each precision</h2>",
        "<p>A small EqM on clips of four frames: the same weights, data and noise, so that curves differ by rounding "
        "alone; they ran one after the other. "
        f"<code>auto</code> chose {html.escape(learned.policy)} for training, which "
        f"{'saved' if saved >= 0 else 'cost'} {abs(saved):.0f} s in the {learned.eqm.steps[-1]} steps that the samples "
        "below come from.</p>",
        _curves(learned.curves, "EqM, the first steps"),
        f"<table><tr><th></th><th>a step</th><th>against fp32</th><th>loss</th></tr>{rows}</table>",
        _curves({"EqM on clips": learned.eqm}, "The whole training"),
        _curves({"CDiT on walks": learned.cdit}, "The whole training"),
        "<h2>Clips from the EqM</h2>",
        f"<p>From noise in {learned.states - 1} updates each, after {_seconds(learned.eqm)} of training: colors, "
        "walls and floor come first, a world much later.</p>",
        *_rows(learned.clips, "clip"),
        "<h2>Walks: what happened, and what the CDiT expected</h2>",
        "<p>Above, the real frames; below, those predicted one after the other from two context frames and the "
        f"actions alone, after {_seconds(learned.cdit)} of training. {_against_a_copy(learned)}</p>",
        *_rows(learned.walks, "walk"),
        f"<table><tr><th>PSNR (dB), frames ahead</th>{ahead}</tr>{scores}</table>",
        "<h2>How the clips came about</h2>",
        f"<p>Every state of the sampling was recorded while it ran: {stored / 1e6:.2f} MB instead of "
        f"{plain / 1e6:.2f} MB in fp32 ({100 * stored / plain:.0f}%). The full analysis is in "
        "<code>analysis/report.html</code> beside this page.</p>",
        *(_file(path) for path in learned.plots[:2]),
    ]


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
