"""halfstep bench encode | read | trajectory | train | sample | precision | statistics"""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Measure halfstep against what people use today, in turn in one run.", no_args_is_help=True)

_Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@app.command()
def encode(
    images: Annotated[int, typer.Option(min=32)] = 64,
    size: Annotated[int, typer.Option(min=8, help="Pixels on a side.")] = 128,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    autoencoder: Annotated[str, typer.Option(metavar="ID", help="As in encode, or sd-vae-shaped.")] = "sd-vae-shaped",
    memory: Annotated[bool, typer.Option(help="Measure the peak memory of ever larger runs too.")] = True,
    json: _Json = False,
) -> None:
    """Encode pictures: the plain fp32 loop against `halfstep encode`, with the same autoencoder."""
    from halfstep.bench.encode import bench_encode

    _print(bench_encode(images=images, size=size, rounds=rounds, autoencoder=autoencoder, memory=memory), json)


@app.command()
def read(
    walks: Annotated[int, typer.Option(min=4)] = 100,
    windows: Annotated[int, typer.Option(min=1)] = 2000,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    json: _Json = False,
) -> None:
    """Read random context windows: a store against `.pt` files, zarr and the streaming formats that are installed."""
    from halfstep.bench.read import bench_read

    _print(bench_read(walks=walks, windows=windows, rounds=rounds), json)


@app.command()
def trajectory(
    file: Annotated[
        list[Path] | None, typer.Option(metavar="NPZ", help="Also a recorded trajectory: latents [S, ...], float32.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    recorder: Annotated[bool, typer.Option(help="Measure what recording costs a sampler too.")] = True,
    json: _Json = False,
) -> None:
    """Keep sampling trajectories: the predictive codec against what people use; and the cost of recording."""
    from halfstep.bench.trajectory import bench_trajectory

    result = bench_trajectory(files=file or [], rounds=rounds, recorder=recorder)
    if json:
        typer.echo(json_module.dumps(result, indent=1))
        return
    for name, content in result["trajectories"].items():
        typer.echo(f"{name}: {content['shape']}, {content['megabytes']} MB in fp32, MB of it a second")
        for way, facts in content["ways"].items():
            typer.echo(
                f"  {way:34} {facts['share_of_fp32']:.3f}  error {facts['rms_error']:.1e}  encode "
                f"{facts['encode_mb_per_s']:7.0f}  decode {facts['decode_mb_per_s']:7.0f}  a step "
                f"{facts['random_step_ms']:8.2f} ms"
            )
    for name, reason in result["not_measured"].items():
        typer.echo(f"  {name}: not measured ({reason})")
    if result["recorder"]:
        cost = result["recorder"]
        typer.echo(
            f"recording: {cost['overhead']:+.2%} of a sampler's time at {cost['step_ms']:.0f} ms a step "
            f"({cost['overhead_with_finish']:+.2%} with the wait at the end), same samples: {cost['same_samples']}"
        )


@app.command()
def train(
    model: Annotated[str, typer.Option(help="A published EqM.")] = "EqM-S/2",
    size: Annotated[int, typer.Option(min=16, help="Pixels on a side.")] = 256,
    batch: Annotated[int, typer.Option(min=1)] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Timed in a round.")] = 2,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    memory: Annotated[bool, typer.Option(help="Measure the peak memory too.")] = True,
    json: _Json = False,
) -> None:
    """Train EqM: the plain published recipe against `halfstep train`, on the same pictures."""
    from halfstep.bench.train import bench_train

    _print(bench_train(model=model, size=size, batch=batch, steps=steps, rounds=rounds, memory=memory), json)


@app.command()
def sample(
    model: Annotated[str, typer.Option(help="A published EqM.")] = "EqM-S/2",
    size: Annotated[int, typer.Option(min=16, help="Pixels on a side.")] = 256,
    batch: Annotated[int, typer.Option(min=1)] = 2,
    updates: Annotated[int, typer.Option(min=1)] = 249,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    json: _Json = False,
) -> None:
    """Sample from EqM: the plain loop of updates against ours."""
    from halfstep.bench.sample import bench_sample

    _print(bench_sample(model=model, size=size, batch=batch, updates=updates, rounds=rounds), json)


@app.command()
def precision(
    seeds: Annotated[int, typer.Option(min=2)] = 5,
    steps: Annotated[int, typer.Option(min=20)] = 600,
    plot: Annotated[Path | None, typer.Option(metavar="PNG", help="Draw the curves.")] = None,
    json: _Json = False,
) -> None:
    """Train a small EqM in fp32 and in half, over several seeds: do the curves differ more than seeds do?"""
    from halfstep.bench.precision import bench_precision

    _print(bench_precision(seeds=seeds, steps=steps, plot=plot), json)


@app.command()
def stream(
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    events: Annotated[int, typer.Option(min=1, help="Through the engine.")] = 48,
    frames: Annotated[int, typer.Option(min=1, help="Simulated ones, whose peaks are known.")] = 100,
    memory: Annotated[bool, typer.Option(help="Measure the peak memory too.")] = True,
    soak: Annotated[
        int | None, typer.Option(min=20, metavar="N", help="Only this: N small events, and what memory does.")
    ] = None,
    json: _Json = False,
) -> None:
    """Find peaks with PeakNet: as it is run today, in half, fused; the engine against its lanes; labeling."""
    from halfstep.bench.stream import bench_soak, bench_stream

    if soak is None:
        _print(bench_stream(rounds=rounds, events=events, frames=frames, memory=memory), json)
        return
    from halfstep.cli.progress import Bar

    with Bar("streaming", "events", hidden=json) as progress:
        result = bench_soak(soak, progress)
    typer.echo(json_module.dumps(result, indent=1))


@app.command()
def statistics(
    sets: Annotated[int, typer.Option(min=10, help="Simulated sets of runs for each design and change.")] = 300,
    json: _Json = False,
) -> None:
    """Analyze simulated runs: how often is found what is not there, and what is, paired, unequal, in many groups?"""
    from halfstep.bench.statistics import bench_statistics
    from halfstep.cli.progress import Bar

    with Bar("analyzing", "sets", hidden=json) as progress:
        result = bench_statistics(sets=sets, progress=progress)
    if json:
        typer.echo(json_module.dumps(result, indent=1))
        return
    for design, changes in result["designs"].items():
        for change, shares in changes.items():
            typer.echo(
                f"{design}; difference: {change}; a finding in {shares['sets_with_a_finding']:.1%} of {sets} sets"
            )
            for name, share in shares["below_alpha"].items():
                typer.echo(f"  {name:20} p < 0.05 in {share:6.1%}, found in {shares['found'][name]:6.1%}")


def _print(result: dict[str, Any], json: bool) -> None:
    if json:
        typer.echo(json_module.dumps(result, indent=1))
        return
    typer.echo(f"{result['benchmark']} on {result['machine']['device']}, {result['machine']['cores']} cores")
    for name, timing in result["seconds"].items():
        typer.echo(
            f"  {name:24} {timing['median']:9.4g} s   ({timing['smallest']:.4g} to {timing['largest']:.4g}, "
            f"{timing['rounds']} rounds)"
        )
    for name, value in result.items():
        if name not in ("benchmark", "command", "machine", "seconds", "curves"):
            typer.echo(f"  {name}: {value}")
