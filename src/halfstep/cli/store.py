"""halfstep store verify | repair | inspect | export | convert"""

from __future__ import annotations

import json as json_module
import math
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from halfstep.errors import InputError

app = typer.Typer(help="Look at, check, mend, export and convert a latent or trajectory store.", no_args_is_help=True)

_Store = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the store.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@app.command()
def verify(
    store: Annotated[str, typer.Argument(metavar="DIR", help="Folder; of recorded runs also an fsspec URL.")],
    json: _Json = False,
) -> None:
    """Hold every byte of the store against its checksums; exit code 1 when something is wrong."""
    from halfstep.files import located
    from halfstep.store import find_trajectory_store
    from halfstep.store import verify as run_verify

    if (trajectories := find_trajectory_store(store)) is not None:
        _verify_trajectories(str(trajectories), json)
    folder = located(store)
    if not isinstance(folder, Path):
        raise InputError(f"{store}: no recorded runs; a store of latents is verified on the disk that it lies on")
    _refuse_batch(folder)
    report = run_verify(folder)
    if json:
        facts = {"ok": report.ok, "shards": report.shards, "items": report.items, "problems": report.problems}
        typer.echo(json_module.dumps(facts))
    else:
        for problem in report.problems:
            typer.echo(f"{store}: {problem}")
        typer.echo(f"{store}: {'ok' if report.ok else 'NOT ok'}, {report.items} items in {report.shards} shards")
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def repair(store: _Store, json: _Json = False) -> None:
    """Rebuild what can be rebuilt and drop only sequences, or steps of a run, whose own bytes are damaged."""
    from halfstep.store import find_trajectory_store
    from halfstep.store import repair as run_repair

    if (trajectories := find_trajectory_store(store)) is not None:
        _repair_trajectories(Path(str(trajectories)), json)
    _refuse_batch(store)
    report = run_repair(store)
    if json:
        typer.echo(json_module.dumps({"rebuilt": report.rebuilt, "lost": report.lost}))
    else:
        for name in report.rebuilt:
            typer.echo(f"{store}: rebuilt {name}")
        for key in report.lost:
            typer.echo(f"{store}: lost {key}; encode its source again")
        typer.echo(f"{store}: {len(report.rebuilt)} parts rebuilt, {len(report.lost)} sequences lost")
    raise typer.Exit(1 if report.lost else 0)


@app.command()
def inspect(
    store: Annotated[str, typer.Argument(metavar="DIR", help="Folder or fsspec URL.")], json: _Json = False
) -> None:
    """Say what a store holds: autoencoder, latents, types, numerics, sequences; or runs, steps and their problems."""
    from dataclasses import asdict

    from halfstep.files import located
    from halfstep.store import DatasetStore, find_trajectory_store

    folder = located(store)
    is_batch = isinstance(folder, Path) and folder.is_dir() and not (folder / "manifest.json").exists()
    if is_batch or find_trajectory_store(folder) is not None:
        _inspect_trajectories(store, json)
        return
    opened = DatasetStore.open(store)
    manifest = opened.manifest
    keys = opened.keys()
    shape = list(opened.read(keys[0], 0, 1).shape[1:]) if keys else []
    labels = sorted({label for key in keys if (label := opened.label(key)) is not None})
    facts = {
        "sequences": len(keys),
        "items": len(opened),
        "bytes": opened.latent_bytes(),
        "latent_shape": shape,
        "arrays": sorted(opened.arrays(keys[0])) if keys else [],
        "labels": len(labels),
        **asdict(manifest),
    }
    if json:
        typer.echo(json_module.dumps(facts))
        return
    spec = manifest.spec
    typer.echo(f"{store}: {len(opened)} items in {len(keys)} sequences, {facts['bytes']:,} bytes of latents")
    typer.echo(f"  latents      {shape} in {manifest.storage}; arrays {', '.join(facts['arrays'])}")
    typer.echo(
        f"  autoencoder  {spec.autoencoder} {spec.revision or ''} weights {spec.weights_sha256[:12] or 'unknown'}"
    )
    if spec.pixels is not None:
        typer.echo(f"  pixels       {spec.pixels}")
    typer.echo(f"  encoded in   {manifest.policy}, by {manifest.created_with}")
    if manifest.numerics:
        typer.echo("  numerics     " + ", ".join(f"{name} {count}" for name, count in manifest.numerics.items()))
    if labels:
        typer.echo(f"  labels       {len(labels)}: {', '.join(labels[:8])}{' ...' if len(labels) > 8 else ''}")


@app.command()
def export(
    store: Annotated[str, typer.Argument(metavar="DIR", help="Folder or fsspec URL.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="New folder.")],
    form: Annotated[str, typer.Option("--format", metavar="F", help="pt-tree, npy or webdataset.")] = "pt-tree",
    json: _Json = False,
) -> None:
    """Write the latents, model-ready in fp32, in the format of another tool."""
    from halfstep.data.export import export as run_export
    from halfstep.store import DatasetStore

    items = run_export(DatasetStore.open(store), form, output)
    if json:
        typer.echo(json_module.dumps({"items": items, "format": form, "output": str(output)}))
    else:
        typer.echo(f"{output}: {items} items as {form}")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Batch folder, or trajectory store (also a URL).")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Store, or new batch folder.")],
    to: Annotated[str | None, typer.Option(metavar="KIND", help="store or npy.gz; the other one by default.")] = None,
    codec: Annotated[str, typer.Option(metavar="C", help="predictive, blosc or raw.")] = "predictive",
    storage: Annotated[
        str, typer.Option(metavar="TYPE", help="The error of fp16 or bf16 casting; fp32 is exact.")
    ] = "fp16",
    max_error: Annotated[float | None, typer.Option(metavar="E", help="Or the largest error of a value.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="That error in every channel of every step, not up to 1.5 times.")
    ] = False,
    json: _Json = False,
) -> None:
    """Recorded latents of one file a step into a trajectory store, or back; the same command again goes on."""
    from dataclasses import asdict

    from halfstep.cli.progress import Bar
    from halfstep.store import TrajectoryFormat, find_trajectory_store, open_trajectories, readable_runs
    from halfstep.store.convert import to_batch, to_store

    runs, unreadable = readable_runs(open_trajectories(source))
    if to is None:
        to = "store" if find_trajectory_store(source) is None else "npy.gz"
    if to not in ("store", "npy.gz"):
        raise InputError(f"--to: got {to!r}; expected store or npy.gz")

    with Bar("converting", "runs", hidden=json) as progress:
        if to == "store":
            report = to_store(runs, output, TrajectoryFormat(codec, storage, max_error, strict), progress)
        else:
            report = to_batch(runs, output, progress)
    report.notes.extend(unreadable)
    if json:
        typer.echo(json_module.dumps(asdict(report)))
        return
    for line in _together(report.notes):
        typer.echo(line)
    share = f", {report.bytes / report.fp32_bytes:.3f} of fp32" if report.fp32_bytes and not report.skipped else ""
    typer.echo(
        f"{output}: {report.converted} runs converted, {report.skipped} there already; {report.bytes:,} bytes{share}"
    )


def _together(notes: list[str]) -> list[str]:
    """Notes `run: line`, those of one line in more than three runs as one."""
    count = Counter(note.partition(": ")[2] for note in notes)
    lines = [f"{number} runs: {line}" for line, number in count.items() if number > 3]
    return lines + [note for note in notes if count[note.partition(": ")[2]] <= 3]


def _refuse_batch(path: Path) -> None:
    """Files of one step each have no checksums to hold them against, and nothing to rebuild them from."""
    if any(path.rglob("step_*_metadata.json")):
        raise InputError(f"{path}: a batch of one file a step; `halfstep store inspect` says what is wrong with it")


def _verify_trajectories(store: str, json: bool) -> NoReturn:
    from dataclasses import asdict

    from halfstep.store import verify_trajectories

    report = verify_trajectories(store)
    if json:
        typer.echo(json_module.dumps({"ok": report.ok, **asdict(report)}))
    else:
        for problem in report.problems:
            typer.echo(problem)
        for key in report.incomplete:
            typer.echo(f"{store}/{key}: incomplete, its recording did not finish; what it has is sound")
        typer.echo(f"{store}: {'ok' if report.ok else 'NOT ok'}, {report.steps} steps in {report.runs} runs")
    raise typer.Exit(0 if report.ok else 1)


def _repair_trajectories(store: Path, json: bool) -> NoReturn:
    from dataclasses import asdict

    from halfstep.store import repair_trajectories

    report = repair_trajectories(store)
    if json:
        typer.echo(json_module.dumps(asdict(report)))
    else:
        for key, steps in report.recovered.items():
            typer.echo(f"{store}/{key}: recovered {steps} steps from its journal")
        for line in report.lost:
            typer.echo(line)
        typer.echo(f"{store}: {sum(report.recovered.values())} steps recovered, {len(report.lost)} losses")
    raise typer.Exit(1 if report.lost else 0)


def _inspect_trajectories(path: str, json: bool) -> None:
    from halfstep.files import located
    from halfstep.store import open_trajectories, readable_runs
    from halfstep.store.convert import folder_bytes

    runs, problems = readable_runs(open_trajectories(path))
    facts: dict[str, dict[str, Any]] = {}
    for key in runs:
        run = runs[key]
        facts[key] = {
            "steps": len(run),
            "shape": list(run.latents.shape[1:]),
            "sigmas": [None if value != value else value for value in run.sigmas.tolist()],
            "prompt": run.prompt,
            "seed": run.seed,
            "attributes": run.attributes,
            "format": run.attributes.get("latents_format"),
            "problems": list(run.problems),
        }
    size = folder_bytes(located(path))
    if json:
        typer.echo(json_module.dumps({"runs": facts, "bytes": size, "problems": problems}))
        return
    typer.echo(f"{path}: {len(facts)} runs, {sum(fact['steps'] for fact in facts.values())} steps, {size:,} bytes")
    for key, fact in facts.items():
        typer.echo(
            f"  {key:24} {fact['steps']:4} steps {fact['shape']}  {fact['format']}  seed {fact['seed']}  "
            f"{fact['prompt'] or ''}"
        )
        if line := _latents_cost(fact):
            typer.echo(f"    {line}")
        for problem in fact["problems"]:
            typer.echo(f"    {problem}")
    for problem in problems:
        typer.echo(f"  {problem}")


def _latents_cost(fact: dict[str, Any]) -> str:
    """What a run's latents take, and how far they are off, where its writer noted it."""
    size, error = (fact["attributes"].get(name) for name in ("latents_bytes", "latents_error"))
    if not size or not fact["steps"]:
        return ""
    line = f"{size / (4 * fact['steps'] * math.prod(fact['shape'])):.3f} of fp32's bytes"
    if error and error["channel"] == 0:
        line += "; exact"
    elif error:
        line += f"; errors as shares of casting's: {error['all']:.2f} over the run, "
        line += f"{error['state']:.2f} in the worst step, {error['channel']:.2f} in the worst channel of a step"
    return line
