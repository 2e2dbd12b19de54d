"""halfstep bench: a command for each module of `halfstep.bench` that measures something."""

from __future__ import annotations

import json as json_module
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from halfstep.cli import bench_lines

app = typer.Typer(help="Measure halfstep against what people use today, in turn in one run.", no_args_is_help=True)

_Tolerance = Annotated[
    float, typer.Option(min=0.01, max=1.0, metavar="SHARE", help="How much slower counts as slower.")
]
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

    _print(bench_trajectory(files=file or [], rounds=rounds, recorder=recorder), json, bench_lines.trajectory)


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
def suite(
    models: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Once each, all by default: EqM-S/2, encode, ...")
    ] = None,
    sizes: Annotated[
        list[int] | None, typer.Option(min=1, metavar="PIXELS", help="On a side; the models' own by default.")
    ] = None,
    precisions: Annotated[
        list[str] | None, typer.Option(metavar="POLICY", help="Held against fp32; by default what auto chooses.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    tolerance: _Tolerance = 0.05,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the JSON here.")] = None,
    json: _Json = False,
) -> None:
    """Measure models and verbs in fp32 and in half: exit code 1 when half is slower, 3 when that is undecided."""
    from halfstep.bench.suite import bench_suite
    from halfstep.cli.progress import Bar
    from halfstep.errors import InputError
    from halfstep.files import write_durably

    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise InputError(f"--output: got {output}; expected a file in a folder that is there")
    with Bar("measuring", "cases", hidden=json) as progress:
        result = bench_suite(
            models=models or (),
            sizes=sizes or (),
            precisions=precisions or (),
            device=device,
            tolerance=tolerance,
            progress=progress,
        )
    if output is not None:
        write_durably(output, (json_module.dumps(result, indent=1) + "\n").encode())
    _judge(result, json)


@app.command()
def compare(
    files: Annotated[list[Path] | None, typer.Argument(metavar="[BEFORE.json AFTER.json]", help="Two suites.")] = None,
    against: Annotated[
        str | None, typer.Option(metavar="REV", help="A revision of the checkout here, against the working tree.")
    ] = None,
    models: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="With --against: as in suite, at their smallest size.")
    ] = None,
    precisions: Annotated[
        list[str] | None, typer.Option(metavar="POLICY", help="With --against: beside fp32; what auto is by default.")
    ] = None,
    tolerance: _Tolerance = 0.05,
    force: Annotated[bool, typer.Option("--force", help="Compare files of different machines or versions.")] = False,
    json: _Json = False,
) -> None:
    """Compare another revision with the working tree, in turn: exit code 1 when it became slower, 3 when that is
    undecided, 2 when nothing was measured. Two files of suites can only warn."""
    from halfstep.errors import InputError

    if (against is None) == (not files) or (files and len(files) != 2):
        raise InputError("bench compare: takes two files of suites, or --against REV")
    if against is not None:
        from halfstep.bench.revisions import compare_revision
        from halfstep.cli.progress import Bar

        with Bar("comparing", "cases", hidden=json) as progress:
            result = compare_revision(
                against,
                root=Path.cwd(),
                models=models or (),
                precisions=precisions or (),
                tolerance=tolerance,
                progress=progress,
            )
        _judge(result, json)
    assert files is not None
    if models or precisions:
        raise InputError("bench compare: --models and --precisions go with --against; files have the cases they have")
    from halfstep.bench.results import compare_files

    found = compare_files(files[0], files[1], tolerance=tolerance, force=force)
    if json:
        typer.echo(json_module.dumps(found, indent=1))
        return
    for name, ratio in found["ratios"].items():
        typer.echo(f"{name}: {ratio:.3f} times")
    for place, names in (files[0], found["only_before"]), (files[1], found["only_after"]):
        for name in names:
            typer.echo(f"{name}: only in {place}")
    for line in found["warnings"]:
        typer.echo(f"warning: {line}", err=True)
    if found["warnings"]:
        typer.echo("two runs at two times prove nothing; `halfstep bench compare --against REV` can", err=True)


@app.command()
def report(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="JSON of suite, compare or canary.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="A .html or .md; else Markdown here.")
    ] = None,
) -> None:
    """One page of what benchmarks found: tables, plots, switches, verdicts and the canary."""
    from halfstep.bench.report import write_report

    if (text := write_report(files, output)) is not None:
        typer.echo(text, nl=False)


@app.command()
def canary(
    trials: Annotated[int, typer.Option(min=2, help="Of a kernel with itself; half as many with a slower one.")] = 200,
    json: _Json = False,
) -> None:
    """Try the gate on this machine made busy: how often is the same called slower, and 10% more work found?"""
    from halfstep.bench.canary import bench_canary
    from halfstep.cli.progress import Bar

    with Bar("comparing", "trials", hidden=json) as progress:
        result = bench_canary(trials=trials, progress=progress)
    _print(result, json, bench_lines.canary)


@app.command()
def live(
    frames: Annotated[int, typer.Option(min=8, help="Frames of a round.")] = 100,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    steps: Annotated[int, typer.Option(min=1, max=8, help="Sampling steps of a frame.")] = 4,
    soak: Annotated[int, typer.Option(min=0, help="So many frames more, for what memory does.")] = 0,
    json: _Json = False,
) -> None:
    """How fast is the shipped world, and what does the engine add to its model?"""
    from halfstep.bench.live import bench_live
    from halfstep.cli.progress import Bar

    with Bar("walking", "frames", hidden=json) as progress:
        result = bench_live(frames=frames, rounds=rounds, steps=steps, soak=soak, progress=progress)
    _print(result, json, bench_lines.live)


@app.command()
def conditions(
    steps: Annotated[int, typer.Option(min=12, help="Training steps of each way.")] = 600,
    json: _Json = False,
) -> None:
    """How soon does a small CDiT hear its action and its context, as published and as it may be begun here?"""
    from halfstep.bench.conditions import bench_conditions
    from halfstep.cli.progress import Bar

    with Bar("training", "ways", hidden=json) as progress:
        result = bench_conditions(steps=steps, progress=progress)
    _print(result, json, bench_lines.conditions)


@app.command()
def drift(
    ckpt: Annotated[
        Path | None, typer.Option(metavar="CKPT", help="A model of walks; without it, the shipped world.")
    ] = None,
    data_path: Annotated[Path | None, typer.Option(metavar="STORE", help="True walks for CKPT.")] = None,
    precisions: Annotated[
        list[str] | None, typer.Option(metavar="bf16|fp16", help="Once each, held against fp32; both by default.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=4, help="Walks, each with its own noise.")] = 12,
    frames: Annotated[int, typer.Option(min=4, help="Of each walk on the model's own frames.")] = 512,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="HTML", help="Write a page here.")] = None,
    json: _Json = False,
) -> None:
    """Does half precision make a world model drift? Exit code 0 when it is shown not to be worse than fp32, 1 when it
    is shown to be, 3 when neither is."""
    from halfstep.bench.drift import EXIT_CODES, PRECISIONS, as_markdown, bench_drift
    from halfstep.cli.progress import Bar

    with Bar("walking", "frames", hidden=json) as progress:
        result = bench_drift(
            ckpt=ckpt,
            data_path=data_path,
            precisions=tuple(dict.fromkeys(precisions or PRECISIONS)),
            seeds=seeds,
            frames=frames,
            output=output,
            progress=progress,
        )
    typer.echo(json_module.dumps(result, indent=1) if json else as_markdown(result))
    raise typer.Exit(EXIT_CODES[result["verdict"]])


@app.command()
def simulate(rounds: Annotated[int, typer.Option(min=1)] = 5, json: _Json = False) -> None:
    """Hold simulated half arithmetic against the device's own, in five networks, and say what simulating costs."""
    from halfstep.bench.simulate import bench_simulate
    from halfstep.cli.progress import Bar

    with Bar("simulating", "networks", hidden=json) as progress:
        result = bench_simulate(rounds=rounds, progress=progress)
    _print(result, json, bench_lines.simulate)


@app.command()
def memory(json: _Json = False) -> None:
    """Hold the memory that is planned without weights against what fresh processes take, in ten cases."""
    from halfstep.bench.footprint import bench_memory
    from halfstep.cli.progress import Bar

    with Bar("measuring", "cases", hidden=json) as progress:
        result = bench_memory(progress=progress)
    _print(result, json, bench_lines.memory)


@app.command("live-load")
def live_load(
    width: Annotated[int, typer.Option(min=2, help="Of the first level: 192 is the 880M load.")] = 192,
    batch: Annotated[int, typer.Option(min=1)] = 2,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    json: _Json = False,
) -> None:
    """Run the network behind published live streams in fp32, under autocast, and in true half: time, memory, error."""
    from halfstep.bench.live_load import bench_live_load
    from halfstep.cli.progress import Bar

    with Bar("measuring", "parts", hidden=json) as progress:
        result = bench_live_load(width=width, batch=batch, rounds=rounds, device=device, progress=progress)
    _print(result, json)


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
    _print(result, json, bench_lines.statistics)


def _judge(result: dict[str, Any], json: bool) -> NoReturn:
    """Print what was compared, and exit as the verdict says."""
    from halfstep.bench.gate import EXIT_CODES
    from halfstep.bench.report import as_markdown

    typer.echo(json_module.dumps(result, indent=1) if json else as_markdown({result["benchmark"]: result}).rstrip())
    for name, why in {**result.get("absent", {}), **result["failed"]}.items():
        typer.echo(f"halfstep: {name}: not measured: {why}", err=True)
    raise typer.Exit(EXIT_CODES[result["verdict"]])


def _print(
    result: dict[str, Any], json: bool, lines: Callable[[dict[str, Any]], Iterable[str]] = bench_lines.timings
) -> None:
    for line in [json_module.dumps(result, indent=1)] if json else lines(result):
        typer.echo(line)
