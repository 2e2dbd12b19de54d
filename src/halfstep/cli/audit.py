"""halfstep audit"""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfstep.errors import InputError

if TYPE_CHECKING:
    from halfstep.opening import Opened
    from halfstep.precision import AuditReport, GradientReport

_MOST_LINES = 20
_RANDOM_CALLS = 3  # two to make the policy from, one to verify it on
_NOT_MET = 3  # 1 is for work that failed


def audit(
    model: Annotated[
        str, typer.Option(metavar="NAME", help="A published size, a file, a folder, a hub id, package.module:function.")
    ],
    inputs: Annotated[
        str,
        typer.Option(
            metavar="FILE|random", help="Calls of it, .npz, .safetensors or .pt; the last verifies the policy."
        ),
    ] = "random",
    held_out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Calls that verify the policy, in place of the last input.")
    ] = None,
    target: Annotated[
        str, typer.Option(metavar="TYPE", help="fp16 or bf16; fp16,accumulation=split-k sums products in parts.")
    ] = "fp16",
    tolerance: Annotated[float, typer.Option(help="Of the output, relative to fp32.")] = 1e-2,
    cure: Annotated[
        str, typer.Option(metavar="islands|rescale", help="rescale: divide streams by powers of two first.")
    ] = "islands",
    prune: Annotated[bool, typer.Option(help="Try to do without each island.")] = True,
    train: Annotated[
        bool, typer.Option("--train", help="Look at gradients too, of the mean square of the output.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Folder for report.html and audit.json.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Find which modules of a model must stay in fp32 when the rest is half, on a device that need not be here."""
    from halfstep.opening import open_model, read_inputs
    from halfstep.precision import Target, audit_gradients
    from halfstep.precision import audit as run_audit

    aimed = Target.parse(target)
    if output is not None:
        _make_folder(output)
    opened = open_model(model)
    calls = _random_calls(opened) if inputs == "random" else read_inputs(Path(inputs))
    others = read_inputs(held_out) if held_out is not None else None
    report = run_audit(opened.module, calls, tolerance=tolerance, target=aimed, held_out=others, prune=prune, cure=cure)
    gradients = audit_gradients(opened.module, calls[0], type=aimed.type) if train else None
    if output is not None:
        _write(report, gradients, opened.name, output)
    if json:
        typer.echo(json_module.dumps(_document(report, gradients)))
    else:
        _print(report, gradients, opened.name)
        if output is not None:
            typer.echo(f"\n{output / 'report.html'}")
    if not report.met:
        raise typer.Exit(_NOT_MET)


def _random_calls(opened: Opened) -> list[Any]:
    """Of the shapes of one call, with normal noise for floating-point tensors and the integers in another order."""
    import torch

    from halfstep.opening import example_inputs

    first = opened.inputs if opened.inputs is not None else example_inputs(opened.module)
    generator = torch.Generator().manual_seed(0)

    def drawn(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if value.is_floating_point():
            return torch.randn(value.shape, generator=generator)
        return value.flatten()[torch.randperm(value.numel(), generator=generator)].reshape(value.shape)

    def call() -> Any:
        if isinstance(first, dict):
            return {name: drawn(value) for name, value in first.items()}
        return tuple(drawn(value) for value in first)

    return [call() for _ in range(_RANDOM_CALLS)]


def _document(report: AuditReport, gradients: GradientReport | None) -> dict[str, Any]:
    document = report.to_dict()
    if gradients is not None:
        document["training"] = {
            "scale": gradients.scale,
            "largest": gradients.largest,
            "lost": {f"{scale:g}": share for scale, share in gradients.lost.items()},
            "overflows": list(gradients.overflows),
        }
    return document


def _make_folder(folder: Path) -> None:
    """Before the work, not after it."""
    from halfstep.files import file_errors

    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; expected a folder for the report")
    with file_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


def _write(report: AuditReport, gradients: GradientReport | None, name: str, folder: Path) -> None:
    from halfstep.files import file_errors, write_durably
    from halfstep.precision.audits.page import render_page

    with file_errors(folder):
        write_durably(folder / "audit.json", json_module.dumps(_document(report, gradients), indent=1).encode())
        write_durably(folder / "report.html", render_page(report, name, gradients).encode())


def _print(report: AuditReport, gradients: GradientReport | None, name: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from halfstep.precision.audits.page import WORDS, harm

    console = Console(highlight=False, width=None if Console().is_terminal else 160)
    console.print(f"{name}: {report.verdict}.", markup=False, soft_wrap=True)
    if report.findings:
        table = Table(box=None, header_style="dim")
        for head in ("module", "what", "operation", "line", "largest", "harm"):
            table.add_column(head, justify="right" if head in ("largest", "harm") else "left", overflow="fold")
        for finding in report.findings[:_MOST_LINES]:
            event = finding.event
            cells = event.module or name, WORDS[event.kind], event.operation, event.line, f"{event.largest:.3g}"
            table.add_row(*cells, harm(finding))
        console.print(table)
        if len(report.findings) > _MOST_LINES:
            console.print(f"and {len(report.findings) - _MOST_LINES} more; -o DIR writes them all")
    if report.risks:
        places = ", ".join(dict.fromkeys(risk.module or name for risk in report.risks[:5]))
        console.print(f"{len(report.risks)} operations have less than two bits to spare: {places}", markup=False)
    if report.opaque:
        console.print(f"not seen inside: {', '.join(report.opaque)}", markup=False)
    if report.rescaling:
        console.print(f"{len(report.rescaling.weights)} layers are rescaled; -o DIR writes by how much")
    if gradients is not None:
        console.print(f"loss scale to start from: {gradients.scale:g} (largest gradient {gradients.largest:.3g})")
    typer.echo(f"--precision '{report.policy}'")
