"""The files of an analysis: analysis.json, metrics.parquet, plots, report.html."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from halfstep.analyze.analysis import Analysis, document, plain, tidy
from halfstep.analyze.plots import write_plots
from halfstep.analyze.report import render_report
from halfstep.analyze.storage import StorageComparison
from halfstep.errors import InputError
from halfstep.files import claim, file_errors, replacing, write_durably

_SCHEMA = pa.schema(
    [
        ("run", pa.string()),
        ("group", pa.string()),
        ("prompt", pa.string()),
        ("seed", pa.string()),  # seeds go up to 2^64
        ("quantity", pa.string()),
        ("unit", pa.string()),
        ("sigma", pa.float64()),
        ("value", pa.float64()),
    ]
)


def full_document(analysis: Analysis, storage: Sequence[StorageComparison]) -> dict[str, Any]:
    """The JSON document, with the comparison of formats when there is one."""
    content = document(analysis)
    if storage:
        content["storage"] = plain([asdict(item) for item in storage])
    return content


def claim_output(folder: Path) -> None:
    """Raise InputError when `folder` holds something other than an analysis, or lies in a store."""
    inside = next((parent for parent in folder.absolute().parents if (parent / "zarr.json").exists()), None)
    if inside is not None:
        raise InputError(f"{folder}: lies in the trajectory store {inside}; name a folder outside of it")
    claim(folder, "analysis", ("analysis.json",))


def write_output(analysis: Analysis, folder: Path, title: str, storage: Sequence[StorageComparison] = ()) -> list[Path]:
    """Write all files into `folder`, in place of those of an earlier analysis. Raises InputError when the folder holds
    something else."""
    claim_output(folder)
    with file_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    # All of it before the first file is written. What UTF-8 cannot have is escaped, which JSON reads back.
    document = json.dumps(full_document(analysis, storage), indent=1, ensure_ascii=False).encode(
        errors="backslashreplace"
    )
    table = pa.Table.from_pylist(tidy(analysis), schema=_SCHEMA)
    report = render_report(analysis, title, storage).encode(errors="backslashreplace")
    write_durably(folder / "analysis.json", document)
    # Opened by Python: Arrow refuses names that are not UTF-8.
    with replacing(folder / "metrics.parquet") as unfinished, unfinished.open("wb") as file:
        pq.write_table(table, file)
    plots = write_plots(analysis, folder / "plots")
    write_durably(folder / "report.html", report)
    return [folder / "analysis.json", folder / "metrics.parquet", *plots, folder / "report.html"]
