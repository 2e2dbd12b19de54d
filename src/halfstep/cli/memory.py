"""halfstep memory"""

from __future__ import annotations

import json as json_module
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfstep.errors import InputError, some

if TYPE_CHECKING:
    from halfstep.opening import Inputs, Opened
    from halfstep.train.memory import Plan

_PRECISIONS = ("fp32", "bf16-mixed", "bf16-true")
_COLUMNS = ("weights", "gradients", "optimizer", "activations", "peak")


def memory(
    model: Annotated[
        str, typer.Option(metavar="NAME", help="A published size, a file, a folder, a hub id, package.module:function.")
    ],
    inputs: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Of one forward call: .npz, .safetensors, .pt; or random, to guess them."),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Samples, by default those of the inputs; give it again for more.")
    ] = None,
    train: Annotated[bool, typer.Option("--train", help="A training step with AdamW in place of a call.")] = False,
    precision: Annotated[
        list[str] | None, typer.Option(metavar="P", help="Give it again for more. fp32, bf16-mixed and bf16-true.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="8GB: the largest batch, or for --batch the least recomputation, that fits."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Predict the memory that a model takes, without its weights: nothing is allocated."""
    from halfstep.machine import open_device
    from halfstep.opening import open_model
    from halfstep.precision import settle
    from halfstep.precision.memory import odd_layers, parse_size
    from halfstep.train.memory import plan

    size = None if budget is None else parse_size(budget)
    device = open_device("auto")
    policies = [settle(name, device, "train" if train else "sample").policy for name in precision or _PRECISIONS]
    opened = open_model(model, weights=False)
    given = _inputs(opened, inputs)
    batches: list[int | None] = [*batch] if batch else [None]
    plans = [
        plan(opened.module, given, policy, device, train=train, batch=samples, budget=size)
        for policy in policies
        for samples in batches
    ]
    odd = {str(policy): odd_layers(opened.module, policy) for policy in policies}
    if json:
        document = {"model": opened.name, "device": str(device), "train": train, "inputs": _shapes(given)}
        typer.echo(json_module.dumps({**document, "plans": [asdict(row) for row in plans], "odd_layers": odd}))
        return
    what = "a training step" if train else "a forward call"
    typer.echo(f"{opened.name}: {what} on {device.type}, predicted; one call has {', '.join(_shapes(given))}; MB")
    typer.echo(f"{'':24}{'batch':>7}" + "".join(f"{column:>13}" for column in _COLUMNS))
    for row in plans:
        typer.echo(_line(row))
    lines = [
        some([f"{name or 'itself'} ({channels} pads to {padded})" for name, (channels, padded) in layers.items()])
        for layers in odd.values()
        if layers
    ]
    for line in dict.fromkeys(lines):
        typer.echo(f"not at the full speed of tensor cores, by the number of channels: {line}")


def _inputs(opened: Opened, given: str | None) -> Inputs:
    """Those of the file, the model's own, or guessed ones where that is asked for."""
    from halfstep.opening import example_inputs, read_inputs

    if given == "random":
        return example_inputs(opened.module)
    if given is not None:
        return read_inputs(Path(given))[0]
    if opened.inputs is None:
        raise InputError(
            f"--inputs: nothing tells what {opened.name} is called with; give a file, or random for guessed ones"
        )
    return opened.inputs


def _shapes(inputs: Inputs) -> list[str]:
    """For people: names where there are some, and shapes."""
    named = inputs if isinstance(inputs, dict) else {str(position): value for position, value in enumerate(inputs)}
    return [f"{name} {list(getattr(value, 'shape', [value]))}" for name, value in named.items()]


def _line(row: Plan) -> str:
    facts = asdict(row.footprint)
    recomputed = f", {row.recomputed} of {row.blocks} blocks recomputed" if row.recomputed else ""
    return f"{row.policy:24}{row.batch:7}" + "".join(f"{facts[c] / 1e6:13.1f}" for c in _COLUMNS) + recomputed
