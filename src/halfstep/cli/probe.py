"""halfstep probe"""

from __future__ import annotations

import json as json_module
from typing import Annotated

import typer


def probe(
    device: Annotated[str, typer.Argument(help="cpu, cuda, cuda:1, ...")] = "cpu",
    refresh: Annotated[bool, typer.Option("--refresh", help="Measure again.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Measure what this device really does with each number format, and say what `auto` chooses."""
    from dataclasses import asdict

    from halfstep.precision import choose
    from halfstep.precision import probe as run_probe

    result = run_probe(device, refresh=refresh)
    policies = {task: choose(device, task) for task in ("encode", "sample", "train")}
    if json:
        typer.echo(json_module.dumps({**asdict(result), "auto": {task: str(p) for task, p in policies.items()}}))
        return
    typer.echo(f"{result.device}, torch {result.torch_version}, {result.threads} threads; milliseconds for one call")
    typer.echo(f"{'':6}{'matmul':>9}{'conv':>9}{'conv nhwc':>11}{'attention':>11}  sound")
    for name, report in result.types.items():
        times = f"{report.matmul_ms:9.2f}{report.conv_ms:9.2f}{report.conv_channels_last_ms:11.2f}"
        typer.echo(f"{name:6}{times}{report.attention_ms:11.2f}  {'yes' if report.sound else 'NO'}")
    for task, policy in policies.items():
        typer.echo(f"\nauto, {task}: {policy.explain()}")
