"""halfstep train"""

from __future__ import annotations

import json as json_module
import re
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfstep.cli.flags import precision_of
from halfstep.errors import InputError
from halfstep.team import rank

if TYPE_CHECKING:
    from halfstep.train.config import TrainConfig
    from halfstep.train.loop import TrainReport


class Family(StrEnum):
    """What can be trained."""

    eqm = "eqm"
    cdit = "cdit"
    livestream = "livestream"


# Keys of the published YAMLs that the published trainer does not read either; the rate is constant.
_UNREAD = ("train", "eval_decode", "lr_scheduler", "target_fps", "use_wandb")
_DEFAULT_MODELS = {  # the first two as published
    Family.eqm: "EqM-XL/2",
    Family.cdit: "CDiT-XL/2",
    Family.livestream: "livestream-S",
}


def train(
    family: Annotated[
        Family | None, typer.Argument(help="eqm, cdit or livestream; a YAML's model says it too.")
    ] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="YAML of settings.")] = None,
    data_path: Annotated[
        str | None, typer.Option(metavar="DIR", help="Latent store, .pt tree, or pixels (encoded in every step).")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="EqM-{S,B,L,XL}/{2,4,8}, CDiT-{S,B,L,XL}/2 or livestream-{S,M,L}.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(metavar="P", help="fp32, bf16-mixed, 16-mixed, bf16-true or auto (measured).")
    ] = None,
    use_bf16: Annotated[bool, typer.Option("--use-bf16", help="The same as --precision bf16-mixed.")] = False,
    use_amp: Annotated[bool, typer.Option("--use-amp", help="The same as --precision 16-mixed.")] = False,
    video: Annotated[bool, typer.Option("--video", help="Train on clips of --clip-len frames.")] = False,
    clip_len: Annotated[int | None, typer.Option(min=1, metavar="N", help="Frames to a clip (16).")] = None,
    image_size: Annotated[int | None, typer.Option(min=8, help="Pixels, where they are encoded on the way.")] = None,
    autoencoder: Annotated[
        str | None, typer.Option("--autoencoder", "--vae", metavar="ID", help="For pixels, as in encode.")
    ] = None,
    num_classes: Annotated[int | None, typer.Option(min=1, help="Labels; those of the data by default.")] = None,
    uncond: Annotated[bool | None, typer.Option(help="Without time, as published.")] = None,
    energy: Annotated[str | None, typer.Option("--energy", "--ebm", help="none, l2 or dot.")] = None,
    disp: Annotated[bool, typer.Option("--disp", help="Add the dispersive loss, with the weight 0.5.")] = False,
    epochs: Annotated[int | None, typer.Option(min=1)] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="End after so many steps instead.")] = None,
    global_batch_size: Annotated[int | None, typer.Option(min=1, help="Items to a step, of all processes.")] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Fit a step into 8GB, say: same batch, more recomputed, more micro-batches."),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    global_seed: Annotated[int | None, typer.Option(min=0)] = None,
    ckpt: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Weights to start from: a published checkpoint, or a run.")
    ] = None,
    results_dir: Annotated[
        Path | None, typer.Option("-o", "--results-dir", metavar="DIR", help="Folder of runs; results by default.")
    ] = None,
    run_name: Annotated[str | None, typer.Option(help="Folder of this run; the model's name by default.")] = None,
    log_every: Annotated[int | None, typer.Option(min=1, metavar="STEPS")] = None,
    ckpt_every: Annotated[int | None, typer.Option(min=1, metavar="STEPS")] = None,
    num_workers: Annotated[int | None, typer.Option(min=0, help="Processes that read ahead.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile.")] = False,
    fsdp: Annotated[bool, typer.Option("--fsdp", help="Shard the weights over torchrun's processes.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Log there too.")] = False,
    wandb: Annotated[bool, typer.Option("--wandb", help="Log there too.")] = False,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, ...")] = None,
    measure: Annotated[
        Path | None,
        typer.Option(
            metavar="PIXELS",
            help="Train nothing: time steps from --data-path, from the pixels that it was encoded from, and in fp32.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Any other setting, in place of the YAML's.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Train EqM, CDiT or livestream on latents; the same command goes on where it was stopped.

    Runs alone or under `torchrun --nproc_per_node=N -m halfstep train ...`.
    """
    if clip_len is not None and not video:
        raise InputError("--clip-len needs --video")
    from halfstep.models.eqm import ENERGY_NAMES

    given: dict[str, Any] = {
        "model": model or (_DEFAULT_MODELS[family] if family is not None and config is None else None),
        "data_path": data_path,
        "precision": precision_of(precision, use_bf16, use_amp),
        "clip_len": clip_len,
        "image_size": image_size,
        "autoencoder": autoencoder,
        "num_classes": num_classes,
        "uncond": uncond,
        "energy": None if energy is None else ENERGY_NAMES.get(energy, energy),
        "dispersive_weight": 0.5 if disp else None,
        "epochs": epochs,
        "steps": steps,
        "global_batch_size": global_batch_size,
        "memory": memory,
        "lr": lr,
        "global_seed": global_seed,
        "ckpt": None if ckpt is None else str(ckpt),
        "results_dir": None if results_dir is None else str(results_dir),
        "run_name": run_name,
        "log_every": log_every,
        "ckpt_every": ckpt_every,
        "num_workers": num_workers,
        "compile": compile or None,
        "fsdp": fsdp or None,
        "tensorboard": tensorboard or None,
        "wandb": wandb or None,
        "device": device,
    }
    defaults = {"clip_len": 16} if video else {}
    chosen = _read(config, defaults, {n: value for n, value in given.items() if value is not None}, settings or [])
    if family is not None and chosen.family.name.lower() != family:
        raise InputError(f"train: got {family.value} and a model of {chosen.family.name}; they do not go together")

    if measure is not None:
        _measure(chosen, measure, json=json, quiet=quiet)
        return

    from halfstep.cli.progress import Bar
    from halfstep.train.loop import train as run_train

    with Bar("training", "steps", hidden=quiet) as progress:
        report = run_train(chosen, progress)
    if not progress.speaks:
        return
    if json:
        typer.echo(json_module.dumps(asdict(report)))
        return
    loss = "" if report.loss is None else f", loss {report.loss:.4f}, {report.samples_per_second:.1f} samples/s"
    skipped = f", {report.skipped} updates skipped" if report.skipped else ""
    typer.echo(f"{report.checkpoint}: {report.network} after {report.step} steps in {report.policy}{loss}{skipped}")
    if line := saved_line(report):
        typer.echo(line)


def _measure(config: TrainConfig, pixels: Path, *, json: bool, quiet: bool) -> None:
    from halfstep.cli.progress import Bar
    from halfstep.train.measure import measure
    from halfstep.train.measured import NAME

    with Bar("measuring", "runs", hidden=quiet) as progress:
        found = measure(config, pixels, progress)
    if json:
        typer.echo(json_module.dumps(asdict(found)))
        return
    wide = max(map(len, found.cases))
    typer.echo(f"{'':{wide}}  s/step  {'from .. to':>14}  samples/s  peak MB")
    for name, case in found.cases.items():
        spread = f"{case.smallest:.3g} .. {case.largest:.3g}"
        rates = f"{case.samples_per_second:9.3g}  {case.peak_memory_mb:7.0f}"
        typer.echo(f"{name:{wide}}  {case.seconds_per_step:6.3g}  {spread:>14}  {rates}")
    if found.against_fp32 is not None:
        typer.echo(_told(found.conditions["policy"], "fp32", found.against_fp32))
    typer.echo(_told("latents", "pixels", found.against_pixels))
    typer.echo(f"{config.folder / NAME}: batches of {found.conditions['batch']} on {found.machine['device']}")


def saved_line(report: TrainReport) -> str | None:
    """What precision saved, for people; None where there was nothing to save."""
    from halfstep.precision import PrecisionPolicy
    from halfstep.train.measured import types_of

    policy = PrecisionPolicy.parse(report.policy)
    if policy.compute == "fp32":
        return None
    if report.against_fp32 is None:
        return f"what {types_of(policy)} saves against fp32 was not measured here; --measure PIXELS does"
    return f"{_told(types_of(policy), 'fp32', report.against_fp32)} (measured)"


def _told(ours: str, other: str, saving: dict[str, float]) -> str:
    whose = "their" if other == "pixels" else "its"
    return f"{ours}: {saving['speedup']:.2f}x as fast as {other} here, {saving['memory']:.2f} of {whose} memory"


def _read(path: Path | None, defaults: dict[str, Any], given: dict[str, Any], settings: list[str]) -> TrainConfig:
    """The YAML's settings, else `defaults`, and in place of them what is `given` and `settings`."""
    from halfstep.config import load_yaml, validate, with_settings
    from halfstep.train.config import TrainConfig

    content = {} if path is None else load_yaml(path, dict[str, Any])
    if (unread := [name for name in _UNREAD if name in content]) and rank() == 0:
        typer.echo(f"halfstep: {path}: {', '.join(unread)}: not read, as by the published trainer", err=True)
    content = {name: value for name, value in content.items() if name not in _UNREAD}
    if "global_batch_size" in given:
        content.pop("batch_size", None)
    if "data_path" in given:
        content.pop("datasets", None)
    content = with_settings({**defaults, **content, **given}, settings)
    if "model" not in content and path is None:
        raise InputError("train: nothing to train; name eqm, cdit or livestream, a --model or a --config")
    try:
        return validate(content, TrainConfig, path or "train")
    except InputError as error:
        raise InputError(_as_typed(str(error), given)) from error


def _as_typed(line: str, given: dict[str, Any]) -> str:
    """An error's line with the settings that came by a flag under the flag's name."""
    names = "|".join(map(re.escape, given))
    return re.sub(rf"(?<![\w-])({names})(?=[ :])", lambda name: f"--{name[0].replace('_', '-')}", line)
