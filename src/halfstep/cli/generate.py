"""halfstep generate"""

from __future__ import annotations

import json as json_module
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from halfstep.generate import GenerateConfig


def generate(
    template: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Prompt; \\[red|blue] makes one prompt a choice. Else from the YAML."),
    ] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="YAML of settings.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="OUT", help="Folder of the batch; else from the YAML.")
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="ID", help="Hub id or folder of a diffusers pipeline.")] = None,
    precision: Annotated[
        str | None, typer.Option(metavar="P", help="fp32, bf16-true, bf16-mixed, 16-true, 16-mixed or auto.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="A setting in place of the YAML's.")
    ] = None,
    store_latents: Annotated[bool, typer.Option("--store-latents", help="Record every sampling step.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a batch; complete runs are left alone.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Make videos or pictures from prompts with a diffusers pipeline, recording the sampling when asked to."""
    from halfstep.cli.progress import Bar
    from halfstep.config import load_yaml, validate, with_settings
    from halfstep.generate import GenerateConfig
    from halfstep.generate import generate as run_generate

    overrides = [*(settings or [])]
    if model is not None:
        overrides.append(f"model_settings.model_id={json_module.dumps(model)}")
    if precision is not None:
        overrides.append(f"model_settings.precision={json_module.dumps(precision)}")
    if config is None:
        chosen = validate(with_settings({}, overrides), GenerateConfig, "generate")
    else:
        chosen = load_yaml(config, GenerateConfig, overrides)
    if store_latents:
        chosen = chosen.with_latents()
    folder = output or _default_folder(chosen)
    with Bar("generating", "steps", hidden=quiet) as progress:
        report = run_generate(chosen, template, folder, resume=resume, progress=progress)
    if json:
        typer.echo(json_module.dumps(asdict(report)))
    else:
        for key, reason in report.failed.items():
            typer.echo(f"{key}: failed: {reason}")
        typer.echo(
            f"{report.output}: {len(report.generated)} generated, {len(report.skipped)} there already, "
            f"{len(report.failed)} failed; precision {report.policy}, {report.seconds:.1f} s"
        )
    raise typer.Exit(1 if report.failed else 0)


def _default_folder(config: GenerateConfig) -> Path:
    stamp = time.strftime("_%Y%m%d_%H%M%S") if config.use_timestamp else ""
    return Path(config.output_dir) / f"{config.batch_name}{stamp}"
