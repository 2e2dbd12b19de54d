"""halfstep analyze"""

from __future__ import annotations

import json as json_module
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfstep.errors import InputError

if TYPE_CHECKING:
    from halfstep.analyze import Analysis, StorageComparison
    from halfstep.store import Run


_MOST_RUNS = 40  # that get a line each


def analyze(
    batch_dir: Annotated[str, typer.Option(metavar="DIR", help="Batch folder, or trajectory store (also a URL).")],
    more: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="More of --compare-videos.")] = None,
    list_videos: Annotated[bool, typer.Option("--list-videos", help="Say which runs there are.")] = False,
    video_id: Annotated[str | None, typer.Option(metavar="ID", help="This run only.")] = None,
    compare_videos: Annotated[
        list[str] | None, typer.Option(metavar="ID ID ...", help="These runs, one against the other.")
    ] = None,
    groups: Annotated[
        str, typer.Option(metavar="prompt|FILE", help="By prompt, or a YAML of group: \\[run or prompt patterns].")
    ] = "prompt",
    metrics: Annotated[str | None, typer.Option(metavar="A,B", help="Only these metrics.")] = None,
    compare_storage: Annotated[
        bool,
        typer.Option("--compare-storage", help="Repeat it with the latents as fp16, bf16 and the codec keep them."),
    ] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="OUT", help="Folder for report, plots and tables.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing on the way.")] = False,
) -> None:
    """Measure how recorded runs move through latent space, and test what differs between groups of them."""
    from halfstep.store import open_trajectories, readable_runs

    runs, problems = readable_runs(open_trajectories(batch_dir))
    if list_videos:
        _list(runs, problems, json)
        return
    compared = [*(compare_videos or []), *(more or [])]
    if more and not compare_videos:
        raise InputError(f"analyze: got {' '.join(more)!r}; run names follow --video-id or --compare-videos")
    if compared and len(set(compared)) < 2:
        raise InputError("--compare-videos: give two runs or more")
    if compared and video_id is not None:
        raise InputError("--video-id: looks at one run; leave it out to compare several")
    from halfstep.analyze import analyze as run_analyze
    from halfstep.analyze import claim_output, full_document, group_by_file, group_by_prompt, write_output
    from halfstep.analyze import compare_storage as run_compare_storage
    from halfstep.cli.progress import Bar

    if output is not None:
        claim_output(output)  # before the work

    if compared or video_id is not None:
        chosen = {key: key for key in (compared or [str(video_id)])}
        for key in chosen:
            if key not in runs:
                raise InputError(f"{batch_dir}: no run {key!r}; --list-videos shows them")
    else:
        chosen = group_by_prompt(runs) if groups == "prompt" else group_by_file(runs, Path(groups))
    names = None if metrics is None else [name.strip() for name in metrics.split(",")]
    with Bar("analyzing", "runs", hidden=quiet) as progress:
        analysis = run_analyze(
            runs, chosen, metrics=names, pairwise=bool(compared), problems=problems, progress=progress
        )
        storage = run_compare_storage(runs, chosen, analysis, progress=progress) if compare_storage else []
    if output is not None:
        write_output(analysis, output, f"Trajectories of {batch_dir}", storage)
    if json:
        typer.echo(json_module.dumps(full_document(analysis, storage), ensure_ascii=False))
        return
    _print(analysis, storage)
    if output is not None:
        typer.echo(f"{output / 'report.html'}: open it in a browser")


def _list(runs: Mapping[str, Run], problems: list[str], json: bool) -> None:
    facts: dict[str, dict[str, Any]] = {}
    for key in runs:
        run = runs[key]
        facts[key] = {"prompt": run.prompt, "seed": run.seed, "states": len(run), "problems": list(run.problems)}
    if json:
        typer.echo(json_module.dumps({"runs": facts, "problems": problems}, ensure_ascii=False))
        return
    for key, fact in facts.items():
        mark = f"  ({len(fact['problems'])} problems)" if fact["problems"] else ""
        typer.echo(f"{key:24} {fact['states']:4} states  seed {fact['seed']}  {fact['prompt'] or ''}{mark}")
    for problem in problems:
        typer.echo(f"problem: {problem}")


def _print(analysis: Analysis, storage: list[StorageComparison]) -> None:
    from halfstep.analyze.metrics import METRIC_NAMES
    from halfstep.analyze.words import findings, number

    for run in analysis.runs[:_MOST_RUNS]:
        values = ", ".join(f"{METRIC_NAMES[name]} {number(value)}" for name, value in run.metrics.items())
        typer.echo(f"{run.key}: {values}")
    if len(analysis.runs) > _MOST_RUNS:
        typer.echo(f"... and {len(analysis.runs) - _MOST_RUNS} more runs; --json and -o OUT have all of them")
    for line in findings(analysis):
        typer.echo(line)
    for pair in analysis.pairs:
        typer.echo(f"{pair.a} and {pair.b}: {number(pair.distance[-1])} apart at the end" if pair.distance else
                   f"{pair.a} and {pair.b}: no noise level in common")  # fmt: skip
    for item in storage:
        known = {name: largest for name, (_, largest) in item.differences.items() if not math.isnan(largest)}
        worst = max(known, key=lambda name: known[name], default=None)
        change = "no metric to compare" if worst is None else f"{known[worst]:.2g} ({METRIC_NAMES[worst]})"
        typer.echo(
            f"{item.format}: {item.share:.3f} of fp32, largest relative change {change}, "
            f"{len(item.changed)} of {item.tests} verdicts changed"
        )
    for problem in analysis.problems:
        typer.echo(f"problem: {problem}")
