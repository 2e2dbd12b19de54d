"""halfstep stream"""

from __future__ import annotations

import json as json_module
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfstep.errors import InputError, some

if TYPE_CHECKING:
    from halfstep.stream import StreamReport

app = typer.Typer(no_args_is_help=True)


@app.callback(invoke_without_command=True)
def stream(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="YAML of the run.")] = None,
    writer: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML of the older writer: its peaks and its output.")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="OUT", help="Folder of the run.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="In place of what the YAML says.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    devices: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="How many lanes, or with --ray how many actors.")
    ] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Compute in actors on a Ray cluster.")] = False,
    metrics_port: Annotated[
        int | None, typer.Option(min=1, max=65535, metavar="PORT", help="Serve metrics to Prometheus on 127.0.0.1.")
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Simulated diffraction through a small trained network, into -o.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print run.json.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No panel.")] = False,
) -> None:
    """Find peaks in a stream of detector frames, as they come; run it again to go on."""
    if context.invoked_subcommand is not None:
        return
    if demo:
        _demo(output or Path("stream-demo"), json=json, quiet=quiet)
        return
    if config is None:
        raise InputError("stream: no run; give its YAML with --config, or --demo")
    from halfstep.cli.panel import Panel
    from halfstep.stream.config import load_run
    from halfstep.stream.engine import StreamEngine

    run = load_run(
        config,
        writer=writer,
        output=output,
        settings=tuple(settings or ()),
        ray=ray,
        lanes=devices,
        device=device,
    )
    with ExitStack() as stack:
        panel = Panel(hidden=quiet or json or run.file.output.quiet)
        for note in run.notes:
            panel.note(note)
        consumers = []
        if run.file.output.push is not None:
            from halfstep.stream.sinks.live import Pusher

            pusher = stack.enter_context(Pusher(run.file.output.push))
            consumers.append(lambda result: pusher.send([result]))
        if run.file.output.crystfel is not None:
            from halfstep.stream.sinks.cxi import is_hit
            from halfstep.stream.sinks.live import CrystfelResponder

            responder = stack.enter_context(CrystfelResponder(run.file.output.crystfel))
            hits = run.outputs.cxi
            consumers.append(lambda result: responder.offer(result) if hits is None or is_hit(result, hits) else None)
        source = stack.enter_context(run.open_source())
        if source.urls:
            panel.note(
                f"{'listening at' if run.file.data_source.role == 'bind' else 'connected to'} {some(source.urls)}"
            )
        engine = StreamEngine(source, run.options, run.outputs, consumers=consumers, progress=panel)
        if metrics_port is not None:
            from halfstep.stream.monitor import metrics_server

            stack.enter_context(metrics_server(metrics_port, engine.snapshot))
        stack.enter_context(panel.showing(engine.snapshot))
        report = engine.run()
    typer.echo(json_module.dumps(asdict(report), indent=1) if json else _summary(report, run.outputs.folder))
    raise typer.Exit(0 if report.held else 1)


def _demo(output: Path, *, json: bool, quiet: bool) -> None:
    from halfstep.cli.progress import Bar
    from halfstep.demo.peaks import PICTURE, stream_demo

    with Bar("streaming", "events", hidden=quiet or json) as progress:
        report = stream_demo(output, progress=progress)
    found = report["found"]
    right = found["found"] / max(1, found["found"] + found["found_wrongly"])
    lines = [
        f"{report['balance']['out']} frames, {report['events_per_second']:.1f} a second in {report['policy']}",
        f"{found['found']} of {found['peaks']} peaks found ({found['found'] / max(1, found['peaks']):.1%}), and "
        f"{found['found_wrongly']} where none is ({right:.1%} of what was found is right)",
        f"{output / PICTURE}: look at it",
    ]
    typer.echo(json_module.dumps(report, indent=1) if json else "\n".join(lines))


@app.command()
def send(
    source: Annotated[
        list[Path] | None, typer.Argument(metavar="SRC", help="HDF5, CXI, .npy, pictures, videos, or folders of them.")
    ] = None,
    to: Annotated[str, typer.Option(metavar="URL", help="tcp://HOST:PORT or ipc://PATH of the engine.")] = ...,  # type: ignore[assignment]
    format: Annotated[
        str, typer.Option(metavar="F", help="halfstep (acknowledged), npz, hdf5 or dectris.")
    ] = "halfstep",
    random: Annotated[bool, typer.Option("--random", help="Simulated diffraction instead of files.")] = False,
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="How many with --random.")] = 100,
    size: Annotated[str, typer.Option(metavar="HxW", help="Of frames with --random.")] = "256x256",
    seed: Annotated[int, typer.Option(help="Of --random.")] = 0,
    bind: Annotated[bool, typer.Option("--bind", help="Bind to the URL, for an engine that connects.")] = False,
    name: Annotated[str, typer.Option(help="The producer's name.")] = "sender",
    run: Annotated[str | None, typer.Option(metavar="ID", help="Go on with the events of an earlier run.")] = None,
    give_up_s: Annotated[float, typer.Option("--give-up", metavar="S", min=0, help="Seconds without an engine.")] = 600,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Send events to an engine: a producer for trials."""
    if bool(source) == random:
        raise InputError("stream send: name files or folders to send, or give --random, one of both")
    from halfstep.cli.progress import Bar
    from halfstep.engine import stop_request
    from halfstep.stream.send import send as run_send
    from halfstep.stream.send import simulated
    from halfstep.stream.sources.files import FilesSource

    events = simulated(count, _size(size), seed) if random else FilesSource(source or []).events()
    with Bar("sending", "events", hidden=quiet) as progress, stop_request() as stop:
        progress.start(count if random else None)
        report = run_send(
            events,
            to,
            format=format,
            bind=bind,
            source=name,
            run=run,
            give_up_s=give_up_s,
            stopping=lambda: bool(stop),
            progress=progress,
        )
    lines = [f"sent {report.sent} events in {report.seconds:.1f} s, {report.resent} of them again"]
    lines += [f"refused: event {number}: {reason}" for number, reason in list((report.refused or {}).items())[:5]]
    typer.echo(json_module.dumps(asdict(replace(report, refused=report.refused or {}))) if json else "\n".join(lines))
    raise typer.Exit(1 if report.refused else 0)


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    if not height.isdecimal() or not width.isdecimal() or not int(height) or not int(width):
        raise InputError(f"--size: got {text!r}; expected HxW in pixels")
    return int(height), int(width)


def _summary(report: StreamReport, folder: Path) -> str:
    balance = report.balance
    lines = [
        f"{balance['came']} came, {balance['out']} out, {balance['skipped']} there already, {balance['refused']} "
        f"refused, {balance['dropped']} dropped, {balance['leased']} under way; ended by {report.ended_by}",
        f"{report.peaks} peaks; {report.events_per_second:.1f} events/s; {report.guarantee}: "
        + ("held" if report.held else "not held"),
        f"precision {report.policy}; {balance['retried']} computed again in fp32",
        f"{folder}: {report.parts} parts, {report.written_bytes / 1e6:.1f} MB; run.json has the rest",
    ]
    return "\n".join([*lines, *(f"not held: {reason}" for reason in report.why)])
