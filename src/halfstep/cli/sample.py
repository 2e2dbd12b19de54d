"""halfstep sample"""

from __future__ import annotations

import json as json_module
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from halfstep.cli.flags import precision_of
from halfstep.errors import InputError
from halfstep.files import place


def sample(
    ckpt: Annotated[Path, typer.Option(metavar="FILE", help="A run, a checkpoint of it, or a published file.")],
    output: Annotated[Path, typer.Option("-o", "--output", "--folder", metavar="OUT", help="Folder of the samples.")],
    number: Annotated[int, typer.Option("-n", "--number", "--num-fid-samples", min=1, help="How many.")] = 16,
    model: Annotated[str | None, typer.Option(help="Which network the checkpoint must be of.")] = None,
    sampler: Annotated[
        str | None, typer.Option(help="EqM: ngd, gd, heun, euler; CDiT: ancestral, ddim, dpm++; livestream: euler.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", "--num-sampling-steps", min=1, help="gd and ngd make one update less (250; livestream 3)."
        ),
    ] = None,
    step_size: Annotated[float, typer.Option("--step-size", "--stepsize", help="Of gd and ngd.")] = 0.0017,
    momentum: Annotated[float, typer.Option("--momentum", "--mu", help="Of ngd.")] = 0.3,
    cfg_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is without.")] = 1.0,
    cfg_channels: Annotated[int | None, typer.Option(min=1, help="Guide the first channels alone.")] = None,
    labels: Annotated[
        str | None, typer.Option(metavar="L,L,...", help="In turn; 3+5 composes two. Drawn by default.")
    ] = None,
    stop_below: Annotated[
        float | None, typer.Option(min=0, help="A sample is done when its field (rms) is below this.")
    ] = None,
    start_from: Annotated[
        str | None, typer.Option(metavar="STORE", help="Begin at these latents, noised, instead of noise.")
    ] = None,
    start_gamma: Annotated[float | None, typer.Option(min=0, max=1, help="Their share, 0 to 1 (0.5).")] = None,
    data_path: Annotated[str | None, typer.Option(metavar="STORE", help="Walks that give the context.")] = None,
    frames: Annotated[int, typer.Option(min=1, help="Of a walk, predicted one after the other.")] = 8,
    spacing: Annotated[float | None, typer.Option(help="Meters a waypoint; the training's by default.")] = None,
    video: Annotated[bool, typer.Option("--video", help="A published checkpoint is of video.")] = False,
    clip_len: Annotated[
        int | None, typer.Option(min=1, help="Frames to its clips, where it does not say (16).")
    ] = None,
    energy: Annotated[str | None, typer.Option("--energy", "--ebm", help="Of a published checkpoint.")] = None,
    autoencoder: Annotated[
        str | None, typer.Option("--autoencoder", "--vae", metavar="ID", help="Where the checkpoint does not say.")
    ] = None,
    ema: Annotated[bool, typer.Option(help="The moving average, or the weights last trained.")] = True,
    batch_size: Annotated[int, typer.Option("--batch-size", "--per-proc-batch-size", min=1)] = 32,
    seed: Annotated[int, typer.Option("--seed", "--global-seed", min=0)] = 0,
    precision: Annotated[
        str | None, typer.Option(metavar="P", help="fp32, bf16-true, bf16-mixed, ... or auto.")
    ] = None,
    use_bf16: Annotated[bool, typer.Option("--use-bf16", help="The same as --precision bf16-mixed.")] = False,
    use_amp: Annotated[bool, typer.Option("--use-amp", help="The same as --precision 16-mixed.")] = False,
    format: Annotated[
        str | None,
        typer.Option(help="png (pictures; walks, real frames above), mp4 (clips), gif, or npy: latents as they are."),
    ] = None,
    fps: Annotated[int, typer.Option(min=1)] = 8,
    record: Annotated[bool, typer.Option("--record", help="Keep every sampling step in OUT/runs.")] = False,
    storage: Annotated[
        str, typer.Option(metavar="TYPE", help="Of recorded steps: fp16 or bf16 (at their error), fp32 (exact).")
    ] = "fp16",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Make pictures or clips with a trained EqM, or walks with a CDiT or livestream; the same command makes what is
    missing."""
    from halfstep.cli.progress import Bar
    from halfstep.models.eqm import ENERGY_NAMES
    from halfstep.sample import SampleOptions
    from halfstep.sample import sample as run_sample

    options = SampleOptions(
        ckpt=ckpt,
        output=output,
        number=number,
        model=model,
        autoencoder=autoencoder,
        sampler=sampler,
        steps=steps,
        step_size=step_size,
        momentum=momentum,
        guidance_scale=cfg_scale,
        guidance_channels=cfg_channels,
        labels=_parse_labels(labels),
        stop_below=stop_below,
        start_from=None if start_from is None else place(start_from),
        start_gamma=start_gamma,
        data_path=None if data_path is None else place(data_path),
        frames=frames,
        spacing=spacing,
        video=video,
        clip_len=clip_len,
        energy=None if energy is None else ENERGY_NAMES.get(energy, energy),
        ema=ema,
        batch_size=batch_size,
        seed=seed,
        precision=precision_of(precision, use_bf16, use_amp) or "auto",
        device=device,
        format=format,
        fps=fps,
        record=record,
        storage=storage,
    )
    with Bar("sampling", "steps of samples", hidden=quiet) as progress:
        report = run_sample(options, progress)
    if not progress.speaks:
        return
    if json:
        typer.echo(json_module.dumps(asdict(report)))
        return
    rate = "" if report.samples_per_second is None else f", {report.samples_per_second:.2f} samples/s"
    mean = "" if report.updates is None else f", {report.updates:g} updates each"
    typer.echo(
        f"{report.contact_sheet or report.output}: {report.made} samples of {report.network} in {report.policy}{rate}"
        f"{mean}; {report.there} were there already"
    )


def _parse_labels(text: str | None) -> tuple[tuple[int, ...], ...]:
    if text is None:
        return ()
    try:
        return tuple(tuple(int(label) for label in part.split("+")) for part in text.split(","))
    except ValueError:
        raise InputError(f"--labels: got {text!r}; expected numbers, as 3,5 or 3+5,7+1") from None
