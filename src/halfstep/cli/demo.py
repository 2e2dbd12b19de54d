"""halfstep demo"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="OUT", help="Folder for everything it makes.")
    ] = Path("demo"),
    train_seconds: Annotated[float, typer.Option(min=0.1, help="Of each network, half of them anew.")] = 60,
) -> None:
    """Make a toy world, encode it, train on it, sample with every step recorded, analyze that, and write a report that
    shows what was saved and what it cost."""
    from halfstep.cli.progress import Bar
    from halfstep.demo.report import write_report
    from halfstep.demo.run import run_demo

    with Bar("demo", "parts") as progress:
        result = run_demo(output, progress, train_seconds=train_seconds)
    report = output / "report.html"
    write_report(result, report)
    typer.echo(report.resolve())
