"""halfstep store verify | repair | inspect | export"""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Look at, check, mend and export a latent store.", no_args_is_help=True)

_Store = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the store.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@app.command()
def verify(store: _Store, json: _Json = False) -> None:
    """Hold every byte of the store against its checksums; exit code 1 when something is wrong."""
    from halfstep.store import verify as run_verify

    report = run_verify(store)
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
    """Rebuild what can be rebuilt and drop only sequences whose own bytes are damaged."""
    from halfstep.store import repair as run_repair

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
    """Say what a store holds: autoencoder, latents, types, numerics, sequences."""
    from dataclasses import asdict

    from halfstep.store import DatasetStore

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
