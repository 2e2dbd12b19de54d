"""halfstep eval fid | nwm | energy"""

from __future__ import annotations

import json as json_module
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from halfstep.errors import InputError
from halfstep.files import place

app = typer.Typer(help="Measure how good samples and predictions are.", no_args_is_help=True)

_Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
_Device = Annotated[str, typer.Option(help="auto, cpu, cuda, ...")]


@app.command()
def fid(
    a: Annotated[Path, typer.Argument(metavar="A", help="Folder of pictures, or .npz with arr_0.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The same; real pictures on either side.")],
    weights: Annotated[Path | None, typer.Option(metavar="FILE", help="Inception weights, without a network.")] = None,
    device: _Device = "auto",
    json: _Json = False,
) -> None:
    """Frechet inception distance between two sets of pictures."""
    from halfstep.evaluate.fid import fid as run_fid

    report = run_fid(a, b, weights=weights, device=device)
    if json:
        typer.echo(json_module.dumps(asdict(report)))
    else:
        typer.echo(f"FID {report.fid:.3f} ({report.pictures_a} and {report.pictures_b} pictures)")


@app.command()
def energy(
    ckpt: Annotated[Path, typer.Option(metavar="RUN", help="An EqM trained with an energy.")],
    data_path: Annotated[str, typer.Option(metavar="STORE", help="Latents like those it was trained on.")],
    against: Annotated[str | None, typer.Option(metavar="STORE", help="Others: can they be told apart?")] = None,
    precision: Annotated[str, typer.Option(metavar="P")] = "fp32",
    device: _Device = "auto",
    json: _Json = False,
) -> None:
    """Energies of latents: high for what is unlike the training data."""
    from halfstep.cli.progress import Bar
    from halfstep.evaluate.energy import compare_energies

    with Bar("evaluating", "items") as progress:
        report = compare_energies(
            ckpt,
            place(data_path),
            None if against is None else place(against),
            precision=precision,
            device=device,
            progress=progress,
        )
    if json:
        typer.echo(json_module.dumps(asdict(report)))
        return
    typer.echo(f"{data_path}: energy {report.mean:.4g} +- {report.deviation:.2g}, {report.items} items")
    if report.auroc is not None:
        typer.echo(
            f"{against}: energy {report.other_mean:.4g} +- {report.other_deviation:.2g}, {report.other_items} items"
        )
        typer.echo(f"told apart with AUROC {report.auroc:.3f} (0.5 is chance)")


@app.command()
def nwm(
    ckpt: Annotated[Path, typer.Option(metavar="RUN", help="A CDiT.")],
    data_path: Annotated[str, typer.Option(metavar="STORE", help="Latents of walks with poses.")],
    names: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Walks to ask about: a traj_names.txt of those held out.")
    ] = None,
    horizons: Annotated[str, typer.Option(metavar="N,N,...", help="Frames ahead.")] = "1,2,4,8",
    walks: Annotated[int, typer.Option(min=1, help="Beginnings, drawn by the seed.")] = 16,
    sampler: Annotated[str, typer.Option(help="ancestral, ddim or dpm++.")] = "dpm++",
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps of a frame.")] = 25,
    plans: Annotated[int, typer.Option(min=0, help="For how many of the walks a way is planned too.")] = 4,
    plan_steps: Annotated[int, typer.Option(min=1, help="Frames to the goal of a plan.")] = 4,
    candidates: Annotated[int, typer.Option(min=1, help="Ways imagined in a round of planning.")] = 32,
    plan_sampling_steps: Annotated[int, typer.Option(min=1)] = 6,
    spacing: Annotated[float | None, typer.Option(help="Meters a waypoint; the training's by default.")] = None,
    autoencoder: Annotated[str | None, typer.Option(metavar="ID", help="Where the store does not say.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    precision: Annotated[str, typer.Option(metavar="P")] = "auto",
    device: _Device = "auto",
    json: _Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """A navigation world model: error over time, rollouts, and planning by the cross-entropy method."""
    from halfstep.cli.progress import Bar
    from halfstep.evaluate.walks import WalkOptions, evaluate_walks

    if not all(part.strip().isdecimal() for part in horizons.split(",")):
        raise InputError(f"--horizons: got {horizons!r}; expected numbers of frames, as 1,2,4,8")
    options = WalkOptions(
        ckpt=ckpt,
        data_path=place(data_path),
        names=names,
        horizons=tuple(int(part) for part in horizons.split(",")),
        walks=walks,
        sampler=sampler,
        steps=steps,
        plans=plans,
        plan_steps=plan_steps,
        candidates=candidates,
        elites=max(1, candidates // 5),
        plan_sampling_steps=plan_sampling_steps,
        spacing=spacing,
        autoencoder=autoencoder,
        seed=seed,
        precision=precision,
        device=device,
    )
    with Bar("evaluating", "parts", hidden=quiet) as progress:
        report = evaluate_walks(options, progress)
    if json:
        typer.echo(json_module.dumps(asdict(report)))
        return
    typer.echo(f"{report.network} on {report.walks} walks, in {report.policy}")
    for name, scores in (("direct", report.direct), ("rollout", report.rollout), ("copy", report.copy)):
        for horizon, values in scores.items():
            told = "  ".join(f"{metric} {value:.3f}" for metric, value in values.items())
            typer.echo(f"  {name:8} {horizon:>3} frames ahead: {told}")
    if report.plan is not None:
        plan = report.plan
        typer.echo(
            f"  planned: ends {plan.end:.2f} m from the goal, path {plan.path:.2f} m off, steps {plan.step:.2f} m and "
            f"{plan.turn:.2f} rad"
        )
        typer.echo(f"  mean step: ends {plan.mean_step_end:.2f} m from the goal, path {plan.mean_step_path:.2f} m off")
    for name, reason in report.not_measured.items():
        typer.echo(f"  {name}: not measured ({reason})")
